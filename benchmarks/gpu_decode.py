"""Whole decode steps of a model with random weights, built in the GPU's memory: what bench_gpu.py
calls `decode`. The model, its recorded steps and its caches are the runtime's own.
"""

import argparse
import statistics
import time
from dataclasses import replace
from typing import Any

import torch
from gpu_layers import Layer, make_layers, model_config
from gpu_timing import DEVICE, Results, relative_error, say
from torch import Tensor

from predictor import Predictor, PredictorSet
from runtime.config import Mode
from runtime.kernels.cuda import rms_norm
from runtime.kv_cache import SequenceCache
from runtime.loader import FfnWeights, LayerWeights, ModelWeights
from runtime.model import Model

WARM_UP_STEPS = 4  # compiling and recording among them


class TrueFfn:
    """In fp32, whatever PyTorch multiplies with."""

    def __init__(self, layer: Layer) -> None:
        self._layer = layer

    def add_to(self, x_ND: Tensor, norm_D: Tensor, eps: float, mode: Mode) -> None:
        x_ND += self._layer.true_ffn(rms_norm(x_ND, norm_D, eps))


class Models:
    """Of the same weights, with predictors of several kinds or with none."""

    def __init__(self, layers: list[Layer], args: argparse.Namespace) -> None:
        self._layers, self._args = layers, args
        D, generator = args.d_model, torch.Generator(DEVICE).manual_seed(1)

        def matrix(rows: int, columns: int, gain: float = 1.0) -> Tensor:
            values = torch.randn(rows, columns, generator=generator, device=DEVICE)
            return (values * gain / columns**0.5).bfloat16()

        norm_D = torch.ones(D, device=DEVICE)
        self._weights = ModelWeights(
            matrix(args.vocab, D, D**0.5),
            tuple(
                LayerWeights(norm_D, matrix(3 * D, D), matrix(D, D, 0.5), norm_D) for _ in layers
            ),
            tuple(FfnWeights(layer.gate_FD, layer.up_FD, layer.down_FD) for layer in layers),
            norm_D,
            matrix(args.vocab, D),
        )

    def model(self, predictors: list[Predictor] | None = None) -> Model:
        return Model(
            model_config(self._args, [layer.threshold for layer in self._layers]),
            self._weights,
            dtype=torch.bfloat16,
            device=DEVICE,
            kernels="cpu",
            predictors=None if predictors is None else PredictorSet(predictors),
            placement=None,
            max_context=self._args.context + 256,
        )

    def true_model(self) -> Model:
        model = self.model()
        model.layers = tuple(
            replace(layer, ffn=TrueFfn(weights))  # type: ignore[arg-type]
            for layer, weights in zip(model.layers, self._layers, strict=True)
        )
        return model

    def by_path(self) -> dict[str, tuple[Mode, Model]]:
        """The dense one first."""
        plain = self.model()
        return {
            "dense": ("dense", plain),
            "exact": ("exact", plain),
            f"predicted, mlp-{self._args.hidden}": (
                "predicted", self.model([layer.network for layer in self._layers]),
            ),
            "predicted, gate-int4": (
                "predicted", self.model([layer.copy for layer in self._layers]),
            ),
        }  # fmt: skip

    @property
    def num_bytes(self) -> int:
        """Of attention and head: what every path reads."""
        w = self._weights
        matrices = [w.head_VD, *(m for layer in w.layers for m in (layer.qkv_OD, layer.out_DO))]
        return sum(matrix.nbytes for matrix in matrices)


def filled_caches(model: Model, args: argparse.Namespace) -> list[SequenceCache]:
    caches = [model.new_cache(args.context + 256) for _ in range(max(args.batch))]
    for cache in caches:
        cache.pool_BL2GTK.normal_()
        cache.length = args.context
    return caches


def ids_of(num_tokens: int) -> list[int]:
    return list(range(7, 7 + num_tokens))


def step(model: Model, ids: list[int], caches: list[SequenceCache], mode: Mode) -> Tensor:
    """logits_NV; the caches are as long as before."""
    logits_NV = model.decode(ids, caches, mode)
    for cache in caches:
        cache.length -= 1
    return logits_NV


def measure_decode_steps(args: argparse.Namespace, results: Results) -> None:
    layers = make_layers(args, args.layers)
    say("making models")
    models = Models(layers, args)
    true_model = models.true_model()
    caches = filled_caches(true_model, args)
    by_path = models.by_path()
    dense_rows: dict[int, dict[str, float]] = {}
    for N in args.batch:
        ids, of_N = ids_of(N), caches[:N]
        truth_NV = step(true_model, ids, of_N, "dense").clone()
        for path, (mode, model) in by_path.items():
            error = relative_error(step(model, ids, of_N, mode), truth_NV)
            if path == "exact" and not error <= dense_rows[N]["logits_error"] + 1e-6:
                raise SystemExit(f"exact is further off than bf16 products: {error:.3g}; not timed")
            row: dict[str, Any] = {"logits_error": error}
            row |= _timed(model, ids, of_N, mode, 2 * args.repeats)
            if path == "dense":
                dense_rows[N] = row
            row["times_dense"] = row["tokens_per_s"] / dense_rows[N]["tokens_per_s"]
            results.add(measurement="decode", path=path, batch=N, layers=args.layers,
                        context=args.context, attention_and_head_bytes=models.num_bytes,
                        ffn_bytes=_ffn_bytes(model, mode), **row)  # fmt: skip
            say(f"decode {path:21} batch {N:2}: {row['tokens_per_s']:8.1f} tokens/s, "
                f"{row['times_dense']:.2f} x dense; step {row['step_ms']:.3f} ms; "
                f"logits {error:.1e} off")  # fmt: skip


def _timed(
    model: Model, ids: list[int], caches: list[SequenceCache], mode: Mode, steps: int
) -> dict[str, float]:
    """Greedy steps as an engine takes them: each waits for its tokens. Lengths are put back."""
    lengths = [cache.length for cache in caches]
    seconds = []
    for i in range(WARM_UP_STEPS + steps):
        if i == WARM_UP_STEPS:
            seconds.clear()
        start = time.perf_counter()
        ids = model.decode(ids, caches, mode).argmax(-1).tolist()
        seconds.append(time.perf_counter() - start)
        for cache, length in zip(caches, lengths, strict=True):
            cache.length = length + i % 100
    for cache, length in zip(caches, lengths, strict=True):
        cache.length = length
    step_s = statistics.median(seconds)
    return {"tokens_per_s": len(ids) / step_s, "step_ms": 1e3 * step_s,
            "step_ms_min": 1e3 * min(seconds), "step_ms_max": 1e3 * max(seconds)}  # fmt: skip


def _ffn_bytes(model: Model, mode: Mode) -> int:
    """If all neurons were active, with what a predictor reads."""
    kernels = [layer.ffn.kernel for layer in model.layers]  # type: ignore[attr-defined]
    matrices = sum(3 * kernel.gate.data.nbytes for kernel in kernels)
    if mode != "predicted":
        return matrices
    return matrices + sum(kernel.selector.predictor.num_bytes for kernel in kernels)
