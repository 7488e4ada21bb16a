"""The audit's samples on disk: what is kept, for how long, for whom; and training from them."""

import contextlib
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace as Tiny
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from hotneuron.commands.serve import keep_samples
from predictor import ActivationProfile, PredictorSet, fingerprint, load_predictors, save_predictors
from runtime import Engine, EngineConfig, SamplingParams
from runtime.audit import Audit
from runtime.model import Model
from runtime.placement import Placement
from tests.fake_engine import wait_until
from training_predictors.__main__ import main
from training_predictors.calibrate import Targets
from training_predictors.documents import BadData
from training_predictors.from_audit import AuditPlan, improve, is_better
from training_predictors.kept_audit import AuditKeeper, open_samples
from training_predictors.recording import Recording
from training_predictors.train import TrainSettings

MakeModel = Callable[..., Path]
L, D, F = 3, 64, 160
SAMPLING = SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True)
MIB = 1 << 20


@pytest.fixture(scope="module")
def folder(make_sparse_model: MakeModel) -> Path:
    return make_sparse_model("gate", hidden_act_param=0.2)


def keeper_for(model_dir: Path, samples: Path, max_bytes: int = MIB) -> AuditKeeper:
    return AuditKeeper(samples, fingerprint(model_dir), L, F, max_bytes)


def random_step(count: int, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(count, D, generator=generator), torch.randn(count, F).clamp(min=0))
        for _ in range(L)
    ]


def test_samples_are_what_the_ffn_read_and_did(folder: Path, tmp_path: Path) -> None:
    """Kept while serving; a model of its own computes the same from them."""
    engine = Engine.from_config(EngineConfig(folder, audit_rate=1.0, dtype="float32", threads=1))
    keeper = keeper_for(folder, tmp_path / "samples")
    engine.audit.sink = keeper
    for index in range(4):
        engine.generate((5 + index, 6, 7), SAMPLING)
    keeper.close()
    samples = open_samples(tmp_path / "samples", fingerprint(folder), F)
    # of 9 tokens the first comes from the prompt; requests in order calibrate, test, train, train
    assert samples.tokens_by_split() == {"calibrate": 8, "test": 8, "train": 16, "other": 0}
    weights = load_file(folder / "model.safetensors")
    for layer in range(L):
        gate, up, down = (
            weights[f"model.layers.{layer}.mlp.{name}_proj.weight"]
            for name in ("gate", "up", "down")
        )
        data = samples.layer(layer, "train")
        x_ND = data.x_ND.float()
        gate_NF = x_ND @ gate.T
        h_NF = torch.where(gate_NF > 0.2, gate_NF, 0.0) * (x_ND @ up.T)
        expected_NF = h_NF.abs() * down.norm(dim=0)
        is_clear_NF = (gate_NF - 0.2).abs() > 0.01
        torch.testing.assert_close(
            data.magnitude_NF.float()[is_clear_NF], expected_NF[is_clear_NF], rtol=0.02, atol=0.02
        )
    facts = samples.facts()[0]
    assert set(facts) == {"by", "fingerprint", "at", "tokens"}
    names = set(load_file(samples.shards[0]))
    assert {name.split(".")[0] for name in names} == {"split", "x", "active", "magnitude", "rms"}


