"""Where the time of hybrid layers goes: accelerator, host, the way between them, and waiting.

Moments on an accelerator cost events in its queue, so one decode step in SAMPLE_EVERY is timed. The
parts overlap (both devices compute at once) and do not add up. Knows nothing of requests.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .hybrid import HybridFFN, LayerTrace

if TYPE_CHECKING:
    from .layers import Layer

SAMPLE_EVERY = 32

# What `report` measures of a step, in seconds, and its name for readers.
HYBRID_PARTS = {
    "select_s": "attention and selection",
    "transfer_s": "transfer to the host",
    "gpu_s": "hot neurons, accelerator",
    "cpu_s": "cold neurons, host",
    "wait_s": "the host waits",
    "both_s": "both, until joined",
}


class HybridMeter:
    """`step` on the engine thread; `report` on any."""

    def __init__(self, layers: Sequence["Layer"], every: int = SAMPLE_EVERY) -> None:
        ffns = [layer.ffn for layer in layers if isinstance(layer.ffn, HybridFFN)]
        self._exchange = ffns[0].exchange if ffns else None  # all layers share one
        self._num_layers = len(ffns)
        self._every = every
        self._num_seen = 0
        self._num_timed = 0
        self._seconds: dict[str, float] = {}
        self._lock = threading.Lock()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around one decode step, up to where its tokens are on the host."""
        exchange = self._exchange
        self._num_seen += 1
        if exchange is None or self._num_seen % self._every:
            yield
            return
        exchange.traces = traces = list[LayerTrace]()
        try:
            yield
        finally:
            exchange.traces = None
        self._add(traces)

    def _add(self, traces: Sequence[LayerTrace]) -> None:
        befores = [None, *(trace.joined for trace in traces)]
        rows = [trace.seconds(before) for trace, before in zip(traces, befores, strict=False)]
        with self._lock:
            self._num_timed += 1
            for row in rows:
                for name, seconds in row.items():
                    self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def report(self) -> dict[str, Any] | None:
        """Seconds per decode step, summed over the hybrid layers: an estimate from the steps that
        were timed. None without such layers. `select_s` includes a layer's attention."""
        if self._exchange is None:
            return None
        with self._lock:
            per_step = {
                f"{name}_s": seconds / self._num_timed for name, seconds in self._seconds.items()
            }
            return {
                "timed_steps": self._num_timed,
                "every": self._every,
                "layers": self._num_layers,
                "per_step": per_step,
            }
