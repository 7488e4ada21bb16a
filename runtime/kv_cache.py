"""Owns the memory of keys and values: one pool of blocks, shared out to sequences.

pool_BL2GTK = [block, layer, key or value, kv head, position in block, head width]: a block holds
BLOCK positions of all layers, and in it the keys of one head stand as one run for a kernel to read.
A sequence's positions are in the blocks of its table, in order. Blocks that hold whole parts of
prompts are kept for other sequences that begin alike (block_pool.py). Knows nothing of requests.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .block_pool import BlockPool, block_keys
from .config import ModelConfig

BLOCK = 32  # positions: 4 KiB of one head's keys at 64 bf16 values, and little left empty


@dataclass(frozen=True, eq=False)
class HostPool:
    """A pool of the same blocks for the layers that attend on the host beside an accelerator."""

    pool_BL2GTK: Tensor
    layers: tuple[int, ...]


@dataclass(eq=False)
class SequenceCache:
    """Keys and values of one sequence; positions [0, length) are filled."""

    pool_BL2GTK: Tensor  # of the layers that attend where the model's device is
    block_ids: list[int]
    length: int = 0
    keys: list[bytes] = field(default_factory=list)  # of its prompt's whole blocks
    beside: HostPool | None = None
    table: Tensor = field(init=False)  # its block ids, int64, where the pool is
    host_table: Tensor = field(init=False)  # the same on the host

    def __post_init__(self) -> None:
        self._make_table()

    @property
    def capacity(self) -> int:
        """Positions that its blocks have room for."""
        return len(self.block_ids) * self.block_size

    @property
    def dtype(self) -> torch.dtype:
        return self.pool_BL2GTK.dtype

    @property
    def block_size(self) -> int:
        return self.pool_BL2GTK.shape[4]

    def add_blocks(self, block_ids: Sequence[int]) -> None:
        self.block_ids += block_ids
        self._make_table()

    def where(self, layer: int) -> tuple[Tensor, int, Tensor]:
        """(pool, the layer's place in it, table) of one layer."""
        if self.beside is None:
            return self.pool_BL2GTK, layer, self.table
        before = sum(host < layer for host in self.beside.layers)
        if layer in self.beside.layers:
            return self.beside.pool_BL2GTK, before, self.host_table
        return self.pool_BL2GTK, layer - before, self.table

    def write(self, layer: int, start: int, k_NGK: Tensor, v_NGK: Tensor) -> None:
        """Set positions [start, start + N) of one layer."""
        pool_BL2GTK, place, table = self.where(layer)
        position_N = torch.arange(start, start + len(k_NGK), device=table.device)
        block_N, row_N = table[position_N // self.block_size], position_N % self.block_size
        pool_BL2GTK[block_N, place, 0, :, row_N] = k_NGK.to(table.device)
        pool_BL2GTK[block_N, place, 1, :, row_N] = v_NGK.to(table.device)

    def read(self, layer: int, stop: int) -> Tensor:
        """kv_2GSK of one layer's positions [0, stop), copied out of their blocks."""
        pool_BL2GTK, place, table = self.where(layer)
        num_blocks = -(-stop // self.block_size)
        return join_blocks(pool_BL2GTK[table[:num_blocks], place])[:, :, :stop]

    def _make_table(self) -> None:
        self.host_table = torch.tensor(self.block_ids, dtype=torch.int64)
        self.table = self.host_table.to(self.pool_BL2GTK.device)


def join_blocks(kept_B2GTK: Tensor) -> Tensor:
    """kv_2GSK of one layer's blocks, in their order."""
    return kept_B2GTK.movedim(0, 2).flatten(2, 3)


class KVCache:
    """The pool. `part` is how many tokens of a prompt are read at once: prompts share whole parts.

    What a part's keys and values are, to the bit, depends on the tokens up to its end and on its
    bounds, for torch's products may round otherwise with another number of rows. So parts lie on a
    fixed grid, and only those that were read whole are shared: an answer is the same whether or not
    its prompt's beginning was found here.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        part: int,
        host_layers: tuple[int, ...] = (),
    ) -> None:
        assert part % BLOCK == 0, "a block belongs to one part"
        self.part = part
        self.blocks = BlockPool(blocks_for(num_tokens))
        self._pool_BL2GTK, self._beside = _new_pools(
            config, self.blocks.num_blocks, dtype, device, host_layers
        )

    @property
    def num_tokens(self) -> int:
        return self.blocks.num_blocks * BLOCK

    def open(
        self, prompt_ids: Sequence[int], num_positions: int, *, spare: int, share: bool = True
    ) -> SequenceCache | None:
        """A cache with room for `num_positions`, filled (its `length`) with what is kept of the
        prompt's beginning; never all of it. None where `spare` blocks would not be left."""
        keys = block_keys(prompt_ids, BLOCK)
        parts = (len(prompt_ids) - 1) // self.part if share else 0
        found = self.blocks.find(keys[: parts * self.part // BLOCK])
        num_shared = len(found) * BLOCK // self.part * self.part // BLOCK
        self.blocks.release(found[num_shared:])
        shared = found[:num_shared]
        missing = blocks_for(num_positions) - num_shared
        if missing + spare > self.blocks.num_available:
            self.blocks.release(shared)
            return None
        block_ids = shared + self.blocks.take(missing)
        return SequenceCache(self._pool_BL2GTK, block_ids, num_shared * BLOCK, keys, self._beside)

    def extend(self, cache: SequenceCache) -> bool:
        """Room for one more position, if it needs any; False where there is no block left."""
        if cache.length < cache.capacity:
            return True
        if not self.blocks.num_available:
            return False
        cache.add_blocks(self.blocks.take(1))
        return True

    def keep_part(self, cache: SequenceCache, part: range) -> None:
        """Offer what was just read of a prompt to other sequences, if it is a whole part."""
        if len(part) == self.part:
            for i in range(part.start // BLOCK, part.stop // BLOCK):
                self.blocks.keep(cache.block_ids[i], cache.keys[i])

    def close(self, cache: SequenceCache) -> None:
        """Give its blocks back; the cache must not be used any more."""
        self.blocks.release(cache.block_ids)
        cache.block_ids = []

    def forget_all(self) -> None:
        """Every block is free, whatever was known of it; no cache may be used any more."""
        self.blocks = BlockPool(self.blocks.num_blocks)


def blocks_for(num_positions: int) -> int:
    return -(-num_positions // BLOCK)


def new_cache(
    config: ModelConfig,
    capacity: int,
    dtype: torch.dtype,
    device: torch.device,
    host_layers: tuple[int, ...] = (),
) -> SequenceCache:
    """A cache in a pool of its own (measurements, tests)."""
    num_blocks = blocks_for(capacity)
    pool_BL2GTK, beside = _new_pools(config, num_blocks, dtype, device, host_layers)
    return SequenceCache(pool_BL2GTK, list(range(num_blocks)), beside=beside)


def _new_pools(
    config: ModelConfig,
    num_blocks: int,
    dtype: torch.dtype,
    device: torch.device,
    host_layers: tuple[int, ...],
) -> tuple[Tensor, HostPool | None]:
    """Of zeros: steps that read behind what is filled must find numbers there."""
    num_host = len(host_layers)
    shape = (2, config.num_kv_heads, BLOCK, config.head_dim)
    pool_BL2GTK = torch.zeros(
        (num_blocks, config.num_layers - num_host, *shape), dtype=dtype, device=device
    )
    if not host_layers:
        return pool_BL2GTK, None
    return pool_BL2GTK, HostPool(
        torch.zeros((num_blocks, num_host, *shape), dtype=dtype), host_layers
    )


def bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    return math.prod((config.num_layers, 2, config.num_kv_heads, config.head_dim, dtype.itemsize))
