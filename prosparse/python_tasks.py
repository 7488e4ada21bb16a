"""Tasks from the documentation in Python's own library, read from its sources without importing.

It is under the PSF licence and not stored here: the items are those of the Python that runs.
"""

from __future__ import annotations

import ast
import doctest
import random
import sysconfig
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from .task import CHOICES, Task, as_items

SOURCE = "Python's standard library"
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
        SOURCE,
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
    return Task("docstrings", SOURCE, as_items(rows, chance), per_character=True)
