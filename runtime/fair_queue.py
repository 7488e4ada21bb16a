"""Waiting requests: first come, first served within a client, clients in turn.

A client with a hundred requests delays another's single one by one turn, not by a hundred.
"""

from collections import deque
from collections.abc import Iterator

from .sequence import Sequence


class FairQueue:
    """The next one is that of the client who has waited longest for a turn."""

    def __init__(self) -> None:
        self._by_client: dict[str, deque[Sequence]] = {}  # in order of their turns; none is empty

    def __len__(self) -> int:
        return sum(map(len, self._by_client.values()))

    def __iter__(self) -> Iterator[Sequence]:
        for sequences in self._by_client.values():
            yield from sequences

    def append(self, sequence: Sequence) -> None:
        self._by_client.setdefault(sequence.request.client, deque()).append(sequence)

    def first(self) -> Sequence | None:
        """The one that `pop_first` would give."""
        return next(iter(self), None)

    def pop_first(self) -> Sequence:
        """Takes it out; its client's next turn comes after everyone else's."""
        client, sequences = next(iter(self._by_client.items()))
        sequence = sequences.popleft()
        del self._by_client[client]
        if sequences:
            self._by_client[client] = sequences
        return sequence

    def remove(self, sequence: Sequence) -> None:
        client = sequence.request.client
        self._by_client[client].remove(sequence)
        if not self._by_client[client]:
            del self._by_client[client]
