"""Attention with weights that lie in host memory: copied ahead of their use, while other layers
compute, into accelerator memory that all such layers take in turn.

Which layers these are is the placement's to say. Dimensions: N tokens, D model width, C rows of q,
k and v.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from .accelerator import Accelerator
from .loader import LayerWeights

if TYPE_CHECKING:  # the extension may not be built
    from .kernels.quantized import Weight


class Attention(Protocol):
    def forward(self, x_ND: Tensor, kv: Any) -> None:
        """x += attention(rms_norm(x)), in place; appends one key and value to each cache."""


class Slot:
    """Accelerator memory for one layer's attention weights, lent to streamed layers in turn.

    Each layer's matrices are one run of pinned host memory; the next layer's are on their way as
    soon as the last one has been used.
    """

    def __init__(self, accelerator: Accelerator, weights: Sequence[LayerWeights]) -> None:
        """`weights`: of the streamed layers, in their order, on the host."""
        self.accelerator = accelerator
        self._copies = accelerator.copy_stream()
        first = weights[0]
        qkv_OD, out_DO = _plain(first.qkv_OD), _plain(first.out_DO)
        self._split, self._shapes = qkv_OD.numel(), (qkv_OD.shape, out_DO.shape)
        size = qkv_OD.numel() + out_DO.numel()
        self._sources = [accelerator.host_buffer(size, dtype=qkv_OD.dtype) for _ in weights]
        for source, layer in zip(self._sources, weights, strict=True):
            for part, matrix in zip(
                self._matrices(source), (layer.qkv_OD, layer.out_DO), strict=True
            ):
                part.copy_(_plain(matrix))
        self._lent = torch.empty(size, dtype=qkv_OD.dtype, device=accelerator.device)
        self._holds: int | None = None

    @property
    def matrices(self) -> tuple[Tensor, Tensor]:
        """qkv_OD and out_DO of whichever layer has the slot."""
        return self._matrices(self._lent)

    def _matrices(self, run: Tensor) -> tuple[Tensor, Tensor]:
        qkv, out = run[: self._split], run[self._split :]
        return qkv.view(self._shapes[0]), out.view(self._shapes[1])

    def take(self, index: int) -> None:
        """The accelerator waits for this layer's weights from here on."""
        if self._holds != index:
            self._fetch(index)
        self._copies.join()

    def give_back(self, index: int) -> None:
        """Start fetching what comes after this layer."""
        self._fetch((index + 1) % len(self._sources))

    def _fetch(self, index: int) -> None:
        self._holds = index
        self._copies.copy(self._lent, self._sources[index])


def _plain(weight: Weight) -> Tensor:
    if isinstance(weight, Tensor):
        return weight
    raise TypeError("weights in 8 or 4 bits are not streamed")


class StreamedAttention:
    """Attention on the accelerator with weights from a slot."""

    def __init__(self, attention: Attention, slot: Slot, index: int) -> None:
        self._attention, self._slot, self._index = attention, slot, index

    def forward(self, x_ND: Tensor, kv: Any) -> None:
        with self.lent():
            self._attention.forward(x_ND, kv)

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Around whatever uses the layer's matrices."""
        on_host = self._slot.accelerator.on_host
        on_host(lambda: self._slot.take(self._index))
        yield
        on_host(lambda: self._slot.give_back(self._index))
