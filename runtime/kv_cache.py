"""Owns the memory of keys and values: a budget in tokens, one contiguous tensor per sequence.

Layout of a sequence's tensor: kv_L2GSK = [layer, key or value, kv head, position, head width], so a
kernel reads the keys of one head as one run. A sequence gets the room it can ever need when it is
admitted, or none: nothing running is ever evicted. Knows nothing of requests.
"""

from dataclasses import dataclass

import torch

from .config import ModelConfig


@dataclass(eq=False)
class SequenceCache:
    """Keys and values of one sequence; positions [0, length) are filled."""

    kv_L2GSK: torch.Tensor
    length: int = 0

    @property
    def capacity(self) -> int:
        return self.kv_L2GSK.shape[3]


class KVCache:
    """Hands out `SequenceCache`s while the budget of `num_tokens` positions lasts."""

    def __init__(
        self, config: ModelConfig, num_tokens: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.num_tokens = num_tokens
        self.free_tokens = num_tokens
        self._config, self._dtype, self._device = config, dtype, device

    def can_allocate(self, capacity: int) -> bool:
        return capacity <= self.free_tokens

    def allocate(self, capacity: int) -> SequenceCache:
        assert self.can_allocate(capacity), (capacity, self.free_tokens)
        cache = new_cache(self._config, capacity, self._dtype, self._device)
        self.free_tokens -= capacity
        return cache

    def free(self, cache: SequenceCache) -> None:
        self.free_tokens += cache.capacity
        assert self.free_tokens <= self.num_tokens, "a cache was freed twice"


def new_cache(
    config: ModelConfig, capacity: int, dtype: torch.dtype, device: torch.device
) -> SequenceCache:
    """A cache outside any budget (measurements, tests)."""
    shape = (config.num_layers, 2, config.num_kv_heads, capacity, config.head_dim)
    return SequenceCache(torch.empty(shape, dtype=dtype, device=device))


def bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    return config.num_layers * 2 * config.num_kv_heads * config.head_dim * dtype.itemsize
