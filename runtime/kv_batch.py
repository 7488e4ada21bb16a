"""Where the keys and values of a step's tokens live, in the form that the attention blocks take.

There may be two sides: the model's device, and the host beside it for the layers that a placement
left there. Dimensions: S positions, K head width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .config import ModelConfig
from .kv_cache import SequenceCache
from .torch_ops import CacheBatch, rope_tables


@dataclass
class HostKv:
    """The host's side of a step: another object in every run of a recorded step."""

    batch: Any


class KvBatches:
    """Makes them; owns the tables of the rotary embedding."""

    def __init__(
        self,
        config: ModelConfig,
        device: torch.device,
        max_context: int,
        *,
        has_host_layers: bool,
        uses_cpp: bool,
        uses_triton: bool,
        has_cpp: bool,
    ) -> None:
        """By the C++ kernels attend: `uses_cpp` layers on the model's device, `has_cpp` those on
        the host beside it. `uses_triton`: the former by the Triton kernels."""
        self._has_host_layers = has_host_layers
        self._uses_cpp, self._uses_triton, self._has_cpp = uses_cpp, uses_triton, has_cpp
        self.host_tables = rope_tables(config.rope, config.head_dim, max_context)
        self.tables: tuple[Tensor, Tensor] = (
            self.host_tables[0].to(device), self.host_tables[1].to(device),
        )  # fmt: skip

    def of(self, caches: Sequence[SequenceCache]) -> tuple[Any, HostKv]:
        """(on the model's device, on the host beside it)."""
        pools = [cache.pool_BL2GTK for cache in caches]
        if not pools[0].shape[1]:  # every layer is on the host beside it
            return None, self.on_host(caches)
        if self._uses_cpp:
            return _cpp_batch(pools, caches), self.on_host(caches)
        if self._uses_triton:
            return _triton_batch(pools, caches), self.on_host(caches)
        return CacheBatch(caches, self.tables), self.on_host(caches)

    def on_host(self, caches: Sequence[SequenceCache]) -> HostKv:
        if not self._has_host_layers:
            return HostKv(None)
        if not self._has_cpp:
            return HostKv(CacheBatch(caches, self.host_tables))
        pools = [cache.beside.pool_BL2GTK for cache in caches if cache.beside is not None]
        return HostKv(_cpp_batch(pools, caches))


def _cpp_batch(pools: list[Tensor], caches: Sequence[SequenceCache]) -> Any:
    from .kernels.cpu import KvBatch

    tables, positions = [c.host_table for c in caches], [c.length for c in caches]
    return KvBatch(pools, tables, positions)


def _triton_batch(pools: list[Tensor], caches: Sequence[SequenceCache]) -> Any:
    from .kernels.cuda_decode import KvBatch

    return KvBatch.of(pools, [c.table for c in caches], [c.length for c in caches])
