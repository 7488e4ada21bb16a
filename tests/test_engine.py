"""The engine end to end on tiny models: requests in, events out, limits, aborts, death, reports."""

import json
import logging
import queue
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace as Tiny

import pytest
import torch

from predictor import PredictorMismatch, PredictorSet
from predictor.checkpoint import PredictorCorrupted
from predictor.kinds import GateCopy
from runtime import Engine, EngineConfig, Request, SamplingParams, TokenEvent
from runtime import engine as engine_module
from runtime.build import predictors_pay, resolve_mode
from runtime.config import ModelConfig, usable_cpus
from runtime.errors import (
    ContextLengthExceeded,
    EngineDead,
    GenerationFailed,
    HotneuronError,
    InvalidConfig,
    InvalidRequest,
    QueueFull,
    UnsupportedModel,
)

MakeModel = Callable[..., Path]
MODES = ("dense", "exact", "predicted")
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


class Receiver:
    """Collects the events of several requests."""

    def __init__(self) -> None:
        self.events: dict[str, list[TokenEvent]] = {}
        self.ended: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.first = threading.Event()

    def __call__(self, event: TokenEvent) -> None:
        self.events.setdefault(event.request_id, []).append(event)
        self.first.set()
        if event.finish_reason is not None:
            self.ended.put(event.request_id)

    def wait(self, count: int) -> None:
        for _ in range(count):
            self.ended.get(timeout=100)

    def tokens(self, name: str) -> list[int]:
        return [e.token_id for e in self.events[name] if e.token_id is not None]


@pytest.fixture(scope="module")
def folder(make_sparse_model: MakeModel) -> Path:
    return make_sparse_model("gate", tie_word_embeddings=False, hidden_act_param=0.2)


@pytest.fixture
def make_engine(folder: Path) -> Iterator[Callable[..., Engine]]:
    made = []

    def make(model_dir: Path = folder, **settings) -> Engine:
        config = EngineConfig(model_dir, **{"threads": 1, "max_context": 128, **settings})
        made.append(Engine.from_config(config))
        return made[-1]

    yield make
    for engine in made:
        engine.stop()


def slow_down(engine: Engine, seconds: float = 0.01) -> None:
    """Make every decode step take a while, so that a test can act in the middle of an answer."""
    decode = engine.model.decode

    def slow(*args, **kwargs):
        time.sleep(seconds)
        return decode(*args, **kwargs)

    engine.model.decode = slow


@pytest.mark.parametrize("kernels", ["torch", "cpu"])
@pytest.mark.parametrize("mode", MODES)
def test_generates_what_the_model_says(make_engine, mode: str, kernels: str) -> None:
    engine = make_engine(mode=mode, kernels=kernels)
    prompt = (5, 6, 7)
    events = engine.generate(prompt, GREEDY)
    cache = engine.model.new_cache(20)
    ids = [int(engine.model.prefill(prompt, cache).argmax())]
    while len(ids) < 12:
        ids.append(int(engine.model.decode(ids[-1:], [cache], mode)[0].argmax()))
    assert [e.token_id for e in events] == ids
    assert [e.index for e in events] == list(range(12))
    assert [e.finish_reason for e in events] == [None] * 11 + ["length"]


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_a_gpu_gives_the_same_answers(make_engine, mode: str) -> None:
    """Greedy, of one request and of three at once, by the sparse kernels in recorded steps."""
    answers = []
    for device in ("cpu", "cuda"):
        engine = make_engine(mode=mode, device=device, dtype="float32")
        assert engine.model.accelerator.runs_triton == (device == "cuda")
        alone = [event.token_id for event in engine.generate((5, 6, 7), GREEDY)]
        receiver = Receiver()
        for name in ("a", "b", "c"):
            engine.submit(Request(name, tuple(b"prompt " + name.encode()), GREEDY), receiver)
        engine.start()  # they are all in its first batch
        receiver.wait(3)
        answers.append([alone, *(receiver.tokens(name) for name in ("a", "b", "c"))])
    assert answers[0] == answers[1]


