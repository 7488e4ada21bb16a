"""A Llama-family model: token ids to logits. Owns the weights, which never change after loading.

Two ways through the layers:
- a prompt is read by torch products, dense in every mode: the union of what a hundred tokens fire
  is nearly all neurons, and the same keys and values in all modes make exact equal dense;
- a decode step, one token for each of N sequences, uses the mode, by our kernels (`kernels='cpu'`:
  C++ on the host, Triton on a GPU) or by torch on any device (`kernels='torch'`, the definition).

Knows nothing of requests, sampling or text.
Dimensions: N tokens, D model width, F neurons, V vocabulary, L layers, H query heads, G kv heads,
K head width.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import torch
from torch import Tensor

from predictor import PredictorSet

from .accelerator import new_accelerator
from .checks import NOT_SPARSE, Kernels, check_quantizable
from .config import Mode, ModelConfig, mode_runs
from .errors import InvalidConfig, UnsupportedModel
from .head import Head
from .host_layers import Residual
from .kv_batch import HostKv, KvBatches
from .kv_cache import SequenceCache, new_cache
from .layers import LayerBuilder
from .loader import ModelWeights, load_weights
from .placement import Placement
from .recorded import MAX_RECORDED, Recorder
from .stats import StepTimes
from .torch_ops import (
    apply_rope,
    attention_prefill,
    linear,
    rms_norm,
    split_heads,
)

ForwardTap = Callable[[int, Tensor, Tensor], None]  # layer, FFN input x_ND, h_NF = act(gate) * up
ResidualTap = Callable[[int, Tensor], None]  # layer, residual stream before the FFN's norm
DecodeTap = Callable[[int, Tensor], None]  # layer, FFN input x_ND
DEFAULT_MAX_BATCH = 64  # sequences of one step, where the model was not told
LayerMode = Callable[[int, Mode], Mode]  # layer, the model's mode -> the layer's


class Model:
    """Immutable after construction, but for thresholds that the drift guard lowers; safe to call
    from one thread at a time.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: ModelWeights,
        *,
        dtype: torch.dtype,
        device: torch.device,
        kernels: Kernels,
        predictors: PredictorSet | None,
        placement: Placement | None,
        max_context: int,
        max_batch: int = DEFAULT_MAX_BATCH,
    ) -> None:
        """`weights`: rows in the order of the placement, matrices on the host or where it wants
        them."""
        self.config, self.dtype, self.device, self.kernels = config, dtype, device, kernels
        self.max_context = max_context
        self.placement = placement
        self.has_predictors = predictors is not None
        self._embed_VD = weights.embed_VD
        self._down_FDs = [ffn.down_FD for ffn in weights.ffns]
        self.host_layers = () if placement is None else placement.host_layers
        self.accelerator = new_accelerator(device)
        self._uses_cpp = kernels == "cpu" and self.accelerator.runs_cpp
        self._uses_triton = kernels == "cpu" and self.accelerator.runs_triton
        self._kv_batches = KvBatches(
            config, device, max_context, has_host_layers=bool(self.host_layers),
            uses_cpp=self._uses_cpp, uses_triton=self._uses_triton, has_cpp=kernels == "cpu",
        )  # fmt: skip
        norm_D, head_VD = weights.norm_D.to(device), weights.head_VD.to(device)
        self._head = Head(norm_D, head_VD, config.rms_eps, uses_cpp=self._uses_cpp)
        builder = LayerBuilder(
            config, self.accelerator, kernels, self._kv_batches, predictors, placement, max_batch,
        )  # fmt: skip
        self.weight_bytes = weights.num_bytes()
        self.weight_bytes["embeddings"] += self._head.screen_bytes
        self.layers = builder.build(weights)
        self._joined_layers = builder.joined(self.layers)
        self._residual = Residual(
            self.accelerator, max_batch if self.host_layers else 0, config.d_model
        )
        self._recorder = Recorder(self.accelerator, self._kv_batches, self._walk)

    @cached_property
    def down_norm_LF(self) -> Tensor:
        """The norm of each neuron's down row, in the order of this model's neurons."""
        return torch.stack([down_FD.float().norm(dim=1) for down_FD in self._down_FDs])

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
        weight_bits: Literal[8, 4] | None = None,
        max_batch: int = DEFAULT_MAX_BATCH,
    ) -> "Model":
        """`kernels` decides how one-token steps are computed; forward() and prefill() are torch.

        `weight_bits` rounds the matrices while they are loaded (kernels/quantized.py).
        """
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
        if weight_bits is not None:
            check_quantizable(config, torch.device(device), kernels)
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        device = torch.device(device)
        weights = load_weights(
            Path(folder),
            config,
            dtype,
            device,
            None if placement is None else placement.order_LF,
            weight_bits,
            huge_pages=kernels == "cpu" and (device.type == "cpu" or placement is not None),
            kept_layers=() if placement is None else placement.layers_kept_on_host,
            keeps_embedding=placement is not None,
        )
        return cls(
            config,
            weights,
            dtype=dtype,
            device=device,
            kernels=kernels,
            predictors=predictors,
            placement=placement,
            max_context=min(max_context or config.max_positions, config.max_positions),
            max_batch=max_batch,
        )

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
        return new_cache(self.config, capacity, self.dtype, self.device, self.host_layers)

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
        """Read a prompt, or its next part, into a cache: logits_V of the last token, or logits_NV.

        Dense whatever the mode (see the module's docstring).
        """
        self.check_mode(mode)
        x_ND = self._read(ids_N, "dense", cache, None)
        cache.length += len(x_ND)
        return self._head.logits(x_ND) if all_logits else self._head.logits(x_ND[-1:])[0]

    @torch.inference_mode()
    def forward(
        self,
        ids_N: Sequence[int] | Tensor,
        mode: Mode = "dense",
        tap: ForwardTap | None = None,
        all_logits: bool = True,
        prompt_N: Tensor | None = None,
        residual_tap: ResidualTap | None = None,
        layer_mode: LayerMode | None = None,
    ) -> Tensor:
        """All positions of one text at once, no cache kept; for recording and evaluation.

        In mode predicted a position's FFN keeps only the neurons that the predictor selects, as a
        decode step does; positions where the bool `prompt_N` is True run dense, as prompts do. The
        tap sees each layer's FFN input and its true activations, the residual tap what the FFN's
        norm reads; neither may write to what it gets. `layer_mode` gives layers modes of their own.
        """
        self.check_mode(mode)
        x_ND = self._read(ids_N, mode, None, tap, prompt_N, residual_tap, layer_mode)
        return self._head.logits(x_ND if all_logits else x_ND[-1:])

    @torch.inference_mode()
    def decode(
        self,
        ids_N: Sequence[int] | Tensor,
        caches: Sequence[SequenceCache],
        mode: Mode | Sequence[Mode] = "dense",
        *,
        times: StepTimes | None = None,
        tap: DecodeTap | None = None,
        layer_mode: LayerMode | None = None,
        greedy: bool = False,
    ) -> Tensor:
        """One token for each sequence: logits_NV. Adds to each cache. The tap's time is audit.

        `greedy`: only which token is the likeliest will be asked (Head.greedy_logits).
        Tokens may have modes of their own. The FFN is called once for each run of one mode, so
        those of one mode should stand together.
        """
        runs = mode_runs([mode] * len(caches) if isinstance(mode, str) else mode)
        for _, run_mode in runs:
            self.check_mode(run_mode)
        x_ND = self._embed(ids_N)
        is_plain = tap is None and layer_mode is None and len(runs) == 1
        is_plain &= len(self.host_layers) < len(self.layers)  # else there is nothing to record
        if self._uses_triton and is_plain and len(caches) <= MAX_RECORDED:
            logits_NV = self._recorder.decode(x_ND, caches, runs[0][1])
        else:
            kv = self._kv_batches.of(caches)
            logits_NV = self._walk(x_ND, kv, runs, times, tap, layer_mode, greedy)
        for cache in caches:
            cache.length += 1
        return logits_NV

    def _walk(
        self,
        x_ND: Tensor,
        kv: tuple[Any, HostKv],
        runs: list[tuple[slice, Mode]],
        times: StepTimes | None = None,
        tap: DecodeTap | None = None,
        layer_mode: LayerMode | None = None,
        greedy: bool = False,
    ) -> Tensor:
        """A decode step through all layers: logits_NV. `kv`: where layers attend on the model's
        device, and where on the host beside it."""
        times = times or StepTimes()
        eps = self.config.rms_eps
        x_ND = self._residual.begin(x_ND)
        layers = self.layers
        if self._joined_layers is not None and tap is None and layer_mode is None:
            attention_s, ffn_s = self._joined_layers.forward(x_ND, kv[0], runs)
            times.attention_s += attention_s
            times.ffn_s += ffn_s
            layers = ()
        for l, layer in enumerate(layers):
            start = perf_counter()
            x_ND = self._residual.bring(x_ND, to_host=layer.is_on_host)
            layer.attention.forward(x_ND, kv[layer.is_on_host])
            attended = tapped = perf_counter()
            if tap is not None:
                tap(l, rms_norm(x_ND, layer.weights.ffn_norm_D, eps))
                tapped = perf_counter()
            for rows, run_mode in runs:
                ffn_mode = run_mode if layer_mode is None else layer_mode(l, run_mode)
                layer.ffn.add_to(x_ND[rows], layer.weights.ffn_norm_D, eps, ffn_mode)
            times.attention_s += attended - start
            times.audit_s += tapped - attended
            times.ffn_s += perf_counter() - tapped
        start = perf_counter()
        x_ND = self._residual.bring(x_ND, to_host=False)
        logits_NV = self._head.greedy_logits(x_ND) if greedy else self._head.logits(x_ND)
        times.head_s += perf_counter() - start
        return logits_NV

    def _embed(self, ids_N: Sequence[int] | Tensor) -> Tensor:
        """Rows of the embedding, fp32, where it lies."""
        table_VD = self._embed_VD
        device = table_VD.device if isinstance(table_VD, Tensor) else None
        return table_VD[torch.as_tensor(ids_N, dtype=torch.int64, device=device)].float()

    def _read(
        self,
        ids_N: Sequence[int] | Tensor,
        mode: Mode,
        cache: SequenceCache | None,
        tap: ForwardTap | None,
        prompt_N: Tensor | None = None,
        residual_tap: ResidualTap | None = None,
        layer_mode: LayerMode | None = None,
    ) -> Tensor:
        """The residual stream after the last layer: of a whole text, or of what a cache is to get
        behind what it has."""
        start = 0 if cache is None else cache.length
        end = start + len(ids_N)
        config, eps = self.config, self.config.rms_eps
        cos_NK, sin_NK = (table_SK[start:end] for table_SK in self._kv_batches.tables)
        x_ND = self._embed(ids_N).to(self.device)
        for l, layer in enumerate(self.layers):
            w = layer.weights
            with layer.lent():
                normed_ND = rms_norm(x_ND, w.attention_norm_D, eps)
                q_NHK, k_NGK, v_NGK = split_heads(linear(normed_ND, w.qkv_OD), config)
                q_NHK = apply_rope(q_NHK, cos_NK, sin_NK).to(self.dtype)
                k_NGK = apply_rope(k_NGK, cos_NK, sin_NK).to(self.dtype)
                v_NGK = v_NGK.to(self.dtype)
                k_GSK, v_GSK = k_NGK.transpose(0, 1), v_NGK.transpose(0, 1)
                if cache is not None:
                    cache.write(l, start, k_NGK, v_NGK)
                    k_GSK, v_GSK = cache.read(l, end).to(self.device)
                x_ND += linear(attention_prefill(q_NHK, k_GSK, v_GSK), w.out_DO)
            if residual_tap is not None:
                residual_tap(l, x_ND)
            normed_ND = rms_norm(x_ND, w.ffn_norm_D, eps)
            ffn_mode = mode if layer_mode is None else layer_mode(l, mode)
            y_ND, h_NF = layer.ffn.prefill(normed_ND, ffn_mode)
            if prompt_N is not None and ffn_mode != "dense":
                y_ND[prompt_N] = layer.ffn.prefill(normed_ND[prompt_N], "dense")[0]
            if tap is not None:
                tap(l, normed_ND, h_NF)
            x_ND += y_ND
        return x_ND
