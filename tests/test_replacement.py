"""Neurons move between accelerator and host while serving; what layers compute stays the same."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from predictor import MlpPredictor
from runtime.accelerator import HostAccelerator
from runtime.audit import Audit
from runtime.config import ModelConfig
from runtime.ffn import DenseFFN, SparseFFN
from runtime.hybrid import Exchange, HybridFFN
from runtime.loader import FfnWeights
from runtime.model import Model
from runtime.placement import Placement
from runtime.replacement import Replacement, exchanges

D, MODES = 32, ("dense", "exact", "predicted")
MakeModel = Callable[..., Path]


def config_of(F: int) -> ModelConfig:
    return ModelConfig.from_hf(
        {
            "num_hidden_layers": 1, "hidden_size": D, "intermediate_size": F, "vocab_size": 8,
            "num_attention_heads": 1, "hidden_act": "relu", "eos_token_id": 1,
        }
    )  # fmt: skip


def whole_numbers(*shape: int, seed: int) -> torch.Tensor:
    """Sums of their products are exact in fp32, in any order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 4, shape, generator=generator).float()


def split_of(F: int, num_hot: int, order_F: torch.Tensor, seed: int) -> tuple[HybridFFN, DenseFFN]:
    """(split, whole) FFNs of the same neurons, with a predictor that misses some."""
    config = config_of(F)
    rows = [whole_numbers(F, D, seed=seed + i) for i in range(3)]
    scores = MlpPredictor.from_float(
        whole_numbers(6, D, seed=seed + 3), torch.zeros(6), whole_numbers(F, 6, seed=seed + 4),
        torch.zeros(F), 5.0,
    )  # fmt: skip
    whole = DenseFFN(FfnWeights(*rows), config, 0, scores)
    ordered = FfnWeights(*(matrix[order_F] for matrix in rows))
    device = torch.device("cpu")
    hot = DenseFFN(ordered.part(0, num_hot, device), config, 0, is_hot=True) if num_hot else None
    cold = SparseFFN(ordered.part(num_hot, F, device), config, 0)
    exchange = Exchange(HostAccelerator(), 8, D, F)
    return HybridFFN(hot, cold, scores.permuted(order_F), exchange), whole


@settings(max_examples=40)
@given(
    F=st.integers(2, 90), share=st.floats(0, 1), tokens=st.integers(1, 8),
    seed=st.integers(0, 1000), mode=st.sampled_from(MODES), moves=st.integers(0, 20),
)  # fmt: skip
def test_hot_plus_cold_is_the_whole_to_the_bit(
    F: int, share: float, tokens: int, seed: int, mode: str, moves: int
) -> None:
    """Any permutation, any split, any batch; before neurons move and after."""
    num_hot = min(F - 1, round(share * F))
    generator = torch.Generator().manual_seed(seed)
    order_F = torch.randperm(F, generator=generator)
    split, whole = split_of(F, num_hot, order_F, seed)
    x_ND = whole_numbers(tokens, D, seed=seed + 9)
    expected_ND = whole.forward(x_ND, mode)
    assert torch.equal(split.forward(x_ND, mode), expected_ND)
    assert torch.equal(split.select(x_ND), whole.select(x_ND)[:, order_F])
    moves = min(moves, num_hot, F - num_hot)
    if not moves:
        return
    hot = torch.randperm(num_hot, generator=generator)[:moves]
    cold = num_hot + torch.randperm(F - num_hot, generator=generator)[:moves]
    split.exchange_neurons(hot, cold)
    order_F[hot], order_F[cold] = order_F[cold].clone(), order_F[hot].clone()
    assert torch.equal(split.forward(x_ND, mode), expected_ND)
    assert torch.equal(split.select(x_ND), whole.select(x_ND)[:, order_F])
    assert torch.equal(split.activations(x_ND), whole.activations(x_ND)[:, order_F])


def test_which_neurons_change_places() -> None:
    counts_F = torch.tensor([9, 0, 5, 5, 8, 6, 0])
    assert exchanges(counts_F, 3) == [(1, 4)], "6 is not enough more than 5"
    assert exchanges(counts_F, 0) == []
    assert exchanges(torch.zeros(6, dtype=torch.int64), 3) == []
    assert exchanges(torch.tensor([0, 0, 4, 4]), 2) == [(0, 2), (1, 3)]


def test_what_fires_now_becomes_hot(make_sparse_model: MakeModel) -> None:
    folder = make_sparse_model("all", hidden_act_param=0.3)
    order_LF = torch.stack([torch.randperm(160) for _ in range(3)])
    placement = Placement(order_LF.clone(), (40, 160, 20))
    arguments = {"dtype": "float32", "kernels": "cpu"}
    whole = Model.from_folder(folder, **arguments)
    split = Model.from_folder(folder, **arguments, placement=placement)
    audit = Audit(split, 1.0)
    replacement = Replacement(split, audit, every_tokens=40)
    caches = [model.new_cache(80) for model in (whole, split)]
    moved = 0
    for n, token in enumerate(torch.randint(0, 256, (80,)).tolist()):
        expected_NV = whole.decode([token], caches[:1], "exact")
        logits_NV = split.decode([token], caches[1:], "exact", tap=audit.tap(["one"]))
        torch.testing.assert_close(logits_NV, expected_NV, rtol=1e-4, atol=1e-4)
        before = replacement.apply_if_due()
        assert not before or (n + 1) % 40 == 0
        moved += before
    assert moved > 10
    assert split.num_hot_L == [40, 160, 20]
    assert split.placement is not None
    now_LF = split.placement.order_LF
    assert torch.equal(now_LF.sort(dim=1).values, torch.arange(160).expand(3, 160))
    assert torch.equal(now_LF[1], order_LF[1]), "a layer that is not split keeps its order"
    for l in (0, 2):
        fired_F, num_hot = audit.fired_LF[l], split.num_hot_L[l]
        assert fired_F[:num_hot].float().mean() > 1.5 * fired_F[num_hot:].float().mean()
        order_F = now_LF[l]
        assert torch.equal(split.down_norm_LF[l], whole.down_norm_LF[l][order_F])
        x_ND = torch.randn(3, 64)
        torch.testing.assert_close(
            split.layers[l].ffn.activations(x_ND),
            whole.layers[l].ffn.activations(x_ND)[:, order_F],
            rtol=1e-4, atol=1e-5,
        )  # fmt: skip


def test_nothing_is_counted_without_split_layers(make_sparse_model: MakeModel) -> None:
    model = Model.from_folder(make_sparse_model("all"), kernels="torch")
    replacement = Replacement(model, Audit(model, 1.0), every_tokens=1)
    replacement.count(0, torch.ones(5, 160))
    assert replacement.apply_if_due() == 0


def test_low_bit_rows_stay_where_they_are() -> None:
    from runtime.kernels.quantized import QuantizedMatrix

    split, _ = split_of(8, 4, torch.arange(8), 0)
    gate_FD = QuantizedMatrix.of(torch.ones(4, D), 8)
    weights = FfnWeights(gate_FD, gate_FD, gate_FD)
    split.hot.weights = weights  # type: ignore[union-attr]
    with pytest.raises(TypeError, match="stay where they are"):
        split.exchange_neurons(torch.tensor([0]), torch.tensor([5]))
