"""Drills to train on: sums, spelling, copying and looking up, of which ordinary text has little.

A sparse student forgets what its training text does not use, and neither KL nor perplexity on such
text shows it. Drills are texts of many short lines; the teacher's distribution is learned from them
as from any other text. What the tasks ask (task_sets.py) is left out: their sums, words and names.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

from .task_sets import made_up_word, make_tasks, read_items

WORD = re.compile(r"\b[a-z]{4,9}\b")
LEAST_OCCURRENCES = 6  # of a word in the texts: what is rarer is often no word
NAMES = (
    "Ada", "Bill", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hal", "Ivy", "Jon", "Kim", "Lou", "Mona",
    "Ned", "Otto", "Pat", "Quin", "Ria", "Sid", "Tess", "Uma", "Vic", "Wes", "Xena", "Yan", "Zoe",
)  # fmt: skip
SIGN_WORDS = {"+": "plus", "-": "minus", "*": "times", "/": "divided by"}
SUM_FORMS = (
    "{a} {sign} {b} = {result}",
    "{a} {sign} {b} = {result}",  # twice as often as the others
    "{a}{sign}{b}={result}",
    "{a} {word} {b} is {result}.",
    "Q: What is {a} {sign} {b}?\nA: {result}",
    ">>> {a} {python_sign} {b}\n{result}",
)
SPELLING_FORMS: tuple[Callable[[str], str], ...] = (
    lambda word: f"{'-'.join(word)} spells the word {word}.",
    lambda word: f"{word}: {' '.join(word)}",
    lambda word: f'The letters {", ".join(word)} spell "{word}".',
    lambda word: f"How do you spell {word}? {'-'.join(word.upper())}.",
    lambda word: f"{'-'.join(word)} = {word}",
)
Sum = tuple[int, str, int]


def common_words(texts: Iterable[str]) -> list[str]:
    """Words that the texts use often and no task asks about, sorted."""
    asked = {word for words in read_items("words.toml").values() for word in words}
    counts = Counter(word for text in texts for word in WORD.findall(text))
    return sorted(
        word for word, count in counts.items() if count >= LEAST_OCCURRENCES and word not in asked
    )


def asked_sums() -> set[Sum]:
    """Those of the arithmetic task."""
    (task,) = make_tasks(["arithmetic"])
    found = [re.search(r"(\d+) (.) (\d+) =$", item.context) for item in task.items]
    return {(int(match[1]), match[2], int(match[3])) for match in found if match}


class Drills:
    """An endless stream of drills, a fixed function of words and seed."""

    def __init__(self, words: Sequence[str], seed: int) -> None:
        if len(words) < 30:
            raise ValueError(f"{len(words)} common words are too few for drills; give more text")
        self._words, self._chance, self._left_out = list(words), random.Random(seed), asked_sums()

    def __iter__(self) -> Iterator[dict[str, str]]:
        makers = {"sums": self._sums, "spelling": self._spelling, "copy": self._copy,
                  "lookup": self._lookup}  # fmt: skip
        while True:
            (kind,) = self._chance.choices(list(makers), weights=(40, 25, 20, 15))
            yield {"text": makers[kind](), "kind": kind}

    def _sums(self) -> str:
        form = self._chance.choice(SUM_FORMS)
        return "\n".join(self._sum(form) for _ in range(self._chance.randint(8, 40)))

    def _sum(self, form: str) -> str:
        while True:
            a, sign, b = self._operands()
            if (a, sign, b) not in self._left_out:
                break
        results = {"+": a + b, "-": a - b, "*": a * b, "/": a // b if b else 0}
        python_sign = "//" if sign == "/" else sign
        return form.format(
            a=a, b=b, sign=sign, python_sign=python_sign, word=SIGN_WORDS[sign],
            result=results[sign],
        )  # fmt: skip

    def _operands(self) -> Sum:
        """Results are whole and not negative."""
        chance = self._chance
        sign = chance.choice("++--**/")
        if sign in "*/":
            a, b = chance.randint(1, 12), chance.randint(1, 12)
            return (a * b if sign == "/" else a), sign, b
        highest = chance.choice((10, 20, 30, 50, 100))
        a, b = chance.randint(0, highest), chance.randint(0, highest)
        return (max(a, b), sign, min(a, b)) if sign == "-" else (a, sign, b)

    def _spelling(self) -> str:
        form = self._chance.choice(SPELLING_FORMS)
        words = self._chance.sample(self._words, self._chance.randint(5, 14))
        return "\n".join(form(word) for word in words)

    def _copy(self) -> str:
        """A line and the same again: made-up words, words, numbers."""
        chance = self._chance
        kind = chance.randrange(3)
        if kind == 0:
            lines = [
                " ".join(made_up_word(chance) for _ in range(chance.randint(6, 16)))
                for _ in range(3)
            ]
            return "\n".join(f"{line}\n{line}\n" for line in lines)
        if kind == 1:
            line = " ".join(chance.sample(self._words, chance.randint(8, 30)))
        else:
            line = " ".join(str(chance.randint(0, 999)) for _ in range(chance.randint(8, 20)))
        return "\n".join([line] * chance.randint(2, 3))

    def _lookup(self) -> str:
        """Who has what, and the same asked again."""
        chance = self._chance
        size = chance.randint(4, 9)
        names, things = chance.sample(NAMES, size), chance.sample(self._words, size)
        pairs = list(zip(names, things, strict=True))
        asked = chance.sample(pairs, min(size, 4))
        if chance.randrange(2):
            answers = [f"{name}: {thing}" for name, thing in asked]
        else:
            answers = [
                f"Who has {thing}? {name}. What does {name} have? {thing}." for name, thing in asked
            ]
        return "\n".join([*(f"{name}: {thing}" for name, thing in pairs), "", *answers])
