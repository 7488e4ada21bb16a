"""Measures decode speed of a model, alone or against dense, at a batch size. Greedy; the engine
must be idle. The same prompt and number of tokens in every mode, so that results can be compared.
"""

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter, time
from typing import Any

import torch

from .config import Mode
from .kv_cache import SequenceCache
from .model import Model
from .torch_ops import argmax

WARM_UP_STEPS = 3
LEAST_ROUNDS = 3  # below it there is no interval worth the name


@torch.inference_mode()
def measure_decode(
    model: Model,
    mode: Mode,
    batch: int,
    prompt_ids: Sequence[int],
    new_tokens: int,
    *,
    all_logits: bool = False,
) -> dict[str, Any]:
    """Time `new_tokens` steps of `batch` sequences after a warm-up; each step ends with argmax.

    `all_logits`: which greedy steps do without (head.py), and those do not that draw by chance.
    """
    capacity = len(prompt_ids) + new_tokens + WARM_UP_STEPS
    caches = [model.new_cache(capacity) for _ in range(batch)]
    start = perf_counter()
    first = [int(model.prefill(prompt_ids, cache, mode).argmax()) for cache in caches]
    prefill_s = perf_counter() - start
    ids, seconds = first, []
    for _ in range(WARM_UP_STEPS + new_tokens):
        start = perf_counter()
        ids = argmax(model.decode(ids, caches, mode, greedy=not all_logits)).tolist()
        seconds.append(perf_counter() - start)
    seconds = seconds[WARM_UP_STEPS:]
    return {
        "mode": mode,
        "batch": batch,
        "prompt_tokens": len(prompt_ids),
        "new_tokens": new_tokens,
        "tokens_per_s": batch * new_tokens / sum(seconds),
        "step_ms_median": 1e3 * statistics.median(seconds),
        "step_ms_max": 1e3 * max(seconds),
        "prefill_tokens_per_s": batch * len(prompt_ids) / prefill_s,
    }


def random_prompt(vocab_size: int, num_tokens: int) -> list[int]:
    """The same arbitrary tokens every time, for when no text is at hand."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocab_size, (num_tokens,), generator=generator).tolist()


@dataclass
class Comparison:
    """Decode speed of a mode against dense, in rounds of both, so that whatever slows the machine
    for a while slows both. `run()` computes one round per `next`; read the result at any time.

    Intervals are 95 %, Student's t over rounds; the speed-up's is of the rounds' log ratios. After
    `max_seconds` no round is begun, once there are LEAST_ROUNDS.
    """

    model: Model
    mode: Mode
    prompt_ids: Sequence[int]
    batch: int = 1
    rounds: int = 6
    round_tokens: int = 8
    max_seconds: float = 30.0
    started_at: float = field(default_factory=time)  # Unix time
    seconds: dict[Mode, list[float]] = field(default_factory=dict)  # per round
    is_done: bool = False
    error: str | None = None

    def run(self) -> Iterator[None]:
        start = perf_counter()
        caches = self._read_prompts()
        modes: list[Mode] = ["dense", self.mode] if self.mode != "dense" else ["dense"]
        self.seconds = {mode: [] for mode in modes}
        for mode in modes:
            self._decode(caches, mode, WARM_UP_STEPS)
        yield
        for i in range(self.rounds):
            for mode in modes if i % 2 else reversed(modes):
                self.seconds[mode].append(self._decode(caches, mode, self.round_tokens))
            yield
            if i + 1 >= LEAST_ROUNDS and perf_counter() - start > self.max_seconds:
                break
        self.is_done = True

    @torch.inference_mode()
    def _read_prompts(self) -> list[SequenceCache]:
        capacity = len(self.prompt_ids) + max(self.round_tokens, WARM_UP_STEPS)
        caches = [self.model.new_cache(capacity) for _ in range(self.batch)]
        for cache in caches:
            self.model.prefill(self.prompt_ids, cache, self.mode)
        return caches

    @torch.inference_mode()
    def _decode(self, caches: Sequence[SequenceCache], mode: Mode, num_tokens: int) -> float:
        """Seconds for so many steps behind the prompt."""
        for cache in caches:
            cache.length = len(self.prompt_ids)
        ids = [self.prompt_ids[-1]] * len(caches)
        start = perf_counter()
        for _ in range(num_tokens):
            ids = argmax(self.model.decode(ids, caches, mode, greedy=True)).tolist()
        return perf_counter() - start

    def report(self) -> dict[str, Any]:
        """What was measured up to now; None where nothing was."""
        speeds = {mode: self._speed(mode) for mode in list(self.seconds)}
        speedup, speedup_ci95 = self._speedup()
        return {
            "mode": self.mode,
            "batch": self.batch,
            "started_at": self.started_at,
            "rounds": min((len(row) for row in self.seconds.values()), default=0),
            "rounds_planned": self.rounds,
            "round_tokens": self.batch * self.round_tokens,
            "prompt_tokens": len(self.prompt_ids),
            "is_done": self.is_done,
            "error": self.error,
            "speeds": speeds,
            "speedup": speedup,
            "speedup_ci95": speedup_ci95,
        }

    def _speed(self, mode: Mode) -> dict[str, Any]:
        rates = [self.batch * self.round_tokens / s for s in self.seconds[mode]]
        mean, bounds = geometric_mean_t95(rates)
        tokens = len(rates) * self.batch * self.round_tokens
        return {"tokens_per_s": mean, "tokens_per_s_ci95": bounds, "tokens": tokens}

    def _speedup(self) -> tuple[float | None, list[float] | None]:
        if self.mode == "dense":
            return None, None
        # A round that is under way has one of its two halves.
        pairs = zip(self.seconds.get("dense", ()), self.seconds.get(self.mode, ()), strict=False)
        return geometric_mean_t95([dense / sparse for dense, sparse in pairs])


def geometric_mean_t95(values: Sequence[float]) -> tuple[float | None, list[float] | None]:
    """The mean and its two-sided 95 % interval, by Student's t on logarithms; None where there are
    no values, or fewer than LEAST_ROUNDS for an interval."""
    if not values:
        return None, None
    logs = [math.log(value) for value in values]
    mean = statistics.fmean(logs)
    if len(logs) < LEAST_ROUNDS:
        return math.exp(mean), None
    from scipy.stats import t

    half = float(t.ppf(0.975, len(logs) - 1)) * statistics.stdev(logs) / math.sqrt(len(logs))
    return math.exp(mean), [math.exp(mean - half), math.exp(mean + half)]
