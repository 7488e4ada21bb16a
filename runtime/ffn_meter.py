"""Adds up what the FFNs of all layers did in decode steps: which share of the neurons, in which
stages the time went. The kernels count every step; nothing is sampled.

Knows nothing of requests. Where no kernel counts (torch's products), there is nothing to report.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from .config import Mode

if TYPE_CHECKING:
    from .kernels.cpu import FfnUsage
    from .layers import Layer


@dataclass
class FfnTimes:
    """Seconds of the FFNs' calls by stage; `wait_s`: in which threads had nothing to do."""

    select_s: float = 0.0
    gate_s: float = 0.0
    up_down_s: float = 0.0
    wait_s: float = 0.0

    def add(self, usage: "FfnUsage") -> None:
        self.select_s += usage.select_s
        self.gate_s += usage.gate_s
        self.up_down_s += usage.up_down_s
        self.wait_s += usage.wait_s


@dataclass
class _Density:
    calls: int = 0  # of all layers
    selected: int = 0
    active: int = 0
    united: int = 0


class FfnMeter:
    """Any thread may ask. `collect` takes what the kernels counted since the last time."""

    def __init__(self, layers: Sequence["Layer"], num_neurons: int) -> None:
        self._layers = layers
        self._num_neurons = num_neurons
        self._lock = threading.Lock()
        self._times = [FfnTimes() for _ in layers]
        self._densities: dict[tuple[Mode, int], _Density] = {}
        self._counts_all = False
        self._is_paused = False

    def collect(self) -> None:
        with self._lock:
            self._take()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is decoded meanwhile is a measurement, not serving: it is not counted."""
        with self._lock:
            self._take()
            self._is_paused = True
        try:
            yield
        finally:
            with self._lock:
                for layer in self._layers:
                    layer.ffn.take_usage()
                self._is_paused = False

    def _take(self) -> None:
        if self._is_paused:
            return
        usages = [layer.ffn.take_usage() for layer in self._layers]
        self._counts_all = None not in usages
        for times, usage in zip(self._times, usages, strict=True):
            if usage is not None:
                times.add(usage)
                self._add_counts(usage)

    def times(self) -> dict[str, float] | None:
        """Of all layers together; None where not every layer counts."""
        self.collect()
        if not self._counts_all:
            return None
        rows = [asdict(times) for times in self._times]
        return {key: sum(row[key] for row in rows) for key in rows[0]}

    def layer_times(self) -> list[dict[str, float] | None]:
        self.collect()
        return [asdict(times) if self._counts_all else None for times in self._times]

    def densities(self) -> list[dict[str, Any]]:
        """For each mode and batch size that was run: which shares of a layer's neurons were
        selected and active by token, and active for at least one token of the step."""
        self.collect()
        if not self._counts_all:
            return []
        with self._lock:
            return [
                {
                    "mode": mode,
                    "batch": batch,
                    "steps": sums.calls // len(self._layers),
                    "tokens": batch * sums.calls // len(self._layers),
                    "selected_share": sums.selected / (batch * sums.calls * self._num_neurons),
                    "active_share": sums.active / (batch * sums.calls * self._num_neurons),
                    "united_share": sums.united / (sums.calls * self._num_neurons),
                }
                for (mode, batch), sums in sorted(self._densities.items())
            ]

    def _add_counts(self, usage: "FfnUsage") -> None:
        for row in usage.counts:
            sums = self._densities.setdefault((row.mode, row.batch), _Density())
            sums.calls += row.calls
            sums.selected += row.selected
            sums.active += row.active
            sums.united += row.united
