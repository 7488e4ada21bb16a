"""Progress on stderr: a live bar on a terminal, plain lines elsewhere, nothing when switched off.

Standard output stays free for results, so that `hotneuron pull` can print a path as its last line.
"""

from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from rich.console import Console
from rich.progress import track

Item = TypeVar("Item")


class Progress:
    """Where the store tells the user what it is doing."""

    def __init__(self, enabled: bool = True) -> None:
        self.console = Console(stderr=True, quiet=not enabled, highlight=False)

    def note(self, text: str) -> None:
        """One line of news."""
        self.console.print(text, soft_wrap=True, markup=False)

    def steps(self, items: Iterable[Item], description: str) -> Iterator[Item]:
        """Pass the items through, showing how many are done."""
        if self.console.is_terminal:
            yield from track(items, description=description, console=self.console, transient=True)
            return
        total = f" ({len(items)} steps)" if isinstance(items, Sized) else ""
        self.note(f"{description}{total}")
        yield from items
