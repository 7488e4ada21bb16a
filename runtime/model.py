"""A Llama-family model: token ids to logits. Owns the weights, which never change after loading.

Two ways through the layers:
- a prompt is read by torch products, dense in every mode: the union of what a hundred tokens fire
  is nearly all neurons, and the same keys and values in all modes make exact equal dense;
- a decode step, one token for each of N sequences, uses the mode, by the C++ kernels on the host
  (`kernels='cpu'`) or by torch on any device (`kernels='torch'`, the definition).

Knows nothing of requests, sampling or text.
Dimensions: N tokens, D model width, F neurons, V vocabulary, L layers, H query heads, G kv heads,
K head width.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from predictor import MlpPredictor, PredictorSet

from .config import Mode, ModelConfig
from .errors import InvalidConfig, UnsupportedModel
from .ffn import FFN, DenseFFN, HybridFFN, SiluFFN, SparseFFN
from .kv_cache import SequenceCache, new_cache
from .loader import FfnWeights, LayerWeights, load_weights
from .placement import Placement
from .stats import StepTimes
from .torch_ops import (
    TorchAttention,
    apply_rope,
    attention_prefill,
    linear,
    rms_norm,
    rope_tables,
    split_heads,
)

Kernels = Literal["cpu", "torch"]
ForwardTap = Callable[[int, Tensor, Tensor], None]  # layer, FFN input x_ND, h_NF = act(gate) * up
DecodeTap = Callable[[int, Tensor], None]  # layer, FFN input x_ND


class Attention(Protocol):
    def forward(self, x_ND: Tensor, kv: Any) -> None:
        """x += attention(rms_norm(x)), in place; appends one key and value to each cache."""


@dataclass(frozen=True)
class Layer:
    weights: LayerWeights
    attention: Attention
    ffn: FFN


class Model:
    """Immutable after construction; safe to call from one thread at a time.

    `down_norm_LF` is the norm of each neuron's down row, in the order of this model's neurons.
    """

    def __init__(
        self,
        config: ModelConfig,
        folder: Path,
        *,
        dtype: torch.dtype,
        device: torch.device,
        kernels: Kernels,
        predictors: PredictorSet | None,
        placement: Placement | None,
        max_context: int,
    ) -> None:
        order_LF = None if placement is None else placement.order_LF
        weights = load_weights(folder, config, dtype, device, order_LF)
        self.config, self.dtype, self.device, self.kernels = config, dtype, device, kernels
        self.max_context = max_context
        self.placement = placement
        self.has_predictors = predictors is not None
        self._embed_VD, self._norm_D, self._head_VD = (
            weights.embed_VD, weights.norm_D, weights.head_VD,
        )  # fmt: skip
        self._tables = rope_tables(config.rope, config.head_dim, max_context, device)
        self._uses_cpp = kernels == "cpu" and device.type == "cpu"
        self.down_norm_LF = torch.stack([ffn.down_FD.float().norm(dim=1) for ffn in weights.ffns])
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="cold-ffn")
        self.layers = tuple(
            Layer(w, self._attention(l, w), self._ffn(l, ffn, predictors))
            for l, (w, ffn) in enumerate(zip(weights.layers, weights.ffns, strict=True))
        )

    @classmethod
    def from_folder(
        cls,
        folder: Path | str,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | str = torch.bfloat16,
        kernels: Kernels = "torch",
        predictors: PredictorSet | None = None,
        placement: Placement | None = None,
        max_context: int | None = None,
    ) -> "Model":
        """`kernels` decides how one-token steps are computed; forward() and prefill() are torch."""
        config = ModelConfig.from_folder(folder)
        if predictors is not None:
            if len(predictors.layers) != config.num_layers:
                raise InvalidConfig(
                    f"there are {len(predictors.layers)} predictors for {config.num_layers} "
                    "layers; train them again with `train-predictors`"
                )
            if not config.is_sparse:
                raise UnsupportedModel(NOT_SPARSE.format(name=config.activation))
        if placement is not None:
            placement.check_fits(config.num_layers, config.num_neurons)
        return cls(
            config,
            Path(folder),
            dtype=getattr(torch, dtype) if isinstance(dtype, str) else dtype,
            device=torch.device(device),
            kernels=kernels,
            predictors=predictors,
            placement=placement,
            max_context=min(max_context or config.max_positions, config.max_positions),
        )

    # -- building ---------------------------------------------------------------------------------

    def _attention(self, layer: int, weights: LayerWeights) -> Attention:
        if not self._uses_cpp:
            return TorchAttention(
                layer, weights.attention_norm_D, weights.qkv_OD, weights.out_DO,
                self._tables, self.config,
            )  # fmt: skip
        from .kernels.cpu import CpuAttention

        return CpuAttention(
            layer, weights.attention_norm_D, weights.qkv_OD, weights.out_DO, *self._tables,
            num_heads=self.config.num_heads,
            num_kv_heads=self.config.num_kv_heads,
            eps=self.config.rms_eps,
        )  # fmt: skip

    def _ffn(self, layer: int, weights: FfnWeights, predictors: PredictorSet | None) -> FFN:
        """Hot rows become the accelerator's block, the rest the host's; often one is empty."""
        F = self.config.num_neurons
        predictor = None if predictors is None else predictors.layers[layer]
        host = torch.device("cpu")
        if self.placement is None:
            num_hot = 0 if self.device.type == "cpu" else F
        else:
            num_hot = self.placement.num_hot_L[layer]
            if predictor is not None:
                predictor = predictor.permuted(self.placement.order_LF[layer])

        def on_accelerator(stop: int) -> DenseFFN:
            part = _rows_of(predictor, 0, stop)
            moved = None if part is None else part.to(self.device)
            return DenseFFN(weights.part(0, stop, self.device), self.config, moved, is_hot=True)

        def on_host(start: int) -> DenseFFN:
            part = weights.part(start, F, host)
            if self.kernels == "torch":
                return DenseFFN(part, self.config, _rows_of(predictor, start, F))
            if not self.config.is_sparse:
                return SiluFFN(part, self.config)
            return SparseFFN(part, self.config, _rows_of(predictor, start, F))

        if num_hot == 0 and self.device.type == "cpu":
            return on_host(0)
        if num_hot == F:
            return on_accelerator(F)
        return HybridFFN(on_accelerator(num_hot), on_host(num_hot), self._worker)

    # -- facts ------------------------------------------------------------------------------------

    def check_mode(self, mode: Mode) -> None:
        """Raise, with the way out, when this model cannot run in `mode`."""
        if mode == "dense":
            return
        if not self.config.is_sparse:
            raise UnsupportedModel(NOT_SPARSE.format(name=self.config.activation))
        if mode == "predicted" and not self.has_predictors:
            raise InvalidConfig(
                "mode predicted needs predictors; make them with `train-predictors`, or use exact"
            )

    @property
    def num_hot_L(self) -> list[int]:
        return [layer.ffn.num_hot for layer in self.layers]

    def new_cache(self, capacity: int) -> SequenceCache:
        """A cache of its own, outside the engine's budget."""
        return new_cache(self.config, capacity, self.dtype, self.device)

    # -- running ----------------------------------------------------------------------------------

    @torch.inference_mode()
    def prefill(
        self,
        ids_N: Sequence[int] | Tensor,
        cache: SequenceCache,
        mode: Mode = "dense",
        *,
        all_logits: bool = False,
    ) -> Tensor:
        """Read a whole prompt into an empty cache; logits_V of the last token, or all logits_NV.

        Dense whatever the mode (see the module's docstring).
        """
        self.check_mode(mode)
        assert cache.length == 0, "a prompt is read at once, into an empty cache"
        x_ND = self._read(self._ids(ids_N), "dense", cache, None)
        cache.length = len(x_ND)
        return self._logits(x_ND) if all_logits else self._logits(x_ND[-1:])[0]

    @torch.inference_mode()
    def forward(
        self,
        ids_N: Sequence[int] | Tensor,
        mode: Mode = "dense",
        tap: ForwardTap | None = None,
        all_logits: bool = True,
    ) -> Tensor:
        """All positions of one text at once, no cache kept; for recording and evaluation.

        In mode predicted every position's FFN keeps only the neurons that the predictor selects, as
        a decode step does. The tap sees each layer's FFN input and its true activations.
        """
        self.check_mode(mode)
        x_ND = self._read(self._ids(ids_N), mode, None, tap)
        return self._logits(x_ND if all_logits else x_ND[-1:])

    @torch.inference_mode()
    def decode(
        self,
        ids_N: Sequence[int] | Tensor,
        caches: Sequence[SequenceCache],
        mode: Mode = "dense",
        *,
        times: StepTimes | None = None,
        tap: DecodeTap | None = None,
    ) -> Tensor:
        """One token for each sequence: logits_NV. Adds to each cache. The tap's time is audit."""
        self.check_mode(mode)
        times = times or StepTimes()
        x_ND = self._embed_VD[self._ids(ids_N)].float()
        kv = self._kv_batch(caches)
        eps = self.config.rms_eps
        for l, layer in enumerate(self.layers):
            start = perf_counter()
            layer.attention.forward(x_ND, kv)
            attended = tapped = perf_counter()
            if tap is not None:
                tap(l, rms_norm(x_ND, layer.weights.ffn_norm_D, eps))
                tapped = perf_counter()
            layer.ffn.add_to(x_ND, layer.weights.ffn_norm_D, eps, mode)
            times.attention_s += attended - start
            times.audit_s += tapped - attended
            times.ffn_s += perf_counter() - tapped
        start = perf_counter()
        logits_NV = self._decode_logits(x_ND)
        times.head_s += perf_counter() - start
        for cache in caches:
            cache.length += 1
        return logits_NV

    def _ids(self, ids_N: Sequence[int] | Tensor) -> Tensor:
        return torch.as_tensor(ids_N, dtype=torch.int64, device=self.device)

    def _kv_batch(self, caches: Sequence[SequenceCache]) -> Any:
        """What the attention blocks of this backend take."""
        if not self._uses_cpp:
            return caches
        from .kernels.cpu import KvBatch

        return KvBatch([c.kv_L2GSK for c in caches], [c.length for c in caches])

    def _decode_logits(self, x_ND: Tensor) -> Tensor:
        if not self._uses_cpp:
            return self._logits(x_ND)
        from .kernels.cpu import norm_linear

        return norm_linear(x_ND, self._norm_D, self.config.rms_eps, self._head_VD)

    def _logits(self, x_ND: Tensor) -> Tensor:
        return linear(rms_norm(x_ND, self._norm_D, self.config.rms_eps), self._head_VD)

    def _read(
        self, ids_N: Tensor, mode: Mode, cache: SequenceCache | None, tap: ForwardTap | None
    ) -> Tensor:
        """The residual stream of a whole text after the last layer."""
        N = len(ids_N)
        config, eps = self.config, self.config.rms_eps
        cos_NK, sin_NK = self._tables[0][:N], self._tables[1][:N]
        x_ND = self._embed_VD[ids_N].float()
        for l, layer in enumerate(self.layers):
            w = layer.weights
            normed_ND = rms_norm(x_ND, w.attention_norm_D, eps)
            q_NHK, k_NGK, v_NGK = split_heads(linear(normed_ND, w.qkv_OD), config)
            q_NHK = apply_rope(q_NHK, cos_NK, sin_NK).to(self.dtype)
            k_NGK = apply_rope(k_NGK, cos_NK, sin_NK).to(self.dtype)
            v_NGK = v_NGK.to(self.dtype)
            if cache is not None:
                cache.kv_L2GSK[l, 0, :, :N] = k_NGK.transpose(0, 1)
                cache.kv_L2GSK[l, 1, :, :N] = v_NGK.transpose(0, 1)
            x_ND += linear(attention_prefill(q_NHK, k_NGK, v_NGK), w.out_DO)
            normed_ND = rms_norm(x_ND, w.ffn_norm_D, eps)
            y_ND, h_NF = layer.ffn.prefill(normed_ND, mode)
            if tap is not None:
                tap(l, normed_ND, h_NF)
            x_ND += y_ND
        return x_ND


def _rows_of(predictor: MlpPredictor | None, start: int, stop: int) -> MlpPredictor | None:
    """The predictor of neurons [start, stop) only."""
    if predictor is None:
        return None
    return replace(
        predictor,
        fc2_q_FR=predictor.fc2_q_FR[start:stop],
        fc2_scale_F=predictor.fc2_scale_F[start:stop],
        bias_F=predictor.bias_F[start:stop],
    )


NOT_SPARSE = (
    "the model's activation is {name}: no neuron is ever exactly zero, so only mode dense exists; "
    "make a sparse model of it with `hotneuron prosparse`"
)
