"""The command: its table, its refusals, comparing kinds, a bound on answers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from predictor import fingerprint, load_predictors
from tests.training.support import write_chats
from training_predictors.__main__ import main
from training_predictors.compare import SHARES

MakeModel = Callable[..., Path]


def test_command_refuses_dense_models_and_too_few_documents(
    make_tiny_model: MakeModel,
    sparse_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOTNEURON_CACHE", str(tmp_path / "cache"))
    chats = write_chats(tmp_path / "chats.jsonl", count=2)
    dense = make_tiny_model(hidden_act="silu")
    flags = ["--data", str(chats), "--out", str(tmp_path / "out")]
    assert main([str(dense), *flags]) == 1
    assert "hotneuron prosparse" in capsys.readouterr().err
    assert main([str(sparse_model), *flags]) == 1
    assert "--data" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_command_trains_and_prints_the_table(
    sparse_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOTNEURON_CACHE", str(tmp_path / "cache"))
    chats = write_chats(tmp_path / "chats.jsonl", count=12)
    out = tmp_path / "out"
    flags = ["--data", str(chats), "--out", str(out), "--tokens", "500", "--epochs", "1"]
    assert main([str(sparse_model), *flags, "--rank", "16"]) == 0
    printed = capsys.readouterr().out
    assert "recall" in printed
    assert "frequency mask at the same predicted sparsity" in printed
    assert load_predictors(out, fingerprint=fingerprint(sparse_model)).layers[2].rank == 16
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_compare_writes_all_kinds(
    sparse_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chats = write_chats(tmp_path / "chats.jsonl")
    words = [str(sparse_model), "--data", str(chats), "--out", str(tmp_path / "out"), "--compare"]
    words += ["--tokens", "300", "--epochs", "2", "--work", str(tmp_path / "work")]
    assert main(words) == 0
    comparison = json.loads((tmp_path / "out" / "kinds.json").read_text())
    assert comparison["fingerprint"] == fingerprint(sparse_model)
    kinds = comparison["kinds"]
    blind = ["frequency", "previous_tokens", "random"]
    peer = ["powerinfer", "powerinfer-own-size"]
    assert list(kinds) == [
        "mlp",
        "mlp-int4",
        "svd",
        "gate-int8",
        "gate-int4",
        "sign",
        *peer,
        *blind,
    ]
    assert kinds["mlp"]["bytes"] == kinds["svd"]["bytes"] == kinds["powerinfer"]["bytes"]
    assert kinds["powerinfer-own-size"]["bytes"] == 3 * 2 * 16 * (64 + 160)
    for name in peer:
        served = [kinds[name][f"served_{key}"] for key in ("predicted_sparsity", "energy_recall")]
        assert all(0 < value < 1 for value in served)
    # they see nothing: what they find grows with what they keep, and only with it
    assert kinds["random"]["recall"] == pytest.approx([1 - s for s in SHARES], abs=0.03)
    for kind in kinds.values():
        assert kind["energy_recall"] == sorted(kind["energy_recall"], reverse=True)
    printed = capsys.readouterr().out
    assert "gate-int4" in printed
    assert "powerinfer as it is served, at logit 0" in printed


def test_a_bound_on_answers_is_kept(
    sparse_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the calibration documents as measured; on others about so, and far below without it."""
    words = [str(sparse_model), "--data", str(write_chats(tmp_path / "chats.jsonl"))]
    words += ["--work", str(tmp_path / "work"), "--tokens", "600", "--threads", "1"]
    words += ["--kind", "svd", "--rank", "24", "--target-recall", "0.8"]
    words += ["--target-energy-recall", "0.8", "--out", str(tmp_path / "out")]
    found = {}
    for bound in (None, 0.002):
        flags = [] if bound is None else ["--target-kl", str(bound)]
        assert main([*words, *flags]) == 0
        report = json.loads((tmp_path / "out" / "report.json").read_text())
        assert report["made"]["targets"]["kl"] == bound
        found[bound] = report["fidelity"]["kl"], report["mean"]["predicted_sparsity"]
    assert found[0.002][0] < 0.3 * found[None][0]  # 81 tokens are few to hold it to the bound
    assert 0 < found[0.002][1] < found[None][1]
    assert main([*words, "--target-kl", "1e-12"]) == 1
    assert "no thresholds keep the KL" in capsys.readouterr().err
    assert main([*words, "--target-kl", "0"]) == 1
    assert "must be above 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--kind", "gate-int4", "--rank", "16"], "--rank given.*--kind mlp or mlp-int4 or svd"),
        (["--kind", "sign", "--byte-budget", "1MB"], "--byte-budget given.*--kind mlp or mlp-int4"),
        (["--kind", "svd", "--compare"], "--compare.*leave out --kind svd"),
    ],
)
def test_flags_that_do_not_fit_a_kind_are_refused(
    sparse_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    message: str,
) -> None:
    work = ["--work", str(tmp_path / "work")]
    assert main([str(sparse_model), "--out", str(tmp_path / "out"), *work, *flags]) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not list(tmp_path.iterdir())
