"""The accelerator fails in the middle of a request: the request gets an error, nothing hangs, and
the engine ends or goes on with the CPU. A fault is put into an accelerator that is the CPU."""

import queue
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hotneuron.serving import CRASHED, serve_until_stopped
from runtime import Engine, EngineConfig, Request, SamplingParams, TokenEvent
from runtime.accelerator import HostAccelerator, Pending
from runtime.build import build
from runtime.errors import AcceleratorLost, EngineDead
from runtime.model import Model
from runtime.placement import Placement

MakeModel = Callable[..., Path]
PROMPT = tuple(range(20))
SAMPLING = SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True)


class Failing(HostAccelerator):
    """Raises on each start from the `after`-th on."""

    def __init__(self, error: Exception, after: int) -> None:
        super().__init__()
        self._error, self._left = error, after

    def start(self, work: Callable[[], torch.Tensor]) -> Pending[torch.Tensor]:
        self._left -= 1
        if self._left < 0:
            raise self._error
        return super().start(work)


def failing_engine(
    folder: Path, monkeypatch: pytest.MonkeyPatch, on_gpu_loss: str, error: Exception
) -> Engine:
    config = EngineConfig(folder, threads=1, on_gpu_loss=on_gpu_loss, audit_rate=0.0)
    parts = build(config)
    split = Placement(torch.arange(160).repeat(3, 1), (80, 40, 80))
    with monkeypatch.context() as patch:
        patch.setattr("runtime.model.new_accelerator", lambda device: Failing(error, 30))
        model = Model.from_folder(
            folder, kernels="cpu", placement=split, predictors=parts.predictors, max_context=128
        )
    return Engine(replace(parts, model=model))


def ask(engine: Engine, name: str) -> list[TokenEvent]:
    """All events of one request, which must come within seconds."""
    events: queue.SimpleQueue[TokenEvent] = queue.SimpleQueue()
    engine.submit(Request(name, PROMPT, SAMPLING), events.put)
    got = [events.get(timeout=20)]
    while got[-1].finish_reason is None:
        got.append(events.get(timeout=20))
    return got


LOSSES = [AcceleratorLost, torch.OutOfMemoryError, torch.AcceleratorError]


@pytest.mark.parametrize("kind", LOSSES)
def test_the_request_fails_and_the_server_ends(
    make_sparse_model: MakeModel, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    engine = failing_engine(make_sparse_model(), monkeypatch, "exit", kind("it is gone"))
    engine.start()
    events = ask(engine, "one")
    assert len(events) > 3, "it failed in the middle of the answer"
    assert events[-1].finish_reason == "error"
    assert "it is gone" in (events[-1].error or "")
    assert not engine.is_alive()
    assert not engine.is_recovering
    with pytest.raises(EngineDead):
        ask(engine, "two")
    monkeypatch.setattr("hotneuron.serving.CRASH_SECONDS", 0.0)
    signals = SimpleNamespace(received=None)
    assert serve_until_stopped(engine, SimpleNamespace(), signals, 1.0) == CRASHED


@pytest.mark.parametrize("kind", LOSSES[:2])
def test_the_request_fails_and_the_cpu_takes_over(
    make_sparse_model: MakeModel, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    folder = make_sparse_model()
    engine = failing_engine(folder, monkeypatch, "cpu", kind("it is gone"))
    seen_alive: list[tuple[bool, bool]] = []

    def watched(config: EngineConfig) -> object:
        seen_alive.append((engine.is_alive(), engine.is_recovering))
        return build(config)

    monkeypatch.setattr("runtime.engine.build", watched)
    engine.start()
    events = ask(engine, "one")
    assert events[-1].finish_reason == "error"
    assert "send the request again" in (events[-1].error or "")
    deadline = time.monotonic() + 20
    while not engine.is_alive():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert seen_alive == [(False, True)], "not ready while the model is loaded, but not dead"
    assert not engine.is_recovering
    answer = [event.token_id for event in ask(engine, "two")]
    fresh = Engine(build(EngineConfig(folder, threads=1, audit_rate=0.0)))
    assert answer == [event.token_id for event in fresh.generate(PROMPT, SAMPLING)]
    assert engine.report()["placement"]["hot_neurons"] == [0, 0, 0]
    engine.stop()
    assert not engine.is_alive()


def test_other_errors_end_it_even_so(
    make_sparse_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = failing_engine(make_sparse_model(), monkeypatch, "cpu", RuntimeError("a bug"))
    engine.start()
    assert ask(engine, "one")[-1].finish_reason == "error"
    assert not engine.is_alive()
    assert not engine.is_recovering
