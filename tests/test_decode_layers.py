"""All layers of a decode step in one call: the bits of layer by layer, and what it refuses."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from predictor import fingerprint, load_predictors
from runtime.config import Mode
from runtime.kernels import cpu
from runtime.kernels.cpu_layers import CpuLayers
from runtime.model import Model
from runtime.stats import StepTimes
from runtime.torch_ops import argmax

PROMPTS = ([5, 6, 7], [9, 10, 11, 12, 13], [14])
MODES: tuple[Mode, ...] = ("dense", "exact", "predicted")


@pytest.fixture(params=[None, 8, 4], ids=["bf16", "int8", "int4"])
def model(make_sparse_model: Callable[..., Path], request: pytest.FixtureRequest) -> Model:
    folder = make_sparse_model("gate")
    predictors = load_predictors(folder / "sparsity", fingerprint=fingerprint(folder))
    return Model.from_folder(
        folder, kernels="cpu", predictors=predictors, weight_bits=request.param
    )


def step(model: Model, modes: list[Mode], *, layer_by_layer: bool) -> tuple[Tensor, list[Tensor]]:
    """Logits of one token behind each prompt, and the caches it wrote to."""
    caches = [model.new_cache(16) for _ in PROMPTS]
    for prompt, cache in zip(PROMPTS, caches, strict=True):
        model.prefill(prompt, cache)
    inputs: list[Tensor] = []
    tap = (lambda _, x_ND: inputs.append(x_ND)) if layer_by_layer else None
    logits_NV = model.decode([1, 2, 3], caches, modes, tap=tap)
    assert len(inputs) == (len(model.layers) if layer_by_layer else 0)
    return logits_NV, [cache.pool_BL2GTK.float() for cache in caches]


@pytest.mark.parametrize("modes", [[m] * 3 for m in MODES] + [list(MODES)], ids=str)
def test_one_call_has_the_bits_of_layer_by_layer(model: Model, modes: list[Mode]) -> None:
    joined_NV, joined_pools = step(model, modes, layer_by_layer=False)
    apart_NV, apart_pools = step(model, modes, layer_by_layer=True)
    assert torch.equal(joined_NV, apart_NV)
    for joined, apart in zip(joined_pools, apart_pools, strict=True):
        assert torch.equal(joined.nan_to_num(7), apart.nan_to_num(7))


def test_time_is_given_to_attention_and_ffn(model: Model) -> None:
    cache, times = model.new_cache(16), StepTimes()
    model.prefill([1, 2], cache)
    model.decode([3], [cache], "exact", times=times)
    assert times.attention_s > 0
    assert times.ffn_s > 0
    assert times.audit_s == 0


def test_what_does_not_fit_is_refused(model: Model) -> None:
    joined = model._joined_layers
    assert joined is not None
    cache = model.new_cache(16)
    kv = model._kv_batches.of([cache] * 2)[0]
    x_ND = torch.zeros(2, model.config.d_model)
    for runs in ([], [(slice(0, 1), "dense")], [(slice(0, 3), "dense")],
                 [(slice(1, 2), "dense"), (slice(0, 1), "exact")],
                 [(slice(0, 2), "dense"), (slice(1, 2), "dense")]):  # fmt: skip
        with pytest.raises(ValueError, match="must cover all tokens"):
            joined.forward(x_ND, kv, runs)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mode must be 'dense', 'exact' or 'predicted'"):
        joined.forward(x_ND, kv, [(slice(0, 2), "sparse")])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="x_ND must be of shape"):
        joined.forward(x_ND[:, 1:].contiguous(), kv, [(slice(0, 2), "dense")])
    with pytest.raises(ValueError, match="one attention, norm and FFN per layer"):
        CpuLayers([], [], [], 1e-5)
    layers = model.layers
    attentions, ffns = ([getattr(layer, part) for layer in layers] for part in ("attention", "ffn"))
    norms = [layer.weights.ffn_norm_D for layer in layers]
    with pytest.raises(ValueError, match="one attention, norm and FFN per layer"):
        CpuLayers(attentions, norms[1:], [ffn.kernel for ffn in ffns], 1e-5)
    narrow = cpu.CpuFfn(*(torch.zeros(8, model.config.d_model // 2) for _ in range(3)))
    with pytest.raises(ValueError, match="one width"):
        CpuLayers(attentions[:1], norms[:1], [narrow], 1e-5)


def test_argmax_is_the_first_largest_and_finds_what_is_not_a_number() -> None:
    nan = float("nan")
    rows = [[1.0, 3.0, 3.0], [1.0, nan, 9.0], [-torch.inf] * 3, [0.0, torch.inf, nan]]
    assert argmax(torch.tensor(rows)).tolist() == [1, 1, 0, 2]