def test_a_long_prompt_comes_in_parts_and_loses_no_logprob(make_engine, monkeypatch) -> None:
    monkeypatch.setattr(engine_module, "PROMPT_PART", 32)
    engine = make_engine(mode="exact")
    prompt = tuple(torch.randint(0, 256, (101,)).tolist())
    sampling = SamplingParams(temperature=0.0, max_tokens=3, prompt_logprobs=0)
    events = engine.generate(prompt, sampling)
    cache = engine.model.new_cache(104)
    parts = [prompt[start : start + 32] for start in range(0, 101, 32)]
    logits_NV = torch.cat([engine.model.prefill(p, cache, all_logits=True) for p in parts])
    assert events[0].token_id == int(logits_NV[-1].argmax())
    found = events[0].prompt_logprobs
    assert found[0] is None
    assert [p.token_id for p in found[1:]] == list(prompt[1:])
    expected_N = logits_NV.log_softmax(-1)[range(100), prompt[1:]]
    torch.testing.assert_close(torch.tensor([p.logprob for p in found[1:]]), expected_N)
    assert engine.stats.totals.prompt_tokens == 101


def test_modes(make_engine) -> None:
    answers = {}
    for mode in MODES:
        engine = make_engine(mode=mode)
        prompts = torch.randint(0, 256, (8, 6), generator=torch.Generator().manual_seed(1))
        answers[mode] = [[e.token_id for e in engine.generate(p, GREEDY)] for p in prompts.tolist()]
    assert answers["exact"] == answers["dense"]
    same = sum(a == b for a, b in zip(answers["predicted"], answers["dense"], strict=True))
    assert 4 <= same <= 8  # a predictor that is nearly, not quite, an oracle


def test_clients_at_once_get_what_they_get_alone(make_engine) -> None:
    """Batched with others or alone, greedy or seeded: the same tokens, bit for bit."""
    engine = make_engine(max_batch=4)
    requests = [
        Request(
            f"r{n}",
            tuple(range(1, 4 + n)),
            SamplingParams(temperature=n % 2, seed=n, max_tokens=5 + n, ignore_eos=True),
        )
        for n in range(10)
    ]
    alone = {
        r.id: [e.token_id for e in engine.generate(r.prompt_ids, r.sampling)] for r in requests
    }
    receiver = Receiver()
    engine.start()
    for request in requests:
        engine.submit(request, receiver)
    receiver.wait(len(requests))
    assert {r.id: receiver.tokens(r.id) for r in requests} == alone
    assert engine.report()["totals"]["finished"] == 20
    assert engine.kv_cache.blocks.num_used == 0
    assert engine.num_in_flight == 0


def test_stops_at_eos_and_delivers_it(make_engine, monkeypatch) -> None:
    engine = make_engine()
    tokens = [e.token_id for e in engine.generate((5, 6, 7), GREEDY)]
    eos = tokens[3]
    monkeypatch.setattr(engine.sampler, "_eos_token_ids", (eos,))
    end = tokens.index(eos)
    events = engine.generate((5, 6, 7), SamplingParams(temperature=0.0, max_tokens=12))
    assert [e.token_id for e in events] == tokens[: end + 1]
    assert events[-1].finish_reason == "stop"
    events = engine.generate(
        (5, 6, 7), SamplingParams(temperature=0.0, max_tokens=12, min_tokens=6)
    )
    assert len(events) >= 6


def test_logprobs_ride_along(make_engine) -> None:
    engine = make_engine(mode="dense")
    sampling = SamplingParams(temperature=0.0, max_tokens=3, num_logprobs=2, prompt_logprobs=1)
    events = engine.generate((5, 6, 7), sampling)
    assert all(e.logprobs.token_id == e.token_id == e.logprobs.top[0][0] for e in events)
    assert [len(e.logprobs.top) for e in events] == [2, 2, 2]
    prompt = events[0].prompt_logprobs
    assert prompt[0] is None
    assert [p.token_id for p in prompt[1:]] == [6, 7]
    expected_NV = torch.log_softmax(engine.model.forward([5, 6, 7]), -1)
    assert prompt[1].logprob == pytest.approx(float(expected_NV[0, 6]), abs=1e-4)
    assert events[1].prompt_logprobs is None


