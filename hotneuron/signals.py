"""SIGTERM and SIGINT: the first asks for an orderly end, the second ends the process at once."""

import os
import signal
from types import FrameType
from typing import Any

NUMBERS = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """Takes the two signals over between `with` and its end; for the main thread.

    Before `defer` there is nothing worth an orderly end, and the first one ends the process, too.
    Taken over all the same: the first process of a container has no default for SIGTERM.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._is_deferred = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        self._before = self.take_over()
        return self

    def take_over(self) -> dict[signal.Signals, Any]:
        """Once more, after a library has set handlers of its own; those that were set."""
        return {number: signal.signal(number, self._take) for number in NUMBERS}

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def defer(self) -> None:
        """From now on the first signal is only noted in `received`."""
        self._is_deferred = True

    def _take(self, number: int, _: FrameType | None) -> None:
        is_first, self.received = self.received is None, signal.Signals(number)
        if not (is_first and self._is_deferred):
            os._exit(128 + number)
