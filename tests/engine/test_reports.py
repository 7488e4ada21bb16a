"""What the engine tells of itself, and how it measures its speed."""

import json
import shutil
import time
from pathlib import Path

import pytest

from runtime.errors import InvalidRequest
from tests.engine.support import GREEDY, slow_down


def test_report_before_and_after_work(make_engine) -> None:
    engine = make_engine(audit_rate=1.0)
    report = engine.report()
    speed = report["speed"]
    assert speed.pop("mode") == "predicted"
    assert set(speed.values()) == {None}
    assert report["mean"]["recall"] is None
    assert report["mean"]["natural_sparsity"] is None
    assert report["density"] == []
    assert engine.measure_speed("exact", batch=3, new_tokens=2)["batch"] == 3
    engine.compare_speed(rounds=4, round_tokens=2)
    engine.generate((1, 2, 3), GREEDY)
    report = engine.report()
    assert json.loads(json.dumps(report)) == report
    speed = report["speed"]
    assert speed["decode_tokens"] == speed["dense_tokens"] == 8
    assert speed["speedup"] == pytest.approx(
        speed["decode_tokens_per_s"] / speed["dense_tokens_per_s"]
    )
    low, high = speed["speedup_ci95"]
    assert low < speed["speedup"] < high
    assert speed["how"] == "measured, batch 1, 4 rounds of 2 tokens in each mode by turns"
    assert speed["live_tokens_per_s"] > 0
    assert report["totals"] == {
        "requests": 1, "finished": 1, "aborted": 0, "failed": 0, "prompt_tokens": 3,
        "generated_tokens": 12, "preemptions": 0, "prefix_queried_tokens": 3,
        "prefix_hit_tokens": 0,
    }  # fmt: skip
    assert report["modes"] == ["dense", "exact", "predicted"]
    assert report["steps"] == {"decode": 11, "prompt": 1}
    # Neither measurement counts, only what was served.
    (density,) = report["density"]
    assert (density["mode"], density["batch"], density["steps"]) == ("predicted", 1, 11)
    assert 0 < density["active_share"] <= density["selected_share"] < 1
    assert density["active_share"] == density["united_share"]
    (served,) = report["served_speeds"]
    assert (served["mode"], served["batch"], served["steps"]) == ("predicted", 1, 11)
    assert served["tokens_per_s"] > 0
    assert sum(report["ffn_split"].values()) == pytest.approx(report["time_split"]["ffn_s"])
    activation = report["activation"]
    assert activation["tokens"] == report["mean"]["audited_tokens"] == 11
    assert (activation["group_size"], len(activation["share_LG"][0])) == (3, 54)
    fired = sum(sum(row[:-1]) * 3 + row[-1] for row in activation["share_LG"])
    assert fired / (3 * 160) == pytest.approx(1 - report["mean"]["natural_sparsity"], abs=1e-3)
    memory = report["memory"]
    assert memory["ffn_cold"] == report["placement"]["cold_bytes"]
    assert (memory["ffn_hot"], memory["kv_taken"]) == (0, 0)
    split = report["time_split"]
    assert all(split[key] > 0 for key in split)
    assert report["placement"] == {
        "vram_budget_bytes": None, "hot_neurons": [0, 0, 0], "hot_bytes": 0,
        "cold_bytes": 3 * 160 * 3 * 64 * 2, "vram": None,
    }  # fmt: skip
    assert report["devices"]["accelerator"] is None
    assert report["model"]["activation"] == "fatrelu(0.2)"


def test_the_report_has_what_training_measured(
    folder: Path, make_engine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def trained(name: str, text: str) -> dict | None:
        copy = shutil.copytree(folder, tmp_path / name)
        (copy / "sparsity" / "report.json").write_text(text)
        return make_engine(copy).report()["training"]

    mean = {
        "natural_sparsity": 0.8, "predicted_sparsity": 0.7, "recall": 0.96, "energy_recall": 0.99,
        "tokens": 40,
    }  # fmt: skip
    assert make_engine().report()["training"] is None
    assert trained("whole", json.dumps({"mean": {**mean, "roc_auc": 0.9}})) == mean
    for i, text in enumerate(("", "{}", '{"mean": 1}')):
        assert trained(f"damaged-{i}", text) is None
    assert caplog.text.count("tells nothing about the predictors") == 3


def test_speed_is_measured_between_requests(make_engine) -> None:
    engine = make_engine()
    slow_down(engine, 0.001)  # or the measurement is over before the request comes
    engine.start()
    comparison = engine.compare_speed(batch=2, rounds=100, round_tokens=4)
    with pytest.raises(InvalidRequest, match="under way"):
        engine.compare_speed()
    assert len(engine.generate((1, 2), GREEDY)) == 12
    assert not comparison.is_done  # the request went first
    while not comparison.is_done:
        time.sleep(0.01)
    speed = engine.report()["speed"]
    assert (speed["batch"], speed["decode_tokens"]) == (2, 800)
    assert speed["benchmark"]["rounds"] == 100
    assert [row["steps"] for row in engine.report()["density"]] == [11]


def test_a_measurement_that_fails_does_not_end_the_engine(
    make_engine, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(capacity: int) -> None:
        raise MemoryError(f"no room for {capacity} tokens")

    engine = make_engine()
    engine.start()
    with monkeypatch.context() as patch:
        patch.setattr(engine.model, "new_cache", no_room)
        comparison = engine.compare_speed()
        while comparison.error is None:
            time.sleep(0.01)
    assert "measuring speed failed" in caplog.text
    assert engine.report()["speed"]["benchmark"]["error"] == "MemoryError: no room for 40 tokens"
    assert engine.compare_speed(rounds=1, round_tokens=1).rounds == 1
    assert len(engine.generate((1, 2), GREEDY)) == 12


@pytest.mark.parametrize(("weights", "bits"), [("int8", 8), ("int4", 4)])
def test_bytes_of_neurons_follow_the_format_of_weights(
    make_engine, weights: str, bits: int
) -> None:
    from runtime.kernels import _cpu_ext

    report = make_engine(weights=weights).report()
    row_bytes = _cpu_ext.grouped_row_bytes(bits, 64)
    assert report["placement"]["hot_bytes"] == 0
    assert report["placement"]["cold_bytes"] == 3 * 160 * 3 * row_bytes
    assert report["memory"]["ffn_cold"] == report["placement"]["cold_bytes"]
