"""Builds the layers of a model: which attention and which FFN, from device, kernels and placement.

The one place where a backend is chosen for a layer. Owns nothing; the layers own their weights.
Dimensions: F neurons, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from predictor import Predictor, PredictorSet

from .accelerator import Accelerator
from .checks import Kernels
from .config import ModelConfig
from .ffn import FFN, DenseFFN, SparseFFN
from .host_layers import HostAttention, HostFFN
from .hybrid import Exchange, HybridFFN
from .kv_batch import KvBatches
from .loader import FfnWeights, LayerWeights, ModelWeights
from .placement import Placement
from .streaming import Attention, Slot, StreamedAttention
from .torch_ops import TorchAttention

if TYPE_CHECKING:  # neither Triton nor the extension need be there
    from .kernels.cpu import HugePages
    from .kernels.cpu_layers import CpuLayers
    from .kernels.cuda import CudaSelector, DownBuffers
    from .kernels.cuda_decode import AttentionBuffers
    from .kernels.quantized import Weight

# Attention and selection on the accelerator come between two of the host's parts.
SPIN_MICROSECONDS = 500


@dataclass(frozen=True)
class Layer:
    weights: LayerWeights
    attention: Attention
    ffn: FFN
    is_on_host: bool = False  # beside an accelerator: the residual stream goes there for it

    def lent(self) -> AbstractContextManager[None]:
        """Around products with the attention's matrices that do not go through `attention`."""
        attention = self.attention
        return attention.lent() if isinstance(attention, StreamedAttention) else nullcontext()


