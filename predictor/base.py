"""What every kind of predictor is to whoever stores, calibrates or serves it.

A predictor of one layer is a few tensors and a threshold: a neuron is selected where its score is
above. `score` is the definition that every faster implementation is held to.
Dimension key: N tokens, D model width, F neurons.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Predictor(ABC):
    """Says which neurons of one layer may fire, from the vector that the layer's FFN gets."""

    TENSORS: ClassVar[dict[str, str]]  # name in the file -> attribute
    PER_NEURON: ClassVar[tuple[str, ...]]  # attributes whose rows are neurons

    kind: str = field(kw_only=True)  # one of predictor.kinds.KINDS
    threshold: float = field(kw_only=True)  # one per layer, on the scores

    @property
    @abstractmethod
    def d_model(self) -> int:
        """Width of the vectors that are scored."""

    @property
    @abstractmethod
    def num_neurons(self) -> int:
        """How many neurons are scored."""

    @abstractmethod
    def score(self, x_ND: Tensor) -> Tensor:
        """score_NF in fp32: rises with the chance that the neuron fires."""

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors by the names they have in the file."""
        return {name: getattr(self, attribute) for name, attribute in self.TENSORS.items()}

    @property
    def num_bytes(self) -> int:
        """What one token has to read, and what the file holds."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    def select(self, x_ND: Tensor) -> Tensor:
        """mask_NF: the neurons to look at. A NaN score selects nothing."""
        return self.score(x_ND) > self.threshold

    def with_threshold(self, threshold: float) -> Self:
        return replace(self, threshold=float(threshold))

    def permuted(self, order_F: Tensor) -> Self:
        """The same predictor for a layer whose neuron i is the old neuron order_F[i]."""
        if not torch.equal(order_F.sort().values.cpu(), torch.arange(self.num_neurons)):
            raise ValueError(f"order_F must be a permutation of {self.num_neurons} neurons.")
        return self._each(self.PER_NEURON, lambda tensor: tensor[order_F].contiguous())

    def rows(self, start: int, stop: int) -> Self:
        """The predictor of neurons [start, stop) only; a view of this one's tensors."""
        return self._each(self.PER_NEURON, lambda tensor: tensor[start:stop])

    def to(self, device: torch.device | str) -> Self:
        """The same predictor with its tensors on `device`."""
        return self._each(tuple(self.TENSORS.values()), lambda tensor: tensor.to(device))

    def _each(self, attributes: tuple[str, ...], change: Callable[[Tensor], Tensor]) -> Self:
        changes: dict[str, Any] = {
            attribute: change(getattr(self, attribute)) for attribute in attributes
        }
        return replace(self, **changes)

    def _expect(self, expected: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        """Raises ValueError unless the attributes have these dtypes and shapes."""
        for name, (dtype, shape) in expected.items():
            tensor = getattr(self, name)
            if tensor.dtype != dtype or tuple(tensor.shape) != shape:
                raise ValueError(
                    f"{name} of a `{self.kind}` predictor must be {dtype} of shape {shape}, "
                    f"is {tensor.dtype} of shape {tuple(tensor.shape)}."
                )
