"""Ranks from a byte budget, and predictors that need no training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from predictor import fingerprint, load_predictors
from runtime import Engine, EngineConfig, SamplingParams
from tests.training.support import write_chats
from training_predictors.__main__ import main
from training_predictors.ranks import (
    FILE_OVERHEAD_PER_LAYER,
    choose_ranks,
    parse_bytes,
    predictor_bytes,
)
from training_predictors.training_free import check_kind


def test_ranks_follow_the_budget() -> None:
    assert choose_ranks(30, 576, 1536) == [112] * 30
    assert choose_ranks(2, 576, 1536, rank=40) == [40, 40]
    ranks = choose_ranks(30, 576, 1536, byte_budget=parse_bytes("8MB"))
    assert 30 * predictor_bytes(ranks[0], 576, 1536) <= 8_000_000
    assert 30 * predictor_bytes(ranks[0] + 16, 576, 1536) > 8_000_000
    assert choose_ranks(30, 576, 1536, kind="mlp-int4") == [128] * 30
    (rank,) = choose_ranks(1, 576, 1536, byte_budget=150_000, kind="mlp-int4")
    assert rank % 32 == 0
    assert predictor_bytes(rank, 576, 1536, "mlp-int4") <= 150_000
    assert predictor_bytes(rank + 32, 576, 1536, "mlp-int4") > 150_000
    with pytest.raises(ValueError, match=r"--byte-budget.*rank 32"):
        choose_ranks(30, 576, 1536, byte_budget=800_000, kind="mlp-int4")
    with pytest.raises(ValueError, match="--byte-budget"):
        choose_ranks(30, 576, 1536, byte_budget=1000)
    with pytest.raises(ValueError, match="--rank"):
        choose_ranks(30, 576, 1536, rank=600)
    assert parse_bytes("2 MiB") == 2 << 20
    assert parse_bytes("1.5kb") == 1500


def test_every_kind_without_training_is_made_calibrated_and_served(
    sparse_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model_dir = Path(shutil.copytree(sparse_model, tmp_path / "model"))
    chats, out = write_chats(tmp_path / "chats.jsonl"), model_dir / "sparsity"
    words = [str(model_dir), "--data", str(chats), "--work", str(tmp_path / "work")]
    words += ["--tokens", "600", "--threads", "1", "--target-recall", "0.9"]
    num_bytes = {}
    for kind, rank in (("sign", None), ("svd", 32), ("gate-int8", None), ("gate-int4", None)):
        flags = ["--kind", kind] if rank is None else ["--kind", kind, "--rank", str(rank)]
        assert main([*words, *flags]) == 0
        predictors = load_predictors(out, fingerprint=fingerprint(model_dir))
        assert {layer.kind for layer in predictors} == {kind}
        report = json.loads((out / "report.json").read_text())
        assert report["made"]["kind"] == kind
        assert "train" not in report["made"]
        for row, layer in zip(report["layers"], predictors, strict=True):
            assert row["recall"] > 0.85  # 0.9 on the calibration documents
            assert row["bytes"] == layer.num_bytes
            assert row.get("rank") == rank
        num_bytes[kind] = report["mean"]["bytes"]
    assert num_bytes["sign"] < num_bytes["gate-int4"] < num_bytes["gate-int8"]
    assert report["mean"]["precision"] > 0.8, "four bits know the gate well"
    assert "recall" in capsys.readouterr().out
    config = EngineConfig(model_dir, mode="predicted", threads=1, max_context=64, audit_rate=1.0)
    engine = Engine.from_config(config)
    try:
        sampling = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
        events = list(engine.generate(tuple(b"when the gate"), sampling))
        mean = engine.report()["mean"]
    finally:
        engine.stop()
    assert len([event for event in events if event.token_id is not None]) == 12
    assert 0.7 < mean["recall"] <= 1
    assert 0.1 < mean["predicted_sparsity"] < 1


def test_a_trained_network_is_calibrated_and_served_in_4_bits(
    sparse_model: Path, tmp_path: Path
) -> None:
    model_dir = Path(shutil.copytree(sparse_model, tmp_path / "model"))
    chats, out = write_chats(tmp_path / "chats.jsonl"), model_dir / "sparsity"
    words = [str(model_dir), "--data", str(chats), "--work", str(tmp_path / "work")]
    words += ["--tokens", "1500", "--epochs", "4", "--target-recall", "0.9"]
    assert main([*words, "--kind", "mlp-int4", "--rank", "40"]) == 0
    predictors = load_predictors(out, fingerprint=fingerprint(model_dir))
    assert {(layer.kind, layer.rank) for layer in predictors} == {("mlp-int4", 64)}
    report = json.loads((out / "report.json").read_text())
    assert report["made"]["kind"] == "mlp-int4"
    assert report["made"]["train"]["learning_rate"] > 0
    for row, layer in zip(report["layers"], predictors, strict=True):
        assert row["recall"] > 0.85  # 0.9 on the calibration documents
        assert (row["bytes"], row["rank"]) == (layer.num_bytes, 64)
        file_bytes = predictor_bytes(64, 64, 160, "mlp-int4") - FILE_OVERHEAD_PER_LAYER
        assert layer.num_bytes == file_bytes
    config = EngineConfig(model_dir, mode="predicted", threads=1, max_context=64, audit_rate=1.0)
    engine = Engine.from_config(config)
    try:
        sampling = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
        list(engine.generate(tuple(b"when the gate"), sampling))
        mean = engine.report()["mean"]
    finally:
        engine.stop()
    # texts unlike those it was trained on, as for the network in int8: better than chance
    assert mean["precision"] > 1.2 * (1 - mean["natural_sparsity"])


def test_a_width_without_whole_groups_is_refused_before_recording() -> None:
    free: dict[str, Any] = {"rank": None, "byte_budget": None, "compare": False}
    for kind, width, step in (
        ("mlp-int4", 80, 32),
        ("gate-int4", 80, 32),
        ("gate-int8", 48, 32),
        ("sign", 20, 8),
    ):
        check_kind(kind, 64, **free)
        with pytest.raises(ValueError, match=rf"{step} columns.*width {width}.*--kind mlp or svd"):
            check_kind(kind, width, **free)
    check_kind("svd", 20, **free)
