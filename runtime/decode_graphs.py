"""Decode steps as CUDA graphs: one for each mode and batch size, replayed for any sequences.

A step of a model has hundreds of kernels, and starting them one by one takes longer than running
them. What changes from step to step (token ids, where the caches are, positions) is read from
buffers that keep their place. A step of fewer sequences than its graph has is filled up with a
sequence of its own that nobody reads.
Dimensions: N tokens, V vocabulary.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import Mode
from .kernels.cuda_decode import KvBatch, kv_table
from .kv_cache import SequenceCache

log = logging.getLogger(__name__)
SIZES = (1, 2, 4, 8, 16)
WARM_UP_RUNS = 2  # compile the kernels and make the libraries' handles: neither can be captured

Step = Callable[[Tensor, KvBatch, Mode], Tensor]  # ids_N, where, mode -> logits_NV; all queued


@dataclass(frozen=True)
class Captured:
    graph: torch.cuda.CUDAGraph
    inputs_4N: Tensor  # int64: token ids, then KvBatch's table
    host_inputs_4N: Tensor  # pinned
    logits_NV: Tensor


class DecodeGraphs:
    """`run` must do the same work for any ids and caches, and never wait for the device."""

    def __init__(self, run: Step, spare: SequenceCache, device: torch.device) -> None:
        """`spare` is a cache of capacity 1 or more that belongs to no sequence."""
        self._run, self._spare, self._device = run, spare, device
        self._captured: dict[tuple[int, Mode], Captured] = {}

    def decode(self, ids: Sequence[int], caches: Sequence[SequenceCache], mode: Mode) -> Tensor:
        """logits_NV of one token for each sequence, valid until the next call; at most SIZES[-1].
        Appends to the caches and leaves their lengths alone."""
        N = len(ids)
        step = self.captured(N, mode)
        inputs_4N = step.host_inputs_4N
        torch.cuda.current_stream(self._device).synchronize()  # the last step's copy has been read
        inputs_4N[0, :N] = torch.tensor(ids)
        inputs_4N[1:, :N] = kv_table(
            [c.pool_BL2GTK for c in caches],
            [c.table for c in caches],
            [c.length for c in caches],
        )
        self._fill_up(inputs_4N, N)
        step.inputs_4N.copy_(inputs_4N, non_blocking=True)
        step.graph.replay()
        return step.logits_NV[:N]

    def _fill_up(self, inputs_4N: Tensor, start: int) -> None:
        """Columns from `start` on: token 0 at position 0 of the spare cache."""
        inputs_4N[0, start:] = 0
        inputs_4N[1:, start:] = kv_table([self._spare.pool_BL2GTK], [self._spare.table], [0])

    def captured(self, num_tokens: int, mode: Mode) -> Captured:
        """The graph that runs this many tokens; made when it is first asked for."""
        size = next(size for size in SIZES if size >= num_tokens)
        if (size, mode) not in self._captured:
            self._captured[size, mode] = self._capture(size, mode)
        return self._captured[size, mode]

    def _capture(self, size: int, mode: Mode) -> Captured:
        host_inputs_4N = torch.zeros(4, size, dtype=torch.int64).pin_memory()
        self._fill_up(host_inputs_4N, 0)
        inputs_4N = host_inputs_4N.to(self._device)
        _, num_layers, _, _, block_size, _ = self._spare.pool_BL2GTK.shape
        kv = KvBatch(inputs_4N[1:], num_layers, block_size)
        side = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            for _ in range(WARM_UP_RUNS):
                self._run(inputs_4N[0], kv, mode)
        torch.cuda.current_stream(self._device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits_NV = self._run(inputs_4N[0], kv, mode)
        log.info("captured a CUDA graph for %d sequences, mode %s", size, mode)
        return Captured(graph, inputs_4N, host_inputs_4N, logits_NV)