def test_bad_requests_are_refused_with_the_limit(make_engine) -> None:
    engine = make_engine(max_context=32)

    def submit(ids: tuple[int, ...], **sampling) -> None:
        engine.submit(Request("x", ids, SamplingParams(**sampling)), lambda e: None)

    with pytest.raises(InvalidRequest, match="empty") as caught:
        submit(())
    assert caught.value.param == "prompt"
    with pytest.raises(InvalidRequest, match="0 to 263"):
        submit((1, 264))
    with pytest.raises(InvalidRequest, match="token 999"):
        submit((1,), logit_bias={999: 1.0})
    with pytest.raises(InvalidRequest, match="token -1") as caught:
        submit((1,), stop_token_ids=(-1,), min_tokens=2)
    assert caught.value.param == "stop_token_ids"
    for ids, max_tokens in (((1,) * 32, None), ((1,) * 40, None), ((1,) * 30, 3)):
        with pytest.raises(ContextLengthExceeded, match="32 tokens") as caught:
            submit(ids, max_tokens=max_tokens)
        assert caught.value.code == "context_length_exceeded"
    assert engine.num_in_flight == 0
    events = engine.generate((1,) * 30, SamplingParams(temperature=0.0, ignore_eos=True))
    assert len(events) == 2, "no max_tokens: the room that is left"
    assert len(engine.generate((1,) * 31, GREEDY.__class__(max_tokens=1))) == 1


def test_queue_is_bounded(make_engine) -> None:
    engine = make_engine(max_batch=1, max_queue=2)
    receiver = Receiver()
    for n in range(3):
        engine.submit(Request(f"r{n}", (1, 2), GREEDY), receiver)
    with pytest.raises(QueueFull, match="3 requests"):
        engine.submit(Request("r3", (1, 2), GREEDY), receiver)
    assert engine.report()["queue"] == {"running": 0, "waiting": 3, "max_batch": 1, "max_queue": 2}
    engine.start()
    receiver.wait(3)
    engine.submit(Request("r3", (1, 2), GREEDY), receiver)
    receiver.wait(1)


def test_abort_in_every_state(make_engine) -> None:
    engine = make_engine(max_batch=1)
    slow_down(engine)
    long = SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True)
    receiver = Receiver()
    engine.submit(Request("before-start", (1, 2), long), receiver)
    engine.abort("before-start")
    engine.submit(Request("runs", (1, 2), long), receiver)
    engine.submit(Request("waits", (1, 2), long), receiver)
    engine.start()
    receiver.wait(1)
    while "runs" not in receiver.events:
        time.sleep(0.001)
    engine.abort("waits")
    engine.abort("runs")
    engine.abort("unknown")
    receiver.wait(2)
    for name in ("before-start", "waits"):
        (event,) = receiver.events[name]
        assert (event.token_id, event.finish_reason, event.index) == (None, "abort", 0)
    *tokens, last = receiver.events["runs"]
    assert (last.token_id, last.finish_reason) == (None, "abort")
    assert 0 < len(tokens) == last.index < 100
    assert engine.report()["totals"]["aborted"] == 3
    assert engine.kv_cache.blocks.num_used == 0
    assert len(engine.generate((1, 2), GREEDY)) == 12, "the engine goes on"


def test_abort_during_the_prompt(make_engine) -> None:
    engine = make_engine()
    started, go_on = threading.Event(), threading.Event()
    prefill = engine.model.prefill

    def waiting_prefill(*args, **kwargs):
        started.set()
        assert go_on.wait(10)
        return prefill(*args, **kwargs)

    engine.model.prefill = waiting_prefill
    receiver = Receiver()
    engine.start()
    engine.submit(Request("r", (1, 2), GREEDY), receiver)
    assert started.wait(10)
    engine.abort("r")
    go_on.set()
    receiver.wait(1)
    assert receiver.events["r"][-1].finish_reason == "abort"
    assert len(receiver.tokens("r")) == 1


