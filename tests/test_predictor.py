"""The predictor as an object: fingerprint, int8 definition, files, and the metrics by hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from predictor import (
    ActivationProfile,
    MlpPredictor,
    PredictorCorrupted,
    PredictorMismatch,
    PredictorSet,
    RecallMeter,
    fingerprint,
    load_predictors,
    save_predictors,
)
from predictor.fingerprint import FingerprintError


def random_predictor(D: int = 12, R: int = 5, F: int = 9, seed: int = 0) -> MlpPredictor:
    rng = torch.Generator().manual_seed(seed)
    return MlpPredictor.from_float(
        torch.randn(R, D, generator=rng),
        torch.randn(R, generator=rng),
        torch.randn(F, R, generator=rng),
        torch.randn(F, generator=rng),
        threshold=0.25,
    )


# metrics


def test_recall_by_hand() -> None:
    meter = RecallMeter(2)
    h_NF = torch.tensor(
        [
            [1.0, 0.0, -2.0, 0.0],  # active 0 and 2
            [0.0, 3.0, 0.0, 0.0],  # active 1
            [0.0, 0.0, 0.0, 0.0],  # none: no recall, but sparsity
        ]
    )
    selected_NF = torch.tensor(
        [[True, True, False, False], [False, True, False, False], [True, False, False, False]]
    )
    down_norm_F = torch.tensor([2.0, 1.0, 0.5, 1.0])
    meter.add(1, h_NF, selected_NF, down_norm_F)
    report = meter.report()
    row = report["layers"][1]
    assert row["tokens"] == 3
    assert row["natural_sparsity"] == pytest.approx(9 / 12)
    assert row["predicted_sparsity"] == pytest.approx(8 / 12)
    assert row["recall"] == pytest.approx((1 / 2 + 1) / 2)
    # token 0: energies 4 (kept) and 1 (missed)
    assert row["energy_recall"] == pytest.approx((4 / 5 + 1) / 2)
    assert row["precision"] == pytest.approx(2 / 4)
    # recalls 0.5 and 1: standard error 0.25, the interval is cut at 1
    assert row["recall_ci95"] == pytest.approx([0.75 - 1.959964 * 0.25, 1.0])
    unmeasured = report["layers"][0]
    assert unmeasured["tokens"] == 0
    for key in ("natural_sparsity", "predicted_sparsity", "recall", "energy_recall", "precision"):
        assert unmeasured[key] is None
        assert report["mean"][key] == row[key]


def test_no_active_neuron_anywhere_gives_none_not_nan() -> None:
    meter = RecallMeter(1)
    meter.add(0, torch.zeros(4, 6), torch.zeros(4, 6, dtype=torch.bool), torch.ones(6))
    row = meter.report()["layers"][0]
    assert row["natural_sparsity"] == 1
    assert row["predicted_sparsity"] == 1
    assert row["recall"] is None
    assert row["energy_recall"] is None
    assert row["precision"] is None
    assert row["recall_ci95"] is None


def test_merged_meters_equal_one_meter_whatever_the_grouping() -> None:
    rng = torch.Generator().manual_seed(1)
    h_NF = torch.relu(torch.randn(50, 16, generator=rng))
    selected_NF = torch.rand(50, 16, generator=rng) < 0.6
    down_norm_F = torch.rand(16, generator=rng)
    whole = RecallMeter(1)
    whole.add(0, h_NF, selected_NF, down_norm_F)
    first, second = RecallMeter(1), RecallMeter(1)
    for token in range(50):
        part = first if token % 3 else second
        part.add(0, h_NF[token : token + 1], selected_NF[token : token + 1], down_norm_F)
    first.merge(second)
    merged, expected = first.report()["mean"], whole.report()["mean"]
    for key, value in expected.items():
        assert merged[key] == pytest.approx(value, rel=1e-6), key


def test_interval_covers_the_truth_about_95_percent_of_the_time() -> None:
    rng = torch.Generator().manual_seed(2)
    covered = 0
    for _ in range(300):
        meter = RecallMeter(1)
        # every neuron active, each selected with probability 0.9: the true recall is 0.9
        meter.add(0, torch.ones(200, 20), torch.rand(200, 20, generator=rng) < 0.9, torch.ones(20))
        low, high = meter.report()["mean"]["recall_ci95"]
        covered += low <= 0.9 <= high
    assert 0.90 <= covered / 300 <= 0.99


def test_tokens_that_are_not_finite_are_counted_apart() -> None:
    h_NF = torch.tensor(
        [[1.0, 0.0], [torch.nan, 1.0], [0.0, 2.0], [torch.inf, 0.0], [-torch.inf, torch.nan]]
    )
    selected_NF = torch.tensor([[True, False]] * 5)
    meter, clean = RecallMeter(1), RecallMeter(1)
    meter.add(0, h_NF, selected_NF, torch.ones(2))
    clean.add(0, h_NF[[0, 2]], selected_NF[[0, 2]], torch.ones(2))
    (row,), (wanted,) = meter.report()["layers"], clean.report()["layers"]
    assert (row.pop("nonfinite_tokens"), wanted.pop("nonfinite_tokens")) == (3, 0)
    assert row == wanted
    meter.merge(meter)
    assert meter.report()["mean"]["nonfinite_tokens"] == 6
    # Large is not infinite: such energies have to be added up in fp64.
    large = RecallMeter(1)
    large.add(0, torch.tensor([[3e38, 1.0]]), selected_NF[:1], torch.ones(2))
    assert large.report()["mean"]["nonfinite_tokens"] == 0


def test_meter_refuses_wrong_shapes() -> None:
    meter = RecallMeter(1)
    mask_NF = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="one shape"):
        meter.add(0, torch.ones(2, 4), mask_NF, torch.ones(4))
    with pytest.raises(ValueError, match="merge"):
        meter.merge(RecallMeter(2))


# the predictor


def test_score_is_the_formula_on_dequantised_weights() -> None:
    predictor = random_predictor()
    x_ND = torch.randn(7, 12, generator=torch.Generator().manual_seed(3))
    fc1_RD = predictor.fc1_q_RD.double() * predictor.fc1_scale_R.double()[:, None]
    fc2_FR = predictor.fc2_q_FR.double() * predictor.fc2_scale_F.double()[:, None]
    hidden_NR = (x_ND.double() @ fc1_RD.T + predictor.bias_R).clamp(min=0)
    expected_NF = hidden_NR @ fc2_FR.T + predictor.bias_F
    torch.testing.assert_close(predictor.score(x_ND).double(), expected_NF, rtol=1e-5, atol=1e-5)
    assert torch.equal(predictor.select(x_ND), predictor.score(x_ND) > 0.25)


def test_quantisation_error_is_at_most_half_a_step_per_weight() -> None:
    weight_RD = torch.randn(6, 40, generator=torch.Generator().manual_seed(4))
    weight_RD[2] = 0
    predictor = MlpPredictor.from_float(weight_RD, torch.zeros(6), torch.ones(3, 6), torch.zeros(3))
    error_RD = (predictor.fc1_RD - weight_RD).abs()
    assert bool((error_RD <= predictor.fc1_scale_R[:, None] * 0.5001).all())
    assert bool((predictor.fc1_RD[2] == 0).all())


def test_permuted_moves_scores_with_their_neurons() -> None:
    predictor = random_predictor()
    x_ND = torch.randn(4, 12)
    order_F = torch.randperm(9)
    torch.testing.assert_close(
        predictor.permuted(order_F).score(x_ND), predictor.score(x_ND)[:, order_F]
    )
    with pytest.raises(ValueError, match="permutation"):
        predictor.permuted(torch.zeros(9, dtype=torch.int64))


# files


def write_set(folder: Path) -> PredictorSet:
    predictors = PredictorSet(
        [random_predictor(R=5, seed=1), random_predictor(R=7, seed=2)],
        {"fingerprint": "abc", "made": {"seed": 1}},
    )
    save_predictors(folder, predictors)
    return predictors


def test_round_trip_keeps_every_bit_and_leaves_no_partial_file(tmp_path: Path) -> None:
    saved = write_set(tmp_path / "sparsity")
    loaded = load_predictors(tmp_path / "sparsity", fingerprint="abc")
    x_ND = torch.randn(3, 12)
    for before, after in zip(saved, loaded, strict=True):
        assert torch.equal(before.score(x_ND), after.score(x_ND))
        assert before.threshold == after.threshold
        assert before.rank == after.rank
    assert loaded.manifest["made"] == {"seed": 1}
    assert sorted(path.name for path in (tmp_path / "sparsity").iterdir()) == [
        "manifest.json",
        "predictors.safetensors",
    ]


def test_predictors_of_another_model_are_refused_with_both_names(tmp_path: Path) -> None:
    write_set(tmp_path / "sparsity")
    with pytest.raises(PredictorMismatch, match=r"abc.*other.*train-predictors"):
        load_predictors(tmp_path / "sparsity", fingerprint="other")


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest", "version", "shape"])
def test_damaged_files_are_refused_with_the_fix(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "sparsity"
    write_set(folder)
    tensors, manifest = folder / "predictors.safetensors", folder / "manifest.json"
    data = tensors.read_bytes()
    if damage == "flip":
        tensors.write_bytes(data[:-5] + bytes([data[-5] ^ 1]) + data[-4:])
    elif damage == "truncate":
        tensors.write_bytes(data[: len(data) // 2])
    elif damage == "remove":
        tensors.unlink()
    elif damage == "manifest":
        manifest.write_text("{not json")
    else:
        content = json.loads(manifest.read_text())
        content.update({"version": {"format_version": 99}, "shape": {"num_neurons": 4}}[damage])
        manifest.write_text(json.dumps(content))
    with pytest.raises(PredictorCorrupted, match="train-predictors"):
        load_predictors(folder, fingerprint="abc")


def test_profile_round_trip(tmp_path: Path) -> None:
    profile = ActivationProfile(torch.zeros(2, 3, dtype=torch.int64), 0)
    profile.add(1, torch.tensor([[True, False, True], [True, False, False]]))
    profile.num_tokens += 2
    profile.save(tmp_path / "profile.safetensors")
    loaded = ActivationProfile.load(tmp_path / "profile.safetensors")
    assert loaded.counts_LF.tolist() == [[0, 0, 0], [2, 0, 1]]
    assert loaded.frequency_LF[1].tolist() == [1.0, 0.0, 0.5]
    (tmp_path / "profile.safetensors").write_bytes(b"junk")
    with pytest.raises(PredictorCorrupted, match="train-predictors"):
        ActivationProfile.load(tmp_path / "profile.safetensors")


# fingerprint


def write_model(folder: Path, *, shards: bool = False, rows: int = 8, **config: object) -> Path:
    folder.mkdir(parents=True)
    facts = {
        "hidden_act": "relu",
        "hidden_act_param": 0.1,
        "num_hidden_layers": 2,
        "hidden_size": 4,
        "intermediate_size": rows,
    }
    (folder / "config.json").write_text(json.dumps(facts | config))
    rng = torch.Generator().manual_seed(5)
    tensors = {}
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        gate_FD = torch.randn(rows, 4, generator=rng).bfloat16()
        tensors[prefix + "mlp.gate_proj.weight"] = gate_FD
        tensors[prefix + "post_attention_layernorm.weight"] = torch.ones(4)
    if not shards:
        save_file(tensors, folder / "model.safetensors")
        return folder
    weight_map = {}
    for layer in range(2):
        part = {name: t for name, t in tensors.items() if f".{layer}." in name}
        save_file(part, folder / f"part-{layer}.safetensors")
        weight_map |= dict.fromkeys(part, f"part-{layer}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_fingerprint_is_of_the_bytes_not_of_the_place(tmp_path: Path) -> None:
    here = fingerprint(write_model(tmp_path / "here"))
    assert fingerprint(write_model(tmp_path / "elsewhere" / "deep")) == here
    assert fingerprint(write_model(tmp_path / "sharded", shards=True)) == here
    same_function = write_model(tmp_path / "named", hidden_act="fatrelu")
    assert fingerprint(same_function) == here


def test_fingerprint_changes_with_threshold_activation_and_gate(tmp_path: Path) -> None:
    here = fingerprint(write_model(tmp_path / "here"))
    assert fingerprint(write_model(tmp_path / "threshold", hidden_act_param=0.2)) != here
    assert fingerprint(write_model(tmp_path / "activation", hidden_act="silu")) != here
    changed = write_model(tmp_path / "gate")
    tensors = load_file(changed / "model.safetensors")
    tensors["model.layers.1.mlp.gate_proj.weight"][3, 2] += 1
    save_file(tensors, changed / "model.safetensors")
    assert fingerprint(changed) != here


def test_fingerprint_of_a_large_gate_samples_rows_to_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the function hides the module of the same name
    monkeypatch.setattr(sys.modules["predictor.fingerprint"], "MAX_BYTES_PER_GATE", 2048)
    large = write_model(tmp_path / "large", rows=1024)
    here = fingerprint(large)
    tensors = load_file(large / "model.safetensors")
    tensors["model.layers.1.mlp.gate_proj.weight"][-1, -1] += 1
    save_file(tensors, large / "model.safetensors")
    assert fingerprint(large) != here


def test_fingerprint_of_what_is_no_model_says_so(tmp_path: Path) -> None:
    with pytest.raises(FingerprintError, match=r"config\.json"):
        fingerprint(tmp_path)
    no_weights = write_model(tmp_path / "weights")
    (no_weights / "model.safetensors").unlink()
    with pytest.raises(FingerprintError, match=r"model\.safetensors"):
        fingerprint(no_weights)
