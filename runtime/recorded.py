"""Decode steps on an accelerator, recorded once and then run again as CUDA graphs.

A step of a model has hundreds of kernels, and starting them one by one takes longer than running
them. What changes from step to step (vectors, where the caches are, positions) is read from tensors
that keep their place, so a recording serves any sequences: there is one for each number of them and
mode. A step of a kind that was not seen before runs unrecorded, so what comes once does not pay.
Dimensions: N tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from .accelerator import Accelerator, Program
from .config import Mode
from .kv_batch import HostKv, KvBatches
from .kv_cache import SequenceCache

if TYPE_CHECKING:  # Triton may not be installed
    from .kernels.cuda_decode import KvBatch

MAX_RECORDED = 16  # sequences of a recorded step; the products of more take longer than starting


class Walk(Protocol):
    """Through all layers, from the residual stream to logits_NV; `runs`: tokens and their mode."""

    def __call__(
        self, x_ND: Tensor, kv: tuple[Any, HostKv], runs: list[tuple[slice, Mode]]
    ) -> Tensor: ...


@dataclass
class _Step:
    """What every step of one mode and number of tokens reads."""

    x_ND: Tensor
    kv: KvBatch
    host_kv: HostKv
    program: Program | None = None


class Recorder:
    """For layers that attend by the Triton kernels: they find caches by their addresses."""

    def __init__(self, accelerator: Accelerator, batches: KvBatches, walk: Walk) -> None:
        self._accelerator, self._batches, self._walk = accelerator, batches, walk
        self._steps: dict[tuple[int, Mode], _Step] = {}

    def decode(self, x_ND: Tensor, caches: Sequence[SequenceCache], mode: Mode) -> Tensor:
        """logits_NV of a token for each; the next call overwrites them. Does not advance the
        caches."""
        kv, host_kv = self._batches.of(caches)
        step = self._steps.get((len(caches), mode))
        is_new = step is None
        if step is None:
            own_x_ND = torch.empty_like(x_ND, device=self._accelerator.device)
            step = self._steps[len(caches), mode] = _Step(own_x_ND, kv, HostKv(None))
        step.x_ND.copy_(x_ND, non_blocking=True)
        step.kv.table_3N.copy_(kv.table_3N)
        step.host_kv.batch = host_kv.batch

        def work() -> Tensor:
            return self._walk(step.x_ND, (step.kv, step.host_kv), [(slice(None), mode)])

        if is_new:
            return work()
        if step.program is None:
            step.program = self._accelerator.record(work)
        return step.program.run()
