"""The items of the tasks: generated from a seed, read from Python's own library, or written by us.

Nothing here is taken from a published benchmark. Generated items and those in task_items/ are this
project's; doctests and docstrings are read from the standard library of the Python that runs (PSF
licence) and not stored, so they are the same for one version of Python only. `fingerprint` says
whether two results stand on the same items.

Items are a fixed function of the seed. The right answer takes every place among the choices equally
often, so a model that cannot tell them apart is right as often as chance says.
"""

from __future__ import annotations

import ast
import doctest
import hashlib
import json
import random
import sysconfig
import tomllib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

SEED = 20240
CHOICES = 4
DOCTEST_CONTEXT = 250  # characters of earlier examples
MAX_DOCTESTS_PER_MODULE = 40
# documented, and in every Python from 3.11 on
DOCTEST_MODULES = (
    "_pydecimal", "collections/__init__", "datetime", "difflib", "doctest", "enum",
    "fractions", "http/cookies", "ipaddress", "json/__init__", "pickle", "random", "shutil",
    "statistics", "textwrap", "turtle", "typing", "uuid", "zipfile",
)  # fmt: skip
DOCSTRING_MODULES = (
    "argparse", "ast", "base64", "bisect", "calendar", "cmd", "code", "codecs",
    "configparser", "contextlib", "copy", "csv", "dataclasses", "datetime", "difflib",
    "dis", "email/message", "email/utils", "filecmp", "fnmatch", "fractions", "ftplib",
    "functools", "getpass", "gettext", "glob", "gzip", "heapq", "hmac", "http/client",
    "http/cookiejar", "imaplib", "inspect", "io", "ipaddress", "keyword", "linecache",
    "locale", "logging/__init__", "mailbox", "mimetypes", "ntpath", "operator", "os",
    "platform", "plistlib", "poplib", "posixpath", "pprint", "profile", "queue", "random",
    "sched", "secrets", "selectors", "shelve", "shlex", "shutil", "smtplib", "socket",
    "socketserver", "ssl", "stat", "statistics", "string", "subprocess", "tarfile",
    "tempfile", "textwrap", "threading", "timeit", "tokenize", "trace", "traceback",
    "turtle", "types", "unittest/case", "urllib/parse", "urllib/request", "uuid", "wave",
    "weakref", "webbrowser", "zipfile",
)  # fmt: skip


@dataclass(frozen=True)
class Item:
    """A context and how it may go on; `answer` is the place of the right choice.

    An item of one choice asks whether greedy decoding gives exactly that.
    """

    context: str
    choices: tuple[str, ...]
    answer: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.answer < len(self.choices) or len(set(self.choices)) < len(self.choices):
            raise ValueError(f"choices must differ and hold the answer: {self}")


@dataclass(frozen=True)
class Task:
    """Items that are scored alike.

    `chat`: the context is a user's question, the choices are whole answers. `per_character`: a
    choice counts by its log-probability per character, else by the sum; for choices of unequal
    length.
    """

    name: str
    source: str
    items: tuple[Item, ...]
    chat: bool = False
    per_character: bool = False

    @property
    def greedy(self) -> bool:
        return all(len(item.choices) == 1 for item in self.items)

    @property
    def chance(self) -> float:
        """Expected accuracy of guessing; 0 where the answer must be produced."""
        if self.greedy:
            return 0.0
        return sum(1 / len(item.choices) for item in self.items) / len(self.items)


