"""The running audit: what it finds, how often it looks, what it leaves alone."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace as Tiny

import pytest
import torch

from runtime import Request, SamplingParams
from tests.engine.support import GREEDY, MODES, Receiver

MakeModel = Callable[..., Path]


def test_audit_finds_what_the_predictor_misses(make_engine, folder: Path, tiny: Tiny) -> None:
    """The report equals the definition applied to the same tokens, in every mode."""
    from predictor import RecallMeter

    weights = tiny.weights(tiny.config(tie_word_embeddings=False))
    predictors = tiny.predictors(folder, "gate")
    for mode in MODES:
        engine = make_engine(mode=mode, audit_rate=1.0, dtype="float32")
        events = engine.generate((5, 6, 7), GREEDY)
        report = engine.report()
        meter = RecallMeter(3)
        cache = engine.model.new_cache(20)
        engine.model.prefill((5, 6, 7), cache)

        def tap(layer: int, x_ND: torch.Tensor, meter=meter, engine=engine) -> None:
            gate, up, down = (
                weights[f"model.layers.{layer}.mlp.{name}_proj.weight"]
                for name in ("gate", "up", "down")
            )
            gate_NF = x_ND @ gate.T
            h_NF = torch.where(gate_NF > 0.2, gate_NF, 0.0) * (x_ND @ up.T)
            selected_NF = predictors.layers[layer].select(x_ND)
            meter.add(layer, h_NF, selected_NF, down.norm(dim=0))

        for event in events[:-1]:
            engine.model.decode([event.token_id], [cache], mode, tap=tap)
        expected = meter.report()
        assert report["mean"]["audited_tokens"] == 11
        for row, wanted in zip(report["layers"], expected["layers"], strict=True):
            for key in ("natural_sparsity", "predicted_sparsity", "recall", "energy_recall"):
                assert row[key] == pytest.approx(wanted[key], abs=1e-4), (mode, key)
        assert 0.9 < report["mean"]["recall"] < 1.0


def test_audit_rate_is_the_share_of_steps(make_engine) -> None:
    sampling = SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True)
    for rate, low, high in ((0.0, 0, 0), (0.3, 15, 45)):
        engine = make_engine(audit_rate=rate)
        engine.generate((1, 2), sampling)
        assert low <= engine.report()["mean"]["audited_tokens"] <= high
        assert (engine.stats.times.audit_s > 0) == (rate > 0)


def test_audit_does_not_change_the_answer(make_engine) -> None:
    answers = [
        [e.token_id for e in make_engine(audit_rate=rate).generate((1, 2), GREEDY)]
        for rate in (0.0, 1.0)
    ]
    assert answers[0] == answers[1]


def test_a_request_may_ask_for_an_audit(make_engine, make_tiny_model: MakeModel) -> None:
    """Of its own tokens, whatever the batch; the engine's report stays as it is sampled."""
    engine, receiver = make_engine(mode="exact"), Receiver()
    engine.submit(Request("plain", (1, 2), GREEDY), receiver)
    engine.submit(Request("audited", (5, 6, 7), GREEDY, audit=True), receiver)
    engine.start()
    receiver.wait(2)
    assert receiver.events["plain"][-1].usage.audit is None
    figures = receiver.events["audited"][-1].usage.audit
    watched = make_engine(mode="exact", audit_rate=1.0)
    watched.generate((5, 6, 7), GREEDY)
    mean = watched.report()["mean"]
    assert figures["tokens"] == mean["audited_tokens"] == 11
    for key in ("natural_sparsity", "predicted_sparsity", "recall", "energy_recall", "precision"):
        assert figures[key] == pytest.approx(mean[key]), key
    assert engine.report()["mean"]["audited_tokens"] == 0
    bare = make_engine(make_tiny_model(hidden_act_param=0.2))
    bare.submit(Request("r", (1, 2), GREEDY, audit=True), receiver)
    bare.start()
    receiver.wait(1)
    figures = receiver.events["r"][-1].usage.audit
    assert figures["natural_sparsity"] > 0.3
    assert (figures["recall"], figures["predicted_sparsity"]) == (None, None)


def test_tokens_that_are_not_finite_end_their_own_request_alone(make_engine) -> None:
    """They are counted, and neither audit nor guard nor sink learns anything of them."""
    ids = make_engine(audit_rate=1.0).generate((1, 2), GREEDY)
    receiver = Receiver()
    engine = make_engine(audit_rate=1.0, recall_floor=0.5)
    kept: list[int] = []
    engine.audit.sink = lambda names, layers: kept.append(len(layers[0][0]))
    broken = next(n for n in range(3, 200) if n not in {1, 2, *(e.token_id for e in ids)})
    engine.model._embed_VD[broken] = torch.nan
    forced = SamplingParams(temperature=0.0, max_tokens=5, logit_bias={broken: 100.0})
    engine.submit(Request("whole", (1, 2), GREEDY, audit=True), receiver)
    engine.submit(Request("broken", (5, 6, 7), forced, audit=True), receiver)
    engine.start()
    receiver.wait(2)
    end = receiver.events["broken"][-1]
    assert (end.finish_reason, end.error) == ("error", "the model's logits are not finite")
    assert end.usage is not None
    assert end.usage.audit["tokens"] == 0
    assert receiver.tokens("whole") == [e.token_id for e in ids]
    assert receiver.events["whole"][-1].usage.audit["tokens"] == 11
    report = engine.report()
    assert [row["nonfinite_tokens"] for row in report["layers"]] == [1, 1, 1]
    assert (report["mean"]["nonfinite_tokens"], report["mean"]["audited_tokens"]) == (1, 11)
    assert 0.9 < report["mean"]["recall"] <= 1.0
    assert all(0.9 < row["recent_recall"] <= 1.0 for row in report["layers"])
    assert sum(kept) == 10  # the step that they shared was left out
    assert engine.is_alive()
