"""The drift guard: one bad layer falls back, the others stay; what it changed shows."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace as Tiny
from typing import Any

import pytest
import torch

from predictor import PredictorSet, fingerprint, save_predictors
from runtime import Engine, EngineConfig, SamplingParams
from runtime.drift_guard import MIN_TOKENS, needed_thresholds
from runtime.errors import InvalidConfig
from server.figures import guard_notes
from server.metrics import Metrics

MakeModel = Callable[..., Path]
LONG = SamplingParams(temperature=0.0, max_tokens=MIN_TOKENS + 40, ignore_eos=True)
SHORT = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True, num_logprobs=1)
PROMPTS = ((5, 6, 7), (90, 14), (200, 1, 30, 77))


@pytest.fixture
def make_engine(make_tiny_model: MakeModel, tiny: Tiny, tmp_path: Path) -> Callable[..., Engine]:
    """make_engine({layer: predictor}, **settings): the other layers' predictors miss nothing."""

    def make(bad: dict[int, Any], **settings: Any) -> Engine:
        folder = tmp_path / f"model-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(make_tiny_model(hidden_act_param=0.2), folder)
        layers = list(tiny.predictors(folder, "all").layers)
        for layer, predictor in bad.items():
            layers[layer] = predictor
        manifest = {"fingerprint": fingerprint(folder), "made": {"by": "tests"}}
        save_predictors(folder / "sparsity", PredictorSet(layers, manifest))
        config = EngineConfig(folder, audit_rate=1.0, dtype="float32", threads=1, **settings)
        return Engine.from_config(config)

    return make


@pytest.fixture
def gate(make_tiny_model: MakeModel, tiny: Tiny) -> PredictorSet:
    return tiny.predictors(make_tiny_model(hidden_act_param=0.2), "gate")


def states(engine: Engine) -> list[str | None]:
    return [layer["guard"] for layer in engine.report()["layers"]]


@pytest.mark.parametrize("kernels", ["cpu", "torch"])
def test_a_useless_predictor_falls_back_to_exact_on_its_layer_only(
    make_engine: Callable[..., Engine], make_tiny_model: MakeModel, tiny: Tiny,
    caplog: pytest.LogCaptureFixture, kernels: str,
) -> None:  # fmt: skip
    none = tiny.predictors(make_tiny_model(hidden_act_param=0.2), "none").layers[1]
    guarded = make_engine({1: none}, recall_floor=0.9, kernels=kernels)
    exact = make_engine({1: none}, mode="exact", kernels=kernels)
    assert states(guarded) == ["ok", "ok", "ok"]

    def answers(engine: Engine) -> list[Any]:
        events = [engine.generate(prompt, SHORT) for prompt in PROMPTS]
        return [[(e.token_id, e.logprobs) for e in answer] for answer in events]

    wanted = answers(exact)
    assert answers(guarded) != wanted
    with caplog.at_level(logging.WARNING):
        guarded.generate((1, 2), LONG)
        guarded.generate((3, 4), LONG)
    assert states(guarded) == ["ok", "exact", "ok"]
    messages = [r.getMessage() for r in caplog.records if "drift guard" in r.getMessage()]
    assert ["layer 1" in message for message in messages] == [True, True]
    assert "lowered from 0 to -1" in messages[0]  # then it selected everything, in vain
    assert "100 % of the neurons selected" in messages[1]
    assert "all its gates" in messages[1]
    assert answers(guarded) == wanted
    row = guarded.report()["layers"][1]
    assert row["recent_recall"] == 1.0


def test_a_threshold_that_is_too_high_is_lowered_and_recall_recovers(
    make_engine: Callable[..., Engine], gate: PredictorSet, caplog: pytest.LogCaptureFixture
) -> None:
    high = gate.layers[2].with_threshold(1.0)  # misses the weaker half
    unguarded = make_engine({2: high})
    unguarded.generate((1, 2), LONG)
    assert unguarded.report()["layers"][2]["recall"] < 0.7
    engine = make_engine({2: high}, recall_floor=0.9)
    with caplog.at_level(logging.WARNING):
        for prompt in PROMPTS:
            engine.generate(prompt, LONG)
    assert states(engine) == ["ok", "ok", "lowered"]
    assert [r.getMessage().count("threshold was lowered") for r in caplog.records] == [1]
    row = engine.report()["layers"][2]
    assert row["recent_recall"] > 0.9
    x_ND = torch.randn(20, 64)
    ffn = engine.model.layers[2].ffn
    selected_NF = ffn.select(x_ND)
    assert selected_NF.float().mean() < 0.85  # it still skips
    assert torch.equal(selected_NF, ffn.predictor.select(x_ND))  # prompts see the same threshold


