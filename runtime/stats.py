"""Counters of the engine: where the time goes, what was done, how fast it is now.

Written by the engine thread only; readers take a snapshot. Knows nothing of models or tensors.
"""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from .config import Mode
from .sequence import TokenEvent

if TYPE_CHECKING:
    from .speed import Comparison

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

    @property
    def total(self) -> float:
        return float(sum(vars(self).values()))


@dataclass
class Totals:
    requests: int = 0
    finished: int = 0
    aborted: int = 0
    failed: int = 0
    prompt_tokens: int = 0  # read: not those in the prefix cache, and again after a preemption
    generated_tokens: int = 0
    preemptions: int = 0
    prefix_queried_tokens: int = 0  # of prompts that were looked up in the prefix cache
    prefix_hit_tokens: int = 0  # of them, those that were found


@dataclass
class Served:
    """Decode steps of one mode and batch size; their seconds leave the audit out."""

    steps: int = 0
    seconds: float = 0.0


@dataclass
class Stats:
    """Owns every counter of one engine."""

    times: StepTimes = field(default_factory=StepTimes)
    totals: Totals = field(default_factory=Totals)
    decode_steps: int = 0
    prompt_steps: int = 0
    comparison: "Comparison | None" = None  # the last one that was begun
    measured: "Comparison | None" = None  # the last one that came to its end
    started_at: float = field(default_factory=time.monotonic)
    served: dict[tuple[str, int], Served] = field(default_factory=dict)  # by mode and batch size
    _live: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=LIVE_STEPS))

    @contextmanager
    def step(self, mode_N: Sequence[Mode]) -> Iterator[None]:
        """Around one step; `mode_N` are the modes of the tokens it decodes: none for a prompt.

        Speeds leave the audit out: they are what the step would have taken unobserved.
        """
        before, audit_before, start = self.times.total, self.times.audit_s, time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        self.times.other_s += seconds - (self.times.total - before)
        if not mode_N:
            self.prompt_steps += 1
            return
        self.decode_steps += 1
        seconds -= self.times.audit_s - audit_before
        self._live.append((len(mode_N), seconds))
        mode = mode_N[0] if len(set(mode_N)) == 1 else "mixed"
        served = self.served.setdefault((mode, len(mode_N)), Served())
        served.steps += 1
        served.seconds += seconds

    def count(self, event: TokenEvent) -> None:
        totals = self.totals
        totals.generated_tokens += event.token_id is not None
        totals.finished += event.finish_reason in ("stop", "length")
        totals.aborted += event.finish_reason == "abort"
        totals.failed += event.finish_reason == "error"

    @property
    def uptime_s(self) -> float:
        return time.monotonic() - self.started_at

    @property
    def live_tokens_per_s(self) -> float | None:
        """Decoded tokens of all sequences per second over the last steps; None before any."""
        steps = list(self._live)
        seconds = sum(s for _, s in steps)
        return sum(n for n, _ in steps) / seconds if seconds > 0 else None

    def served_speeds(self) -> list[dict[str, Any]]:
        """Tokens per second of all sequences together, by mode and batch size, while serving."""
        return [
            {
                "mode": mode,
                "batch": batch,
                "steps": served.steps,
                "tokens_per_s": batch * served.steps / served.seconds,
            }
            for (mode, batch), served in sorted(self.served.items())
            if served.seconds > 0
        ]

    def time_split(self) -> dict[str, float]:
        return asdict(self.times)