def test_a_receiver_that_fails_ends_only_its_own_request(make_engine, caplog) -> None:
    engine = make_engine()
    receiver = Receiver()

    def broken(event: TokenEvent) -> None:
        raise RuntimeError("client went away")

    engine.start()
    engine.submit(Request("broken", (1, 2), GREEDY), broken)
    engine.submit(Request("fine", (1, 2), GREEDY), receiver)
    receiver.wait(1)
    assert len(receiver.tokens("fine")) == 12
    assert engine.is_alive()
    assert "client went away" in caplog.text


def test_death_answers_everyone_and_refuses_the_next(make_engine, caplog) -> None:
    engine = make_engine(max_batch=2)
    calls = []
    decode = engine.model.decode

    def fail_third(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("a wire came loose")
        return decode(*args, **kwargs)

    engine.model.decode = fail_third
    receiver = Receiver()
    for n in range(5):
        engine.submit(Request(f"r{n}", (1, 2), GREEDY), receiver)
    engine.start()
    receiver.wait(5)
    for events in receiver.events.values():
        assert events[-1].finish_reason == "error"
        assert "a wire came loose" in events[-1].error
    engine._thread.join(5)
    assert not engine.is_alive()
    with pytest.raises(EngineDead, match="a wire came loose"):
        engine.submit(Request("later", (1, 2), GREEDY), receiver)
    assert engine.report()["totals"]["failed"] == 5
    assert "a wire came loose" in caplog.text


def test_death_in_commit_answers_those_already_released(make_engine, monkeypatch) -> None:
    """The scheduler had let go of the sequence when the step broke; it is answered all the same."""
    engine = make_engine()
    release = engine.scheduler._release

    def release_and_fail(*args):
        release(*args)
        raise RuntimeError("broken bookkeeping")

    monkeypatch.setattr(engine.scheduler, "_release", release_and_fail)
    receiver = Receiver()
    engine.submit(Request("r", (1, 2), SamplingParams(max_tokens=1)), receiver)
    engine.start()
    receiver.wait(1)
    assert receiver.events["r"][-1].finish_reason == "error"


def test_death_inline_raises(make_engine) -> None:
    engine = make_engine()

    def fail(*args, **kwargs):
        raise RuntimeError("a wire came loose")

    engine.model.prefill = fail
    with pytest.raises(GenerationFailed, match="a wire came loose"):
        engine.generate((1, 2), GREEDY)
    with pytest.raises(EngineDead):
        engine.generate((1, 2), GREEDY)


def test_logits_that_are_not_finite_end_one_request(make_engine) -> None:
    engine = make_engine()
    prefill = engine.model.prefill
    engine.model.prefill = lambda ids, *a, **k: (
        prefill(ids, *a, **k) * (torch.nan if ids[0] == 9 else 1.0)
    )
    with pytest.raises(GenerationFailed, match="not finite"):
        engine.generate((9, 2), GREEDY)
    assert len(engine.generate((1, 2), GREEDY)) == 12


def test_stop_drains_then_aborts(make_engine) -> None:
    long = SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True)
    for drain_seconds, reason in ((20.0, "length"), (0.0, "abort")):
        engine = make_engine()
        slow_down(engine, 0.002)
        receiver = Receiver()
        engine.start()
        engine.submit(Request("r", (1, 2), long), receiver)
        assert receiver.first.wait(10)
        engine.stop(drain_seconds)
        assert receiver.events["r"][-1].finish_reason == reason
        assert not engine.is_alive()
        with pytest.raises(EngineDead, match="shutting down"):
            engine.submit(Request("s", (1, 2), long), receiver)


def test_idle_engine_sleeps(make_engine) -> None:
    engine = make_engine()
    engine.start()
    engine.generate((1, 2), GREEDY)
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.15
    assert engine.is_alive()


def test_start_twice_and_measuring_while_serving_are_refused(make_engine) -> None:
    engine = make_engine()
    engine.start()
    with pytest.raises(HotneuronError, match="started already"):
        engine.start()
    with pytest.raises(HotneuronError, match="before the engine is started"):
        engine.measure_speed("dense")


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


