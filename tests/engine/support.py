"""What the engine's tests share: the questions they ask, and who listens."""

import queue
import threading
import time

from runtime import Engine, SamplingParams, TokenEvent

MODES = ("dense", "exact", "predicted")
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


class Receiver:
    """Collects the events of several requests."""

    def __init__(self) -> None:
        self.events: dict[str, list[TokenEvent]] = {}
        self.ended: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.first = threading.Event()

    def __call__(self, event: TokenEvent) -> None:
        self.events.setdefault(event.request_id, []).append(event)
        self.first.set()
        if event.finish_reason is not None:
            self.ended.put(event.request_id)

    def wait(self, count: int) -> None:
        for _ in range(count):
            self.ended.get(timeout=100)

    def tokens(self, name: str) -> list[int]:
        return [e.token_id for e in self.events[name] if e.token_id is not None]


def slow_down(engine: Engine, seconds: float = 0.01) -> None:
    """Make every decode step take a while, so that a test can act in the middle of an answer."""
    decode = engine.model.decode

    def slow(*args, **kwargs):
        time.sleep(seconds)
        return decode(*args, **kwargs)

    engine.model.decode = slow
