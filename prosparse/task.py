"""What a task is: items, each a context with choices, and how they are scored."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable
from dataclasses import asdict, dataclass

CHOICES = 4


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
