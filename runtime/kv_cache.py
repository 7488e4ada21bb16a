"""Owns the memory of keys and values: one pool of blocks, shared out to sequences.

pool_BL2GTK = [block, layer, key or value, kv head, position in block, head width]: a block holds
BLOCK positions of all layers, and in it the keys of one head stand as one run for a kernel to read.
A sequence's positions are in the blocks of its table, in order. Blocks of prompts are kept for
sequences that begin alike (block_pool.py). Knows nothing of requests.
"""

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .block_pool import BlockPool, prompt_keys
from .config import ModelConfig

BLOCK = 32  # positions: 4 KiB of one head's keys at 64 bf16 values, and little left empty
MAX_ENDS = 32  # prompts whose last logits are kept: one for each float of the vocabulary


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
    keys: Sequence[bytes] = ()  # of its prompt's blocks
    beside: HostPool | None = None
    logits_V: Tensor | None = None  # of the prompt's last token, if all of it was found
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
    """The pool. `part` is how many tokens of a prompt are read at once.

    What a part's keys and values are, to the bit, depends on the tokens up to its end and on its
    bounds, for torch's products may round otherwise with another number of rows. So parts lie on a
    fixed grid, and prompts that begin alike share parts that were read whole. Equal prompts share
    all: with the last logits kept, nothing is left to read, and only a last block in use is copied.
    An answer is the same whether or not its prompt was found here.
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
        self._logits_V: dict[bytes, Tensor] = {}  # of prompts' last tokens; the oldest first
        self._pool_BL2GTK, self._beside = _new_pools(
            config, self.blocks.num_blocks, dtype, device, host_layers
        )

    @property
    def num_tokens(self) -> int:
        return self.blocks.num_blocks * BLOCK

    def keys(self, prompt_ids: Sequence[int], salt: str = "") -> list[bytes]:
        """The names of a prompt's blocks, for `open`; no name is the same under another salt."""
        return prompt_keys(prompt_ids, BLOCK, self.part, salt)

    def open(
        self, keys: Sequence[bytes], num_prompt: int, num_positions: int, *, spare: int
    ) -> SequenceCache | None:
        """A cache with room for `num_positions`, filled (its `length`) with what is kept of the
        prompt. Without keys nothing is looked up. None where `spare` blocks would not be left."""
        found, logits_V = self._find(keys, num_prompt)
        length = num_prompt if logits_V is not None else len(found) * BLOCK
        # It will write behind the prompt in its last block.
        has_to_copy = length % BLOCK > 0 and self.blocks.is_shared(found[-1])
        missing = blocks_for(num_positions) - len(found) + has_to_copy
        if missing + spare > self.blocks.num_available:
            self.blocks.release(found)
            return None
        taken = self.blocks.take(missing)
        if has_to_copy:
            self._copy(found[-1], taken[0])
            self.blocks.release([found.pop()])
        pool_BL2GTK, beside = self._pool_BL2GTK, self._beside
        return SequenceCache(pool_BL2GTK, found + taken, length, keys, beside, logits_V)

    def _find(self, keys: Sequence[bytes], num_prompt: int) -> tuple[list[int], Tensor | None]:
        """The blocks that are kept of a prompt, in use once more: of all of it, with its last
        logits, or of whole parts that leave something to read."""
        found = self.blocks.find(keys)
        logits_V = self._logits_V.get(keys[-1]) if keys else None
        if logits_V is not None and len(found) == len(keys):
            return found, logits_V
        blocks_per_part = self.part // BLOCK
        parts = min(len(found) // blocks_per_part, (num_prompt - 1) // self.part)
        self.blocks.release(found[parts * blocks_per_part :])
        return found[: parts * blocks_per_part], None

    def _copy(self, source: int, target: int) -> None:
        for pool_BL2GTK in self._pools:
            pool_BL2GTK[target] = pool_BL2GTK[source]

    @property
    def _pools(self) -> list[Tensor]:
        beside = [] if self._beside is None else [self._beside.pool_BL2GTK]
        return [self._pool_BL2GTK, *beside]

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
        if len(part) == self.part and cache.keys:
            self._keep(cache, range(part.start // BLOCK, part.stop // BLOCK))

    def keep_end(self, cache: SequenceCache, logits_V: Tensor) -> None:
        """Offer all of a prompt, which was just read to its end, to equal ones."""
        if cache.keys:
            self._keep(
                cache, range(cache.length // self.part * self.part // BLOCK, len(cache.keys))
            )
            self._logits_V.pop(cache.keys[-1], None)
            self._logits_V[cache.keys[-1]] = logits_V
            if len(self._logits_V) > MAX_ENDS:
                del self._logits_V[next(iter(self._logits_V))]

    def _keep(self, cache: SequenceCache, numbers: range) -> None:
        for i in numbers:
            self.blocks.keep(cache.block_ids[i], cache.keys[i])

    def close(self, cache: SequenceCache) -> None:
        """Give its blocks back; the cache must not be used any more."""
        self.blocks.release(cache.block_ids)
        cache.block_ids = []

    def forget_all(self) -> None:
        """Every block is free, whatever was known of it; no cache may be used any more."""
        self.blocks = BlockPool(self.blocks.num_blocks)
        self._logits_V.clear()


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
    pool_BL2GTK = _zeros((num_blocks, config.num_layers - num_host, *shape), dtype, device)
    if not host_layers:
        return pool_BL2GTK, None
    host = _zeros((num_blocks, num_host, *shape), dtype, torch.device("cpu"))
    return pool_BL2GTK, HostPool(host, host_layers)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """On the host, memory is taken from the system when it is first written to: most of a pool
    may never be."""
    if device.type != "cpu" or not math.prod(shape):
        return torch.zeros(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    return math.prod((config.num_layers, 2, config.num_kv_heads, config.head_dim, dtype.itemsize))
