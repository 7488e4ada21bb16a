"""Counters of the engine: where the time goes, what was done, how fast it is now.

Written by the engine thread only; readers take a snapshot. Knows nothing of requests or tensors.
"""

import time
from collections import deque
from dataclasses import asdict, dataclass, field

LIVE_STEPS = 64  # decode steps that the live speed looks back on


@dataclass
class StepTimes:
    """Seconds spent in each part of the engine's work. 'other' is the steps' remainder."""

    prefill_s: float = 0.0
    attention_s: float = 0.0
    ffn_s: float = 0.0
    head_s: float = 0.0
    sample_s: float = 0.0
    audit_s: float = 0.0
    other_s: float = 0.0


@dataclass
class Totals:
    requests: int = 0
    finished: int = 0
    aborted: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0


@dataclass
class Stats:
    """Owns every counter of one engine."""

    times: StepTimes = field(default_factory=StepTimes)
    totals: Totals = field(default_factory=Totals)
    speeds: dict[str, dict[str, float | int | str]] = field(default_factory=dict)
    started_at: float = field(default_factory=time.monotonic)
    _live: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=LIVE_STEPS))

    def add_decode_step(self, num_tokens: int, seconds: float) -> None:
        """`seconds` without the audit: what the step would have taken unobserved."""
        self._live.append((num_tokens, seconds))

    @property
    def uptime_s(self) -> float:
        return time.monotonic() - self.started_at

    @property
    def live_tokens_per_s(self) -> float | None:
        """Decoded tokens of all sequences per second over the last steps; None before any."""
        steps = list(self._live)
        seconds = sum(s for _, s in steps)
        return sum(n for n, _ in steps) / seconds if seconds > 0 else None

    def time_split(self) -> dict[str, float]:
        return asdict(self.times)