def test_serve_says_what_it_keeps(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = Engine.from_config(EngineConfig(folder, audit_rate=1.0, threads=1))
    keeper = keep_samples(engine, tmp_path / "samples", MIB)
    said = " ".join(capsys.readouterr().err.split())
    for words in ("traffic are stored in", "at most 1.0 MiB", "no text and no token ids"):
        assert words in said
    engine.generate((5, 6, 7), SAMPLING)
    assert not list((tmp_path / "samples").iterdir())
    keeper.close()  # what serve does last
    assert len(list((tmp_path / "samples").iterdir())) == 1


def test_a_placed_models_samples_stand_in_the_checkpoints_order(folder: Path) -> None:
    order_LF = torch.stack([torch.randperm(F) for _ in range(L)])
    kept: list[Any] = []
    for placement in (None, Placement(order_LF, (0, 0, 0))):
        model = Model.from_folder(folder, dtype="float32", placement=placement)
        audit = Audit(model, 1.0)
        audit.sink = lambda ids, layers: kept.append((ids, layers))
        tap = audit.tap(["a", "b"])
        assert tap is not None
        for layer in range(L):
            tap(layer, torch.randn(2, D, generator=torch.Generator().manual_seed(layer)))
    assert kept[0][0] == ["a", "b"]
    for (x_ND, magnitude_NF), (placed_x_ND, placed_NF) in zip(kept[0][1], kept[1][1], strict=True):
        torch.testing.assert_close(placed_x_ND, x_ND)
        torch.testing.assert_close(placed_NF, magnitude_NF)


def test_a_requests_tokens_stay_together(folder: Path, tmp_path: Path) -> None:
    keeper = keeper_for(folder, tmp_path / "samples")
    for step in range(5):
        keeper(["a", "b", "c"], random_step(3, step))
    keeper(["d"], random_step(1))
    keeper.close()
    counts = Recording(tmp_path / "samples", F).tokens_by_split()
    assert counts == {"calibrate": 5, "test": 5, "train": 6, "other": 0}


def size_of(folder: Path) -> int:
    """Bytes of the shards while a writer may be removing some."""
    total = 0
    for shard in folder.glob("shard-*"):
        with contextlib.suppress(FileNotFoundError):
            total += shard.stat().st_size
    return total


def test_the_folder_is_bounded_and_private(folder: Path, tmp_path: Path) -> None:
    samples = tmp_path / "new" / "samples"
    keeper = keeper_for(folder, samples, max_bytes=MIB)
    first = None
    for step in range(60):
        keeper([f"r{step}"] * 32, random_step(32, step))
        shards = sorted(samples.glob("shard-*"))
        first = first or (shards[0] if shards else None)
        assert size_of(samples) <= MIB
    keeper.close()
    shards = sorted(samples.iterdir())
    assert first not in shards
    assert len(shards) >= 4
    assert sum(shard.stat().st_size for shard in shards) <= MIB
    assert samples.stat().st_mode & 0o777 == 0o700
    assert {shard.stat().st_mode & 0o777 for shard in shards} == {0o600}
    newest = Recording(samples, F).layer(0, "train").x_ND[-1]
    torch.testing.assert_close(newest, random_step(32, 59)[0][0][-1].half())


def test_serving_survives_a_full_disk(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where the next shard is full before the disk has refused the last one."""
    keeper = keeper_for(folder, tmp_path / "samples")
    num_tried = 0

    def full(*_: Any, **__: Any) -> None:
        nonlocal num_tried
        num_tried += 1
        assert wait_until(lambda: bool(keeper._buffer.split))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("training_predictors.recording.write_safetensors", full)
    for step in range(4):
        keeper(["a"] * 256, random_step(256, step))  # a shard each
    keeper.close()
    assert num_tried == 1
    assert caplog.text.count("no longer kept") == 1
    assert not list((tmp_path / "samples").iterdir())


def test_foreign_and_damaged_samples_are_refused(
    folder: Path, make_tiny_model: MakeModel, tmp_path: Path
) -> None:
    samples = tmp_path / "samples"
    keeper = keeper_for(folder, samples)
    keeper(["a"], random_step(1))
    keeper.close()
    other = make_tiny_model(seed=5)
    with pytest.raises(BadData, match=f"samples of the model {fingerprint(folder)}"):
        keeper_for(other, samples)
    with pytest.raises(BadData, match="too little"):
        keeper_for(folder, samples, max_bytes=1000)
    shard = next(samples.iterdir())
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(BadData, match="cannot be read"):
        keeper_for(folder, samples)


# training from them


def shifted_traffic(folder: Path, samples: Path, num_requests: int = 40) -> None:
    """Inputs around a point far from those the stored predictors were calibrated on."""
    model = Model.from_folder(folder, dtype="float32")
    audit = Audit(model, 1.0)
    keeper = keeper_for(folder, samples, max_bytes=64 * MIB)
    audit.sink = keeper
    generator = torch.Generator().manual_seed(3)
    shift_D = 0.8 * torch.randn(D, generator=generator)
    for request in range(num_requests):
        tap = audit.tap([f"r{request}"] * 60)
        assert tap is not None
        for layer in range(L):
            tap(layer, shift_D + 0.5 * torch.randn(60, D, generator=generator))
    keeper.close()


@pytest.fixture(scope="module")
def drifted(
    make_tiny_model: MakeModel, tiny: Tiny, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """(model, samples): predictors of rank 8 that were made for inputs around zero."""
    place = tmp_path_factory.mktemp("drifted")
    folder = Path(shutil.copytree(make_tiny_model(hidden_act_param=0.2), place / "model"))
    from predictor.fingerprint import read_gate
    from predictor.kinds import svd_predictor

    x_ND = torch.randn(500, D)
    layers = [
        svd_predictor(read_gate(folder, layer), x_ND, 8, 0.2).with_threshold(-0.1)
        for layer in range(L)
    ]
    manifest = {"fingerprint": fingerprint(folder), "made": {"by": "tests"}}
    save_predictors(folder / "sparsity", PredictorSet(layers, manifest))
    ActivationProfile(torch.ones(L, F, dtype=torch.int64), 9).save(
        folder / "sparsity" / "profile.safetensors"
    )
    shifted_traffic(folder, place / "samples")
    return folder, place / "samples"


def plan_for(drifted: tuple[Path, Path], out: Path, **changes: Any) -> AuditPlan:
    folder, samples = drifted
    settings = TrainSettings(epochs=10, batch_tokens=64, learning_rate=0.02)
    return replace(AuditPlan(folder, samples, out, train=settings), **changes)


def test_recall_rises_on_the_traffic_that_was_kept(
    drifted: tuple[Path, Path], tmp_path: Path
) -> None:
    console = Console(file=io.StringIO(), width=200)
    report = improve(plan_for(drifted, tmp_path / "out"), console)
    assert report is not None
    for row in report["layers"]:
        before, recalibrated, _ = row["candidates"]
        assert row["predictor"] != "stored"
        assert before["recall"] < 0.9
        assert row["recall"] > 0.93
        assert row["predicted_sparsity"] >= recalibrated["predicted_sparsity"] - 0.001
    assert any(row["predictor"].startswith("trained") for row in report["layers"])
    improved = load_predictors(tmp_path / "out", fingerprint=fingerprint(drifted[0]))
    made = improved.manifest["made"]
    assert made["from"] == {"by": "tests"}
    assert made["targets"] == {"recall": 0.94, "energy_recall": 0.99}
    assert made["by"] == "train-predictors --from-audit"
    # a third run of the same kind of traffic, seen by neither
    shifted_traffic(drifted[0], tmp_path / "later", num_requests=12)
    later = Recording(tmp_path / "later", F)
    stored = load_predictors(drifted[0] / "sparsity", fingerprint=None)
    for layer in range(L):
        data = later.layer(layer, "train")
        found = [
            float((p[layer].select(data.x_ND) & data.active_NF).sum() / data.active_NF.sum())
            for p in (stored, improved)
        ]
        assert found[1] > found[0] + 0.02
    profile = ActivationProfile.load(tmp_path / "out" / "profile.safetensors")
    assert profile.num_tokens == 9


def test_predictors_that_are_as_good_stay(
    drifted: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was just improved cannot be improved again on the same samples."""
    folder = Path(shutil.copytree(drifted[0], tmp_path / "model"))
    plan = plan_for((folder, drifted[1]), folder / "sparsity", train=TrainSettings(epochs=1))
    plan = replace(plan, targets={"recall": 0.9, "energy_recall": 0.9})
    assert improve(plan, Console(file=io.StringIO())) is not None
    before = (folder / "sparsity" / "manifest.json").read_bytes()
    assert json.loads(before)["made"]["targets"]["recall"] == 0.9  # stays what is aimed at
    # a step too small to change an int8 weight
    words = [str(folder), "--from-audit", str(drifted[1]), "--epochs", "1"]
    assert main([*words, "--learning-rate", "1e-9"]) == 0
    assert "nothing better was found" in capsys.readouterr().out
    assert (folder / "sparsity" / "manifest.json").read_bytes() == before


def test_what_is_better() -> None:
    def point(recall: float, energy: float, sparsity: float) -> dict[str, float]:
        return {"recall": recall, "energy_recall": energy, "predicted_sparsity": sparsity}

    targets = Targets(0.96, 0.98)
    assert is_better(point(0.96, 0.98, 0.5), point(0.90, 0.98, 0.8), targets)
    assert is_better(point(0.99, 0.98, 0.5), point(0.99, 0.94, 0.8), targets)
    assert not is_better(
        point(0.99, 0.99, 0.5), point(0.96, 0.98, 0.5), targets
    )  # enough is enough
    assert is_better(point(0.96, 0.98, 0.7), point(0.99, 0.99, 0.5), targets)
    assert not is_better(point(0.959, 0.98, 0.7005), point(0.96, 0.98, 0.7), targets)  # noise


def test_refusals_name_the_fix(
    drifted: tuple[Path, Path],
    make_sparse_model: MakeModel,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = make_sparse_model("gate", seed=5)
    model, samples = (str(path) for path in drifted)
    (tmp_path / "empty").mkdir()
    for words, message in (
        ([str(other), "--from-audit", samples], "holds samples of the model"),
        ([model, "--from-audit", str(tmp_path / "empty")], "--keep-audit"),
        ([model, "--from-audit", samples, "--rank", "8"], "--rank cannot be given"),
    ):
        assert main(words) == 1
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert message in err