def test_requests_have_modes_of_their_own(make_engine) -> None:
    """In one batch each gets what an engine of its mode gives it alone."""
    prompts = torch.randint(0, 256, (9, 6), generator=torch.Generator().manual_seed(1)).tolist()
    expected = {
        mode: [[e.token_id for e in make_engine(mode=mode).generate(p, GREEDY)] for p in prompts]
        for mode in MODES
    }
    assert expected["predicted"] != expected["dense"]
    engine, receiver = make_engine(mode="dense"), Receiver()
    modes = ["predicted", "exact", None] * 3
    for n, mode in enumerate(modes):
        engine.submit(Request(f"r{n}", tuple(prompts[n]), GREEDY, mode=mode), receiver)
    engine.start()
    receiver.wait(9)
    for n, mode in enumerate(modes):
        assert receiver.tokens(f"r{n}") == expected[mode or "dense"][n]
        assert {e.usage.mode for e in receiver.events[f"r{n}"]} == {mode or "dense"}


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


def test_a_mode_or_audit_that_cannot_be_is_refused(make_engine, make_tiny_model: MakeModel) -> None:
    bare, silu = make_engine(make_tiny_model()), make_engine(make_tiny_model(hidden_act="silu"))
    for engine, wanted, param, words in (
        (bare, {"mode": "predicted"}, "sparsity.mode", "train-predictors"),
        (silu, {"mode": "exact"}, "sparsity.mode", "only mode dense"),
        (silu, {"audit": True}, "sparsity.audit", "nothing to audit"),
    ):
        with pytest.raises(InvalidRequest, match=words) as caught:
            engine.submit(Request("r", (1, 2), GREEDY, **wanted), lambda e: None)
        assert caught.value.param == param


def test_a_constrained_answer(make_engine) -> None:
    """Only what the mask allows, and an end where it is finished."""

    class Spelled:
        def __init__(self, *ids: int) -> None:
            self.rest = list(ids)

        def fill(self, bits_W: torch.Tensor) -> None:
            bits_W[self.rest[0] // 32] |= 1 << self.rest[0] % 32

        def accept(self, token_id: int) -> None:
            assert token_id == self.rest.pop(0)

        @property
        def is_finished(self) -> bool:
            return not self.rest

    engine, receiver = make_engine(), Receiver()
    engine.submit(Request("r", (5, 6, 7), GREEDY, token_mask=Spelled(9, 200, 3)), receiver)
    engine.submit(Request("free", (5, 6, 7), GREEDY), receiver)
    engine.start()
    receiver.wait(2)
    assert receiver.tokens("r") == [9, 200, 3]
    assert [e.finish_reason for e in receiver.events["r"]] == [None, None, None, "stop"]
    assert len(receiver.tokens("free")) == 12
    assert engine.kv_cache.blocks.num_used == 0


def test_mode_auto(make_engine, make_tiny_model: MakeModel) -> None:
    assert make_engine().mode == "predicted"
    bare = make_engine(make_tiny_model(hidden_act_param=0.2), audit_rate=1.0)
    assert bare.mode == "exact"
    bare.generate((1, 2), GREEDY)
    mean = bare.report()["mean"]
    assert mean["natural_sparsity"] > 0.3
    assert (mean["recall"], mean["predicted_sparsity"], mean["precision"]) == (None, None, None)
    silu = make_engine(make_tiny_model(hidden_act="silu"), audit_rate=1.0)
    assert silu.mode == "dense"
    assert len(silu.generate((1, 2), GREEDY)) == 12
    assert silu.report()["mean"]["natural_sparsity"] is None


def test_modes_that_cannot_be_are_refused(make_engine, make_tiny_model: MakeModel) -> None:
    with pytest.raises(InvalidConfig, match="train-predictors"):
        make_engine(make_tiny_model(), mode="predicted")
    for mode in ("exact", "predicted"):
        with pytest.raises(UnsupportedModel, match="hotneuron prosparse"):
            make_engine(make_tiny_model(hidden_act="silu"), mode=mode)


def test_damaged_and_foreign_predictors(
    make_engine, folder: Path, make_tiny_model: MakeModel, tmp_path: Path, caplog
) -> None:
    damaged = Path(shutil.copytree(folder, tmp_path / "damaged"))
    path = damaged / "sparsity" / "predictors.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    foreign = Path(shutil.copytree(make_tiny_model(seed=5), tmp_path / "foreign"))
    shutil.copytree(folder / "sparsity", foreign / "sparsity")
    for broken, error in ((damaged, PredictorCorrupted), (foreign, PredictorMismatch)):
        for mode in ("auto", "predicted"):
            with pytest.raises(error, match="train-predictors"):
                make_engine(broken, mode=mode)
        with caplog.at_level(logging.WARNING):
            engine = make_engine(broken, mode="exact", audit_rate=1.0)
        assert "without predictors" in caplog.text
        engine.generate((1, 2), GREEDY)
        assert engine.report()["mean"]["recall"] is None
        assert "train-predictors" in engine.report()["predictors"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_context": 1000}, "512 positions"),
        ({"max_context": 100, "kv_tokens": 50}, "--kv-tokens"),
        ({"vram_budget_bytes": 1 << 30}, "no accelerator"),
        ({"placement": Path("plan")}, "no accelerator"),
        ({"weights": "int8", "kernels": "torch"}, "C.. kernels on the host only"),
    ],
)
def test_settings_that_cannot_be(make_engine, settings: dict, words: str) -> None:
    with pytest.raises(InvalidConfig, match=words):
        make_engine(**settings)


