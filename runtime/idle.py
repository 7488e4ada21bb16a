"""Work for the engine thread when no request needs it: one job, a slice at a time.

A job is an iterator; each `next` is one slice, short enough that a request which arrives meanwhile
can wait for it.
"""

import threading
from collections.abc import Iterator

from .errors import InvalidRequest


class IdleWork:
    """`start` from any thread, `run_slice` on the engine thread only."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._job: Iterator[None] | None = None

    def start(self, job: Iterator[None]) -> None:
        with self._lock:
            if self._job is not None:
                raise InvalidRequest("a measurement is under way already; wait for its end")
            self._job = job

    @property
    def is_waiting(self) -> bool:
        return self._job is not None

    def run_slice(self) -> bool:
        """False when there is nothing to do. A job that fails is dropped, its error raised."""
        job = self._job
        if job is None:
            return False
        try:
            next(job)
        except StopIteration:
            self._job = None
        except BaseException:
            self._job = None
            raise
        return True
