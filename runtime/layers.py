"""Builds the layers of a model: which attention and which FFN, from device, kernels and placement.

The one place where a backend is chosen for a layer. Owns nothing; the layers own their weights.
Dimensions: F neurons, D model width.
"""

from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from predictor import Predictor, PredictorSet

from .config import ModelConfig
from .ffn import FFN, DenseFFN, HybridFFN, SparseFFN
from .loader import FfnWeights, LayerWeights, ModelWeights
from .placement import Placement
from .torch_ops import TorchAttention

Kernels = Literal["cpu", "torch"]


class Attention(Protocol):
    def forward(self, x_ND: Tensor, kv: Any) -> None:
        """x += attention(rms_norm(x)), in place; appends one key and value to each cache."""


@dataclass(frozen=True)
class Layer:
    weights: LayerWeights
    attention: Attention
    ffn: FFN


@dataclass(frozen=True)
class LayerBuilder:
    """What every layer of one model has in common."""

    config: ModelConfig
    device: torch.device
    kernels: Kernels
    tables: tuple[Tensor, Tensor]  # cos, sin of the rotary embedding
    worker: Executor  # runs the cold halves
    predictors: PredictorSet | None
    placement: Placement | None

    @property
    def uses_cpp(self) -> bool:
        """Whether whole decode steps run in the C++ kernels."""
        return self.kernels == "cpu" and self.device.type == "cpu"

    def build(self, weights: ModelWeights) -> tuple[Layer, ...]:
        return tuple(
            Layer(layer, self._attention(l, layer), self._ffn(l, ffn))
            for l, (layer, ffn) in enumerate(zip(weights.layers, weights.ffns, strict=True))
        )

    def _attention(self, layer: int, weights: LayerWeights) -> Attention:
        matrices = (weights.attention_norm_D, weights.qkv_OD, weights.out_DO)
        if not self.uses_cpp:
            return TorchAttention(layer, *matrices, self.tables, self.config)
        from .kernels.cpu import CpuAttention

        return CpuAttention(
            layer,
            *matrices,
            *self.tables,
            num_heads=self.config.num_heads,
            num_kv_heads=self.config.num_kv_heads,
            eps=self.config.rms_eps,
        )

    def _ffn(self, layer: int, weights: FfnWeights) -> FFN:
        """Hot rows become the accelerator's block, the rest the host's; often one is empty."""
        F = self.config.num_neurons
        predictor = None if self.predictors is None else self.predictors.layers[layer]
        if self.placement is None:
            num_hot = 0 if self.device.type == "cpu" else F
        else:
            num_hot = self.placement.num_hot_L[layer]
            if predictor is not None:
                predictor = predictor.permuted(self.placement.order_LF[layer])
        if num_hot == 0 and self.device.type == "cpu":
            return self._cold(layer, weights, predictor, 0)
        if num_hot == F:
            return self._hot(layer, weights, predictor, F)
        hot = self._hot(layer, weights, predictor, num_hot)
        cold = self._cold(layer, weights, predictor, num_hot)
        return HybridFFN(hot, cold, self.worker)

    def _hot(
        self, layer: int, weights: FfnWeights, predictor: Predictor | None, stop: int
    ) -> DenseFFN:
        moved = None if predictor is None else predictor.rows(0, stop).to(self.device)
        part = weights.part(0, stop, self.device)
        return DenseFFN(part, self.config, layer, moved, is_hot=True)

    def _cold(
        self, layer: int, weights: FfnWeights, predictor: Predictor | None, start: int
    ) -> DenseFFN:
        F = self.config.num_neurons
        part = weights.part(start, F, torch.device("cpu"))
        rows = None if predictor is None else predictor.rows(start, F)
        if self.kernels == "torch":
            return DenseFFN(part, self.config, layer, rows)
        return SparseFFN(part, self.config, layer, rows)
