"""Every request is answered: after an abort, a failure, the engine's death, a stop."""

import threading
import time

import pytest
import torch

from runtime import Request, SamplingParams, TokenEvent
from runtime.errors import EngineDead, GenerationFailed, HotneuronError
from tests.engine.support import GREEDY, Receiver, slow_down


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