@pytest.mark.parametrize(
    "settings",
    [{"mode": "fast"}, {"device": "tpu"}, {"dtype": "int8"}, {"kernels": "magic"}, {"threads": 0},
     {"weights": "int2"}, {"weights": "bf16", "dtype": "float32"}, {"max_batch": 0},
     {"max_queue": 0}, {"audit_rate": 1.5}, {"vram_budget_bytes": -1}],
)  # fmt: skip
def test_settings_out_of_range(settings: dict) -> None:
    with pytest.raises(InvalidConfig, match=next(iter(settings))):
        EngineConfig(Path("x"), **settings)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_refused() -> None:
    with pytest.raises(InvalidConfig, match="--device cpu"):
        EngineConfig(Path("x"), device="cuda").resolved()


def test_small_kv_budget_limits_the_context(make_engine) -> None:
    engine = make_engine(max_context=None, kv_tokens=20)
    assert engine.max_context == 20
    assert len(engine.generate((1,) * 10, SamplingParams(temperature=0.0, ignore_eos=True))) == 10


def test_resolved_settings(folder: Path, make_engine) -> None:
    engine = make_engine(threads=None)
    assert engine.config.threads == usable_cpus() == torch.get_num_threads()
    assert engine.config.kv_tokens == 16 * 128
    assert engine.model_name == folder.name
    assert make_engine(model_name="mine").model_name == "mine"


def test_resolve_mode_is_pure(tiny: Tiny) -> None:
    sparse = ModelConfig.from_hf(tiny.config())
    dense = ModelConfig.from_hf(tiny.config(hidden_act="silu"))
    assert resolve_mode("auto", sparse, True) == "predicted"
    assert resolve_mode("auto", sparse, False) == "exact"
    assert resolve_mode("auto", dense, False) == "dense"
    assert resolve_mode("dense", sparse, True) == "dense"
    assert resolve_mode("auto", sparse, True, predictors_pay=False) == "exact"
    assert resolve_mode("predicted", sparse, True, predictors_pay=False) == "predicted"


@pytest.mark.parametrize(
    ("kind_bits", "pays"), [(4, [True, True, False]), (8, [True, False, False])]
)
def test_auto_leaves_out_copies_of_the_gate_that_are_as_large(
    kind_bits: int, pays: list[bool]
) -> None:
    predictors = PredictorSet([GateCopy.of(torch.randn(5, 64), kind_bits, 0.2)])
    assert [predictors_pay(predictors, weights) for weights in ("auto", "int8", "int4")] == pays
