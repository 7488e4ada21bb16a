"""Measures decode speed of a model in one mode, at a batch size. Greedy; the engine must be idle.

The same prompt and number of tokens in every mode, so that results can be compared.
"""

import statistics
from collections.abc import Sequence
from time import perf_counter
from typing import Any

import torch

from .config import Mode
from .model import Model

WARM_UP_STEPS = 3


@torch.inference_mode()
def measure_decode(
    model: Model, mode: Mode, batch: int, prompt_ids: Sequence[int], new_tokens: int
) -> dict[str, Any]:
    """Time `new_tokens` steps of `batch` sequences after a warm-up; each step ends with argmax."""
    capacity = len(prompt_ids) + new_tokens + WARM_UP_STEPS
    caches = [model.new_cache(capacity) for _ in range(batch)]
    start = perf_counter()
    first = [int(model.prefill(prompt_ids, cache, mode).argmax()) for cache in caches]
    prefill_s = perf_counter() - start
    ids, seconds = first, []
    for _ in range(WARM_UP_STEPS + new_tokens):
        start = perf_counter()
        ids = model.decode(ids, caches, mode).argmax(-1).tolist()
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
