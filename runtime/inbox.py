"""The one thread boundary: requests and aborts come in here from any thread.

Owns which requests are in flight, and so the bound on them. The engine thread takes what came and
reports what ended; nothing else in the runtime holds a lock on requests.
"""

import threading

from .errors import EngineDead, InvalidRequest, QueueFull
from .sequence import Sequence


class Inbox:
    def __init__(self, limit: int) -> None:
        self._limit = limit  # requests running and waiting
        self._changed = threading.Condition()
        self._arrived: list[Sequence] = []
        self._aborted: list[str] = []
        self._in_flight: dict[str, Sequence] = {}
        self._closed: str | None = None  # why nothing more is taken
        self._woken = False

    def submit(self, sequence: Sequence) -> None:
        with self._changed:
            if self._closed is not None:
                raise EngineDead(self._closed)
            if sequence.id in self._in_flight:
                raise InvalidRequest(f"a request {sequence.id!r} is in flight already", param="id")
            if len(self._in_flight) >= self._limit:
                raise QueueFull(
                    f"{self._limit} requests are running or waiting, the most this server takes; "
                    "try again later, or start it with a larger --max-queue"
                )
            self._in_flight[sequence.id] = sequence
            self._arrived.append(sequence)
            self._changed.notify()

    def abort(self, request_id: str) -> None:
        with self._changed:
            self._aborted.append(request_id)
            self._changed.notify()

    def take(self) -> tuple[list[Sequence], list[str]]:
        """(arrived, aborted) since the last call. Arrivals come first: abort may follow at once."""
        with self._changed:
            arrived, self._arrived = self._arrived, []
            aborted, self._aborted = self._aborted, []
            self._woken = False
        return arrived, aborted

    def wait(self) -> None:
        """Sleep until something came in or `wake`."""
        with self._changed:
            self._changed.wait_for(lambda: self._arrived or self._aborted or self._woken)

    def wake(self) -> None:
        with self._changed:
            self._woken = True
            self._changed.notify()

    def ended(self, request_id: str) -> None:
        with self._changed:
            self._in_flight.pop(request_id, None)

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    def kill(self, reason: str) -> list[Sequence]:
        """Close and hand back every request that has had no last event."""
        with self._changed:
            self._closed = reason
            self._arrived, self._aborted = [], []
            return list(self._in_flight.values())

    def reopen(self) -> None:
        """Take requests again after `kill`; those that it handed back are gone."""
        with self._changed:
            self._closed = None
            self._in_flight.clear()

    def close(self, reason: str) -> None:
        """Take nothing more; what is inside stays to be taken. The first reason holds."""
        with self._changed:
            self._closed = self._closed or reason

    @property
    def closed_reason(self) -> str | None:
        return self._closed