@dataclass(frozen=True)
class LayerBuilder:
    """What every layer of one model has in common."""

    config: ModelConfig
    accelerator: Accelerator
    kernels: Kernels
    kv_batches: KvBatches
    predictors: PredictorSet | None
    placement: Placement | None
    max_batch: int  # tokens of a step: what the buffers between the sides hold

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def uses_cpp(self) -> bool:
        """Whether whole decode steps run in the C++ kernels."""
        return self.kernels == "cpu" and self.accelerator.runs_cpp

    @property
    def uses_triton(self) -> bool:
        """Whether what the accelerator has of a decode step runs in the Triton kernels."""
        return self.kernels == "cpu" and self.accelerator.runs_triton

    def build(self, weights: ModelWeights) -> tuple[Layer, ...]:
        """Moves what the placement wants moved."""
        if self.uses_triton:
            from .kernels import cpu

            cpu.set_spin_time(SPIN_MICROSECONDS)
        streamed = [l for l in range(self.config.num_layers) if self._home(l) == "streamed"]
        slot = Slot(self.accelerator, [weights.layers[l] for l in streamed]) if streamed else None
        layers = []
        for l, (layer, ffn) in enumerate(zip(weights.layers, weights.ffns, strict=True)):
            attention: Attention
            if self._home(l) == "host":
                attention = HostAttention(
                    self._attention(l, layer, is_on_host=True), self.accelerator
                )
                layers.append(Layer(layer, attention, self._host_ffn(l, ffn), is_on_host=True))
                continue
            if slot is not None and l in streamed:
                index = streamed.index(l)
                layer = replace(layer, qkv_OD=slot.matrices[0], out_DO=slot.matrices[1])
                layer = layer.to(self.device)  # the norms
                attention = StreamedAttention(self._attention(l, layer), slot, index)
            else:
                layer = layer.to(self.device)
                attention = self._attention(l, layer)
            layers.append(Layer(layer, attention, self._ffn(l, ffn)))
        return tuple(layers)

    def joined(self, layers: Sequence[Layer]) -> CpuLayers | None:
        """The layers' decode step as one call, where all of it is done by the C++ kernels."""
        if not self.uses_cpp:
            return None
        from .kernels.cpu import CpuAttention
        from .kernels.cpu_layers import CpuLayers

        attentions = [
            layer.attention for layer in layers if isinstance(layer.attention, CpuAttention)
        ]
        ffns = [layer.ffn.kernel for layer in layers if isinstance(layer.ffn, SparseFFN)]
        if not len(attentions) == len(ffns) == len(layers):
            return None
        norms = [layer.weights.ffn_norm_D for layer in layers]
        return CpuLayers(attentions, norms, ffns, self.config.rms_eps)

    def _home(self, layer: int) -> str:
        return "accelerator" if self.placement is None else self.placement.home_L[layer]

    def _place(self, layer: int) -> int:
        """Among the layers whose keys and values lie in the same pool."""
        side = self._home(layer) == "host"
        return sum((self._home(l) == "host") == side for l in range(layer))

    def _attention(self, layer: int, weights: LayerWeights, is_on_host: bool = False) -> Attention:
        matrices = (weights.attention_norm_D, weights.qkv_OD, weights.out_DO)
        if self.uses_triton and not is_on_host:
            return self._triton_attention(layer, *matrices)
        if not self.uses_cpp and not (is_on_host and self.kernels == "cpu"):
            return TorchAttention(layer, *matrices, self.config)
        from .kernels.cpu import CpuAttention

        return CpuAttention(
            self._place(layer),
            *matrices,
            *self.kv_batches.host_tables,
            num_heads=self.config.num_heads,
            num_kv_heads=self.config.num_kv_heads,
            eps=self.config.rms_eps,
        )

    def _triton_attention(
        self, layer: int, norm_D: Tensor, qkv_OD: Weight, out_DO: Weight
    ) -> Attention:
        from .kernels.cuda_decode import CudaAttention

        assert isinstance(qkv_OD, Tensor), "weights in 8 or 4 bits are for the host"
        return CudaAttention(
            self._place(layer),
            norm_D,
            qkv_OD,
            out_DO,
            *self.kv_batches.tables,
            num_heads=self.config.num_heads,
            num_kv_heads=self.config.num_kv_heads,
            eps=self.config.rms_eps,
            dtype=qkv_OD.dtype,
            buffers=self._attention_buffers,
        )

    @cached_property
    def _attention_buffers(self) -> AttentionBuffers:
        """One for all layers."""
        from .kernels.cuda_decode import AttentionBuffers

        c = self.config
        return AttentionBuffers(c.num_heads, c.num_kv_heads, c.head_dim, self.device)

    @cached_property
    def _down_buffers(self) -> DownBuffers:
        """One for all layers."""
        from .kernels.cuda import DownBuffers

        return DownBuffers.of(self.config.num_neurons, self.config.d_model, self.device)

    def _predictor(self, layer: int) -> Predictor | None:
        """Of all neurons, in the placement's order, on the host."""
        if self.predictors is None:
            return None
        predictor = self.predictors.layers[layer]
        if self.placement is None:
            return predictor
        return predictor.permuted(self.placement.order_LF[layer])

    def _num_hot(self, layer: int) -> int:
        if self.placement is None:
            return 0 if self.device.type == "cpu" else self.config.num_neurons
        return self.placement.num_hot_L[layer]

    def _ffn(self, layer: int, weights: FfnWeights) -> FFN:
        """Hot rows become the accelerator's block, the rest the host's; often one is empty."""
        F, num_hot, predictor = (
            self.config.num_neurons,
            self._num_hot(layer),
            self._predictor(layer),
        )
        if num_hot == 0 and self.device.type == "cpu":
            return self._cold(layer, weights, predictor, 0)
        moved = None if predictor is None else predictor.to(self.device)
        hot = self._hot(layer, weights, moved, num_hot) if num_hot else None
        if hot is not None and num_hot == F:
            return hot
        cold = self._cold(layer, weights, None, num_hot)
        return HybridFFN(hot, cold, moved, self._exchange, self._selector(moved))

    def _selector(self, predictor: Predictor | None) -> CudaSelector | None:
        if predictor is None or not self.uses_triton:
            return None
        from .kernels.cuda import CudaSelector

        return CudaSelector(predictor, self.device)

    def _host_ffn(self, layer: int, weights: FfnWeights) -> FFN:
        return HostFFN(self._cold(layer, weights, self._predictor(layer), 0), self.accelerator)

    @cached_property
    def _memory(self) -> HugePages:
        """One for all layers: each has less than a page."""
        from .kernels.cpu import HugePages

        return HugePages()

    @cached_property
    def _exchange(self) -> Exchange:
        """One for all layers."""
        placement = self.placement
        assert placement is not None, "only a placement splits layers"
        max_cold = self.config.num_neurons - min(placement.num_hot_L)
        return Exchange(self.accelerator, self.max_batch, self.config.d_model, max_cold)

    def _hot(
        self, layer: int, weights: FfnWeights, predictor: Predictor | None, stop: int
    ) -> DenseFFN:
        is_whole = stop == self.config.num_neurons  # the part of a layer is told what is selected
        own = predictor if is_whole else None
        part = weights.part(0, stop, self.device)
        if not self.uses_triton:
            return DenseFFN(part, self.config, layer, own, is_hot=True)
        from .cuda_ffn import CudaSparseFFN

        return CudaSparseFFN(part, self.config, layer, own, self._down_buffers)

    def _cold(
        self, layer: int, weights: FfnWeights, predictor: Predictor | None, start: int
    ) -> DenseFFN:
        part = weights.part(start, self.config.num_neurons, torch.device("cpu"))
        if self.kernels == "torch":
            return DenseFFN(part, self.config, layer, predictor)
        return SparseFFN(part, self.config, layer, predictor, self._memory.copy)
