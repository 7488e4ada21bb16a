"""Progress of a long stage: a Rich bar on a terminal, else one plain line every few seconds."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

PLAIN_SECONDS = 10.0


class Advance(Protocol):
    def __call__(self, count: int, note: str = "") -> None: ...


@contextmanager
def progress_bar(console: Console, title: str, total: int, done: int = 0) -> Iterator[Advance]:
    """Yields `advance(count, note)`; `done` of `total` were finished by an earlier run."""
    if console.is_terminal:
        columns = (
            TextColumn("{task.description:<12}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=console) as bars:
            task = bars.add_task(title, total=total, completed=done, note="")
            yield lambda count, note="": bars.update(task, advance=count, note=note)
        return
    yield _PlainLines(console, title, total, done)


class _PlainLines:
    def __init__(self, console: Console, title: str, total: int, done: int) -> None:
        self._console, self._title, self._total, self._done = console, title, total, done
        self._begin = time.monotonic()
        self._last = float("-inf")

    def __call__(self, count: int, note: str = "") -> None:
        self._done += count
        now = time.monotonic()
        if now - self._last < PLAIN_SECONDS and self._done < self._total:
            return
        self._last = now
        self._console.print(
            f"{self._title}: {self._done}/{self._total} "
            f"({now - self._begin:.0f} s) {note}".rstrip(),
            highlight=False,
            soft_wrap=True,
        )
