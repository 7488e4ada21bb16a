"""The items of the tasks: generated from a seed, read from Python's own library, or written by us.

Nothing here is taken from a published benchmark. Generated items and those in task_items/ are this
project's; doctests and docstrings are read from the standard library of the Python that runs (PSF
licence) and not stored, so they are the same for one version of Python only. `task.fingerprint`
says whether two results stand on the same items.

Items are a fixed function of the seed. The right answer takes every place among the choices equally
often, so a model that cannot tell them apart is right as often as chance says.
"""

from __future__ import annotations

import random
import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from .python_tasks import docstrings, doctests
from .task import CHOICES, Item, Task, as_items

SEED = 20240


def read_items(name: str) -> dict[str, Any]:
    return tomllib.loads((Path(__file__).parent / "task_items" / name).read_text(encoding="utf-8"))


# --- generated ------------------------------------------------------------------------------------


def arithmetic(chance: random.Random, count: int = 120) -> Task:
    """Sums, differences and products of small numbers, after four examples."""
    operations: dict[str, Callable[[int, int], int]] = {
        "+": lambda a, b: a + b,
        "-": lambda a, b: a - b,
        "*": lambda a, b: a * b,
    }
    opening = "3 + 4 = 7\n9 - 2 = 7\n2 * 5 = 10\n12 + 6 = 18\n"
    questions: dict[str, int] = {}
    while len(questions) < count:
        sign = chance.choice("++-*")
        a, b = (chance.randint(2, 9 if sign == "*" else 30) for _ in range(2))
        if sign == "-" and a < b:
            a, b = b, a
        question = f"{a} {sign} {b} ="
        if question not in opening:
            questions[question] = operations[sign](a, b)
    rows = []
    for question, right in questions.items():
        near = [right + step for step in (-10, -3, -2, -1, 1, 2, 3, 10) if right + step >= 0]
        wrong = [str(value) for value in chance.sample(near, CHOICES - 1)]
        rows.append((opening + question, str(right), wrong))
    return Task("arithmetic", "generated", as_items(rows, chance))


def recall(chance: random.Random, count: int = 100) -> Task:
    """Who has what, looked up in a list of four to eight lines; all choices stand in it."""
    words = read_items("words.toml")
    rows = []
    for i in range(count):
        size = CHOICES + i % 5
        names, things = chance.sample(words["names"], size), chance.sample(words["things"], size)
        asked = chance.randrange(size)
        lines = "".join(f"{name}: {thing}\n" for name, thing in zip(names, things, strict=True))
        others = things[:asked] + things[asked + 1 :]
        rows.append(
            (f"{lines}\n{names[asked]}:", things[asked], chance.sample(others, CHOICES - 1))
        )
    return Task("recall", "generated", as_items(rows, chance))


def copying(chance: random.Random, count: int = 80) -> Task:
    """A list of eight to fourteen made-up words, to be said again to its end, after an example."""
    items = []
    for i in range(count):
        size = 8 + i % 7
        example, words = (" ".join(made_up_word(chance) for _ in range(size)) for _ in range(2))
        cut = len(" ".join(words.split()[: size // 2]))
        context = f"{example}\n{example}\n\n{words}\n{words[:cut]}"
        items.append(Item(context, (words[cut:],)))
    return Task("copying", "generated", tuple(items))


def made_up_word(chance: random.Random) -> str:
    return "".join(
        chance.choice("bdfgklmnprstvz") + chance.choice("aeiou")
        for _ in range(chance.randint(2, 3))
    )


def spelling(chance: random.Random, count: int = 100) -> Task:
    """Which word do these letters spell? Wrong words share length or first letter with it."""
    words = sorted({word for word in read_items("words.toml")["words"] if len(word) >= 5})
    opening = "h-o-u-s-e spells the word house.\ng-r-e-e-n spells the word green.\n"
    rows = []
    for i in range(count):
        right = words[i % len(words)]
        alike = [
            word
            for word in words
            if word != right and (word[0] == right[0] or len(word) == len(right))
        ]
        rows.append(
            (
                f"{opening}{'-'.join(right)} spells the word",
                right + ".",
                [word + "." for word in chance.sample(alike, CHOICES - 1)],
            )
        )
    return Task("spelling", "generated", as_items(rows, chance))


# --- written for this project ---------------------------------------------------------------------


def written(name: str, chance: random.Random, lead: str, **rules: Any) -> Task:
    """task_items/NAME.toml: beginning, right ending, wrong endings."""
    rows = [(first, right, wrong) for first, right, *wrong in read_items(f"{name}.toml")["items"]]
    return Task(name, "written for this project", as_items(rows, chance, lead), **rules)


def cloze(_: random.Random) -> Task:
    """The last word of a passage, which follows from what was said before, must be produced."""
    rows = read_items("cloze.toml")["items"]
    return Task(
        "cloze",
        "written for this project",
        tuple(Item(passage, (f" {word}",)) for passage, word in rows),
    )


MAKERS: dict[str, Callable[[random.Random], Task]] = {
    "knowledge": lambda chance: written("knowledge", chance, "", chat=True, per_character=True),
    "commonsense": lambda chance: written("commonsense", chance, " ", per_character=True),
    "cloze": cloze,
    "recall": recall,
    "copying": copying,
    "arithmetic": arithmetic,
    "spelling": spelling,
    "doctests": doctests,
    "docstrings": docstrings,
}


def make_tasks(names: Iterable[str] = (), seed: int = SEED) -> list[Task]:
    """The named tasks, or all of them; a task's items do not depend on which others are made.

    ValueError names an unknown task.
    """
    chosen = list(names) or list(MAKERS)
    if unknown := [name for name in chosen if name not in MAKERS]:
        raise ValueError(f"unknown task {unknown[0]!r}; there are {', '.join(MAKERS)}")
    return [MAKERS[name](random.Random(f"{seed} {name}")) for name in chosen]
