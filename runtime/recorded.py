"""Decode steps of one sequence on an accelerator, recorded once and then run again as CUDA graphs.

A recorded step looks the same at every position: position and block table are tensors, and all
blocks are read behind a mask. A sequence's first steps run unrecorded, so short answers never pay
for it. Owns the recordings; a cache that goes takes its own along.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .accelerator import Accelerator, Program
from .config import Mode
from .kv_batch import HostKv, KvBatches
from .kv_cache import SequenceCache
from .torch_ops import CacheInPlace

STEPS_BEFORE = 4  # of a sequence, before its step is recorded


class Walk(Protocol):
    """Through all layers, from the residual stream to logits_NV; `runs`: tokens and their mode."""

    def __call__(
        self, x_ND: Tensor, kv: tuple[Any, HostKv], runs: list[tuple[slice, Mode]]
    ) -> Tensor: ...


@dataclass
class _Sequence:
    """What the steps of one sequence share."""

    x_1D: Tensor
    position_1: Tensor
    table_B: Tensor  # padded with blocks that are not the sequence's
    host_kv: HostKv
    position: int = -1  # what position_1 holds
    num_blocks: int = 0  # of table_B that hold
    num_steps: int = 0
    programs: dict[Mode, Program] = field(default_factory=dict)


class Recorder:
    def __init__(self, accelerator: Accelerator, batches: KvBatches, walk: Walk) -> None:
        self._accelerator, self._batches, self._walk = accelerator, batches, walk
        self._sequences: WeakKeyDictionary[SequenceCache, _Sequence] = WeakKeyDictionary()

    def decode(self, x_1D: Tensor, cache: SequenceCache, mode: Mode) -> Tensor:
        """logits_1V of one token; the next call overwrites them. Does not advance the cache."""
        kept = self._sequences.get(cache)
        if kept is None or len(cache.block_ids) > len(kept.table_B):
            kept = self._sequences[cache] = self._begin(x_1D, cache)
        if kept.num_blocks != len(cache.block_ids):
            kept.num_blocks = len(cache.block_ids)
            kept.table_B[: kept.num_blocks] = cache.table
        if kept.position != cache.length:
            kept.position_1.fill_(cache.length)
        kept.x_1D.copy_(x_1D, non_blocking=True)
        kept.host_kv.batch = self._batches.on_host([cache]).batch
        kept.num_steps += 1
        kept.position = cache.length + 1

        def work() -> Tensor:
            kv = CacheInPlace(cache, kept.position_1, kept.table_B, self._batches.tables)
            logits_NV = self._walk(kept.x_1D, (kv, kept.host_kv), [(slice(None), mode)])
            kept.position_1.add_(1)
            return logits_NV

        if mode not in kept.programs:
            if kept.num_steps <= STEPS_BEFORE:
                return work()
            kept.programs[mode] = self._accelerator.record(work)
        return kept.programs[mode].run()

    def _begin(self, x_1D: Tensor, cache: SequenceCache) -> _Sequence:
        """With room for twice the blocks that it has: most sequences are recorded once."""
        device = self._accelerator.device
        num_blocks = 1 << len(cache.block_ids).bit_length()
        return _Sequence(
            torch.empty_like(x_1D, device=device),
            torch.zeros(1, dtype=torch.int64, device=device),
            torch.zeros(num_blocks, dtype=torch.int64, device=device),
            HostKv(None),
        )