def test_what_lowering_does_not_mend_becomes_exact(
    make_engine: Callable[..., Engine], gate: PredictorSet
) -> None:
    """After the threshold was lowered the predictor goes blind."""
    engine = make_engine({0: gate.layers[0].with_threshold(1.0)}, recall_floor=0.9)
    engine.generate((1, 2), LONG)
    assert states(engine) == ["lowered", "ok", "ok"]
    engine.model.layers[0].ffn.set_threshold(1.0)
    engine.generate((3, 4), LONG)
    engine.generate((3, 4), LONG)
    assert states(engine) == ["exact", "ok", "ok"]


def test_the_same_traffic_decides_the_same(
    make_engine: Callable[..., Engine], gate: PredictorSet
) -> None:
    answers = []
    for _ in range(2):
        engine = make_engine({2: gate.layers[2].with_threshold(1.0)}, recall_floor=0.9)
        answers.append([[e.token_id for e in engine.generate(p, LONG)] for p in PROMPTS])
    assert answers[0] == answers[1]


def test_good_predictors_are_left_alone(
    make_engine: Callable[..., Engine], gate: PredictorSet
) -> None:
    engine = make_engine(dict(enumerate(gate.layers)), recall_floor=0.9)
    for prompt in PROMPTS:
        engine.generate(prompt, LONG)
    assert states(engine) == ["ok", "ok", "ok"]
    assert all(row["recent_recall"] > 0.9 for row in engine.report()["layers"])


def test_a_split_layer_is_guarded_as_a_whole(
    make_tiny_model: MakeModel, gate: PredictorSet
) -> None:
    from runtime.model import Model
    from runtime.placement import Placement

    folder = make_tiny_model(hidden_act_param=0.2)
    order_LF = torch.stack([torch.randperm(160) for _ in range(3)])
    whole = Model.from_folder(folder, predictors=gate, dtype="float32")
    split = Model.from_folder(
        folder, predictors=gate, dtype="float32", placement=Placement(order_LF, (80, 0, 160)),
        kernels="cpu",
    )  # fmt: skip
    x_ND = torch.randn(9, 64)
    for layer in range(3):
        ours, theirs = split.layers[layer].ffn, whole.layers[layer].ffn
        scores_NF = theirs.scores(x_ND)[:, order_LF[layer]]
        torch.testing.assert_close(ours.scores(x_ND), scores_NF, rtol=1e-4, atol=1e-4)
        ours.set_threshold(1.5)
        is_clear_NF = (scores_NF - 1.5).abs() > 1e-3
        assert torch.equal(ours.select(x_ND)[is_clear_NF], (scores_NF > 1.5)[is_clear_NF])


def test_needed_thresholds_find_the_target() -> None:
    score_NF = torch.tensor([[4.0, 3.0, 2.0, 1.0, 9.0], [1.0, 2.0, 3.0, 4.0, 5.0]])
    h_NF = torch.tensor([[1.0, 1.0, 1.0, 1.0, 0.0], [0.0] * 5])
    for target, found in ((0.75, 3), (0.7, 3), (1.0, 4)):
        (threshold,) = needed_thresholds(score_NF, h_NF, target)
        assert int((score_NF[0, :4] > threshold).sum()) == found


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"recall_floor": 1.0}, "between 0 and 1"),
        ({"recall_floor": 0.9, "audit_rate": 0.0}, "needs the audit"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, float], message: str) -> None:
    with pytest.raises(InvalidConfig, match=message):
        EngineConfig(Path("model"), **settings)


def test_a_floor_needs_predictors(make_engine: Callable[..., Engine]) -> None:
    with pytest.raises(InvalidConfig, match="--sparsity predicted"):
        make_engine({}, mode="exact", recall_floor=0.9)


def test_it_shows_in_metrics_and_reports(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine({}, recall_floor=0.9)
    assert engine.guard is not None
    engine.guard.states[1:] = ["lowered", "exact"]
    text = Metrics("tiny", engine.report).exposition().decode()
    for layer, level in enumerate((0.0, 1.0, 2.0)):
        line = f'hotneuron_ffn_guard_level{{layer="{layer}",model_name="tiny"}} {level}'
        assert line in text
    assert guard_notes(engine.report()["layers"]) == [
        "Drift guard: threshold lowered in layer 1.",
        "Drift guard: all gates computed in layer 2.",
    ]
    off = make_engine({})
    assert states(off) == [None, None, None]
    assert "guard_level{" not in Metrics("tiny", off.report).exposition().decode()
    assert guard_notes(off.report()["layers"]) == []