def fingerprint(tasks: Iterable[Task]) -> str:
    """Of names, items and scoring rules: equal where scores may be compared."""
    text = json.dumps([asdict(task) for task in tasks], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def as_items(
    rows: list[tuple[str, str, list[str]]], chance: random.Random, lead: str = " "
) -> tuple[Item, ...]:
    """Items of (context, right, wrong ones): each place holds the right answer equally often."""
    places = [i % (len(wrong) + 1) for i, (_, _, wrong) in enumerate(rows)]
    chance.shuffle(places)
    items = []
    for (context, right, wrong), place in zip(rows, places, strict=True):
        choices = [*wrong[:place], right, *wrong[place:]]
        items.append(Item(context, tuple(lead + choice for choice in choices), place))
    return tuple(items)


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


# --- from Python's standard library ---------------------------------------------------------------


@cache
def documented(modules: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """(dotted name, docstring) of modules, classes and functions, read without importing them."""
    root = Path(sysconfig.get_path("stdlib"))
    found: list[tuple[str, str]] = []

    def walk(node: Any, name: str) -> Iterator[tuple[str, str]]:
        if text := ast.get_docstring(node):
            yield name, text
        for child in node.body:
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                yield from walk(child, f"{name}.{child.name}")

    for module in modules:
        # some modules become packages in later versions
        for file in (root / f"{module}.py", root / module / "__init__.py"):
            if file.is_file():
                tree = ast.parse(file.read_text(encoding="utf-8"))
                found += walk(tree, module.removesuffix("/__init__").replace("/", "."))
    return tuple(found)


def examples_of(text: str) -> Iterator[tuple[str, str]]:
    """(the example after those before it, the interpreter's answer) of a docstring's examples."""
    try:
        examples = doctest.DocTestParser().get_examples(text)
    except ValueError:  # prose that only looks like an example
        return
    before = ""
    for example in examples:
        marks = [">>> ", *["... "] * example.source.count("\n")]
        lines = zip(marks, example.source.splitlines(), strict=False)
        before += "".join(f"{mark}{line}\n" for mark, line in lines)
        want = example.want.strip()
        recent = before[-DOCTEST_CONTEXT:]
        whole_lines = recent if recent == before else recent.partition("\n")[2]
        if whole_lines and want and len(want) < 40 and "\n" not in want and "..." not in want:
            yield whole_lines, want
        before += example.want


def doctests(chance: random.Random, count: int = 100) -> Task:
    """What does the interpreter answer? Wrong answers: those of other examples, alike in kind."""
    examples = [
        (name.split(".")[0], context, want)
        for name, text in documented(DOCTEST_MODULES)
        for context, want in examples_of(text)
    ]
    kinds: dict[str, set[str]] = {}
    for _, _, want in examples:
        kinds.setdefault(kind_of(want), set()).add(want)
    chance.shuffle(examples)
    rows: list[tuple[str, str, list[str]]] = []
    used: Counter[str] = Counter()
    for module, context, want in examples:
        others = sorted(kinds[kind_of(want)] - {want})
        # an answer that stands in the context can be copied
        if want in context or len(others) < CHOICES - 1 or used[module] == MAX_DOCTESTS_PER_MODULE:
            continue
        used[module] += 1
        rows.append((context, want, chance.sample(others, CHOICES - 1)))
    return Task(
        "doctests",
        "Python's standard library",
        as_items(rows[:count], chance, ""),
        per_character=True,
    )


def kind_of(answer: str) -> str:
    """A rough type, so that wrong answers are not given away by theirs."""
    if answer in ("True", "False", "None"):
        return "constant"
    if answer.lstrip("-").replace(".", "", 1).isdigit():
        return "number"
    name, called, _ = answer.partition("(")
    if called and name.isidentifier():
        return name
    return answer[0] if answer[0] in "'\"[({" else "other"


def docstrings(chance: random.Random, count: int = 100) -> Task:
    """What is this function for? Wrong answers: other functions' first sentences."""
    entries: dict[str, str] = {}
    for name, text in documented(DOCSTRING_MODULES):
        function = name.rsplit(".", 1)[-1]
        first = " ".join(text.split("\n\n")[0].split())
        plain = first.endswith(".") and first.count(".") == 1 and 25 <= len(first) <= 90
        public = name.count(".") and function.islower() and not function.startswith("_")
        if plain and public and first not in entries.values():
            entries[name] = first
    names = sorted(entries)
    chance.shuffle(names)
    rows = []
    for name in names[:count]:
        wrong = [entries[other] for other in chance.sample(names, 2 * CHOICES) if other != name]
        rows.append((f"The function `{name}` in Python:", entries[name], wrong[: CHOICES - 1]))
    return Task(
        "docstrings", "Python's standard library", as_items(rows, chance), per_character=True
    )


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
