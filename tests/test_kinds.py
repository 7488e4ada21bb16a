"""Predictors made from the gate's own weights, their files, and the comparison of all kinds."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from predictor import (
    MlpPredictor,
    Predictor,
    PredictorCorrupted,
    PredictorSet,
    fingerprint,
    load_predictors,
    save_predictors,
)
from predictor.checkpoint import PredictorMismatch
from predictor.fingerprint import read_gate
from predictor.kinds import GATE_KINDS, KINDS, GateCopy, SignGate, of_gate, svd_predictor
from predictor.low_bits import pack_nibbles, rounded_inputs, unpack_nibbles
from predictor.mlp import Int4MlpPredictor
from training_predictors.baselines import train_powerinfer
from training_predictors.compare import SHARES, in_int8, measure
from training_predictors.ranks import KINDS as KINDS_OF_COMMAND
from training_predictors.recording import LayerData

D, F, N = 64, 96, 512
THRESHOLD = 0.3


@pytest.fixture(scope="module")
def gate_FD() -> Tensor:
    return torch.randn(F, D, generator=torch.Generator().manual_seed(0)) / D**0.5


@pytest.fixture(scope="module")
def data(gate_FD: Tensor) -> LayerData:
    """Inputs that live mostly in a quarter of the directions, as those of a language model do."""
    generator = torch.Generator().manual_seed(1)
    spread_DD = torch.randn(D, D, generator=generator) / D**0.5
    spread_DD[D // 4 :] *= 0.05
    x_ND = torch.randn(N, D, generator=generator) @ spread_DD * 2 + 0.1
    gate_NF = x_ND @ gate_FD.T
    magnitude_NF = torch.where(gate_NF > THRESHOLD, gate_NF, 0.0).half()
    return LayerData(x_ND.half(), torch.ones(N), magnitude_NF)


def energy_recall(predictor: object, data: LayerData) -> list[float]:
    values: list[float] = measure(predictor, data)["energy_recall"]  # type: ignore[arg-type]
    return values


def test_svd_of_full_rank_is_the_gate(gate_FD: Tensor, data: LayerData) -> None:
    """Its score crosses zero where the gate crosses the threshold, but for int8 rounding."""
    predictor = svd_predictor(gate_FD, data.x_ND, D, THRESHOLD)
    wrong_NF = predictor.select(data.x_ND) != data.active_NF
    assert wrong_NF.float().mean() < 0.02


def test_svd_finds_what_the_inputs_use(gate_FD: Tensor, data: LayerData) -> None:
    """A quarter of the rank is nearly enough here; without whitening and the mean it is not."""
    ours = svd_predictor(gate_FD, data.x_ND, D // 4, THRESHOLD)
    left, sizes, right = torch.linalg.svd(gate_FD, full_matrices=False)
    rank = D // 4
    nothing = [torch.zeros(rank), torch.zeros(F)]
    plain = MlpPredictor.from_float(
        right[:rank], nothing[0] + 100, left[:, :rank] * sizes[:rank], nothing[1]
    )
    at_half = SHARES.index(0.5)
    assert energy_recall(ours, data)[at_half] > 0.97
    assert energy_recall(ours, data)[at_half] > energy_recall(plain, data)[at_half] + 0.02


@pytest.mark.parametrize("bits", [8, 4])
def test_gate_copy_is_within_half_a_step(gate_FD: Tensor, bits: int) -> None:
    copy = GateCopy.of(gate_FD, bits, 0.0)
    copied_FD = copy.score(torch.eye(D)).T
    torch.testing.assert_close(copied_FD, copy.copy_FD, rtol=1e-6, atol=1e-9)
    largest = 2 ** (bits - 1) - 1
    step_FD = copy.scale_FC.float().repeat_interleave(32, dim=1)
    # the scale is rounded to fp16 before the values are: the largest may be off by one part in 2^11
    slack = gate_FD.abs() * 2**-10
    assert bool(((copied_FD - gate_FD).abs() <= step_FD / 2 + slack).all())
    assert int(copy.q_FD.abs().max()) == largest
    assert copy.num_bytes == F * D * bits // 8 + F * D // 32 * 2


def test_gate_copy_refuses_odd_widths() -> None:
    with pytest.raises(ValueError, match="groups of 32"):
        GateCopy.of(torch.randn(4, 40), 8, 0.0)


def test_signs_count_agreement() -> None:
    gate_FD = torch.tensor([[1.0, -2.0, 3.0, 0.5, 1.0, 1.0, 0.0, -0.1], [-1.0] * 8])
    signs = SignGate.of(gate_FD)
    x_D = torch.tensor([0.1, -0.1, 9.0, 2.0, -3.0, 1e-9, 0.0, torch.nan])
    assert signs.score(x_D[None]).tolist() == [[6.0, 0.0]]
    assert signs.bits_FB.tolist() == [[0b00111101], [0]]
    with pytest.raises(ValueError, match="bytes of 8"):
        SignGate.of(torch.randn(F, 12))
    assert SignGate.of(torch.randn(F, D)).num_bytes == F * D // 8


def test_more_bits_keep_more(gate_FD: Tensor, data: LayerData) -> None:
    kinds = [GateCopy.of(gate_FD, 8, THRESHOLD), GateCopy.of(gate_FD, 4, THRESHOLD)]
    int8, int4, sign = (energy_recall(kind, data) for kind in (*kinds, SignGate.of(gate_FD)))
    at = SHARES.index(0.7)
    assert int8[at] >= int4[at] > sign[at]
    row = measure(kinds[0], data)
    natural = 1 - float(data.active_NF.float().mean())
    assert row["predicted_sparsity_at_energy_recall_0.99"] == pytest.approx(natural, abs=0.1)
    assert row["predicted_sparsity"] == pytest.approx(SHARES, abs=0.01)


def test_powerinfers_recipe_learns(data: LayerData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training_predictors.baselines.POWERINFER_BATCH_TOKENS", 32)
    at = SHARES.index(0.5)
    trained = train_powerinfer(data, data, 16, seed=0)
    assert trained.num_bytes == 2 * 16 * (D + F)
    monkeypatch.setattr("training_predictors.baselines.POWERINFER_EPOCHS", 0)
    start = train_powerinfer(data, data, 16, seed=0)
    assert energy_recall(trained, data)[at] > energy_recall(start, data)[at] + 0.1
    # the same scores but for rounding, in as many bytes as a trained predictor of that rank
    assert energy_recall(in_int8(trained), data) == pytest.approx(
        energy_recall(trained, data), abs=0.02
    )


# one face for all kinds, and their files


def build(kind: str, gate_FD: Tensor, x_ND: Tensor) -> Predictor:
    if kind == "sign":
        return SignGate.of(gate_FD).with_threshold(3)
    if kind.startswith("gate"):
        return GateCopy.of(gate_FD, int(kind.removeprefix("gate-int")), THRESHOLD)
    svd = svd_predictor(gate_FD, x_ND, 24, THRESHOLD)
    if kind == "svd":
        return svd
    mlp = MlpPredictor.from_float(svd.fc1_RD, svd.bias_R, svd.fc2_FR, svd.bias_F, 0.25)
    return Int4MlpPredictor.of(mlp) if kind == "mlp-int4" else mlp


def test_the_command_offers_the_kinds_that_exist() -> None:
    assert tuple(KINDS) == KINDS_OF_COMMAND


@pytest.mark.parametrize("kind", KINDS)
def test_rows_and_permutations_carry_their_scores(
    gate_FD: Tensor, data: LayerData, kind: str
) -> None:
    predictor, x_ND = build(kind, gate_FD, data.x_ND), data.x_ND.float()
    assert (predictor.kind, predictor.d_model, predictor.num_neurons) == (kind, D, F)
    score_NF, mask_NF = predictor.score(x_ND), predictor.select(x_ND)
    assert torch.equal(mask_NF, score_NF > predictor.threshold)
    assert 0.05 < float(mask_NF.float().mean()) < 0.95
    close = {"rtol": 1e-5, "atol": 1e-5}  # sums in another order
    halves = predictor.rows(0, 37), predictor.rows(37, F)
    assert [half.num_neurons for half in halves] == [37, F - 37]
    torch.testing.assert_close(torch.cat([h.score(x_ND) for h in halves], 1), score_NF, **close)
    order_F = torch.randperm(F)
    permuted = predictor.permuted(order_F)
    torch.testing.assert_close(permuted.score(x_ND), score_NF[:, order_F], **close)
    assert permuted.kind == kind
    assert permuted.with_threshold(9).threshold == 9.0
    with pytest.raises(ValueError, match="permutation"):
        predictor.permuted(torch.zeros(F, dtype=torch.int64))


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_every_kind(gate_FD: Tensor, data: LayerData, kind: str, tmp_path: Path) -> None:
    layers = [build(kind, weights_FD, data.x_ND) for weights_FD in (gate_FD, gate_FD.flip(0))]
    saved = PredictorSet(layers, {"fingerprint": "abc"})
    save_predictors(tmp_path, saved)
    loaded = load_predictors(tmp_path, fingerprint="abc")
    for before, after in zip(saved, loaded, strict=True):
        assert (type(after), after.kind) == (type(before), kind)
        assert after.threshold == before.threshold
        assert torch.equal(after.score(data.x_ND), before.score(data.x_ND))
    tensors = load_file(tmp_path / "predictors.safetensors")
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == saved.num_bytes
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["kind"] == kind
    assert ("ranks" in manifest) == (kind in ("mlp", "mlp-int4", "svd"))


def test_unknown_and_mixed_kinds_are_refused_by_name(
    gate_FD: Tensor, data: LayerData, tmp_path: Path
) -> None:
    made = {kind: build(kind, gate_FD, data.x_ND) for kind in ("sign", "gate-int4")}
    mixed = PredictorSet([made["sign"], made["gate-int4"]], {"fingerprint": "abc"})
    with pytest.raises(ValueError, match=r"gate-int4.*sign"):
        save_predictors(tmp_path, mixed)
    save_predictors(tmp_path, PredictorSet([made["gate-int4"]], {"fingerprint": "abc"}))
    path = tmp_path / "manifest.json"
    manifest = json.loads(path.read_text())
    for kind, message in (
        ("oracle", r"kind is 'oracle'.*gate-int4, sign"),
        (["sign"], r"kind is \['sign'\]"),
        ("sign", r"gate\.signs"),
        ("gate-int8", r"packed_FB of a `gate-int8` predictor must be torch\.int8"),
    ):
        path.write_text(json.dumps(manifest | {"kind": kind}))
        with pytest.raises(PredictorCorrupted, match=message):
            load_predictors(tmp_path, fingerprint="abc")


@pytest.mark.parametrize("kind", GATE_KINDS)
def test_what_holds_only_the_gate_is_made_of_the_model_beside_it(
    make_tiny_model: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    model = Path(shutil.copytree(make_tiny_model(), tmp_path / "model"))
    gates = [read_gate(model, layer) for layer in range(2)]
    layers = [of_gate(kind, gate_FD, 0.5 + i) for i, gate_FD in enumerate(gates)]
    name = fingerprint(model)
    save_predictors(model / "sparsity", PredictorSet(layers, {"fingerprint": name}))
    stored = load_predictors(model / "sparsity", fingerprint=name)
    (model / "sparsity" / "predictors.safetensors").unlink()
    made = load_predictors(model / "sparsity", fingerprint=name)
    for before, after in zip(stored, made, strict=True):
        assert (after.kind, after.threshold) == (kind, before.threshold)
        for tensor_name, tensor in before.tensors.items():
            assert torch.equal(after.tensors[tensor_name], tensor)
    other = Path(shutil.copytree(make_tiny_model(seed=5), tmp_path / "other"))
    shutil.copytree(model / "sparsity", other / "sparsity")
    with pytest.raises(PredictorMismatch, match="was calibrated for fingerprint"):
        load_predictors(other / "sparsity", fingerprint=None)


def test_nibbles_are_packed_by_half_groups() -> None:
    q_FD = torch.randint(-8, 8, (5, 96)).to(torch.int8)
    packed_FB = pack_nibbles(q_FD)
    assert packed_FB.shape == (5, 48)
    assert torch.equal(unpack_nibbles(packed_FB), q_FD)
    row_D = torch.zeros(1, 64, dtype=torch.int8)
    row_D[0, 33], row_D[0, 49] = -8, 7
    assert int(pack_nibbles(row_D)[0, 17]) == 0xF0


def test_inputs_are_rounded_in_groups() -> None:
    x_ND = torch.randn(4, 96)
    x_ND[1, :32] = 0
    x_ND[2, 32:64] *= 1e6
    x_ND[3, :64] *= 1e-39
    rounded_ND = rounded_inputs(x_ND)
    step_NC = (x_ND.view(4, 3, 32).abs().amax(-1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    error_NCG = (rounded_ND - x_ND).view(4, 3, 32).abs()
    assert bool((error_NCG <= step_NC[..., None] * 0.50001).all())
    assert not bool(rounded_ND[1, :32].any())
    assert bool((rounded_ND != x_ND).any())


def test_a_gate_that_fp16_scales_cannot_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        GateCopy.of(torch.full((2, 32), 1e9), 8, 0.0)
    small = GateCopy.of(torch.full((2, 32), 1e-3), 8, 0.0)  # a scale below fp16's normal numbers
    torch.testing.assert_close(small.copy_FD, torch.full((2, 32), 1e-3), rtol=0.01, atol=0)
