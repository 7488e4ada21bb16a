"""What comes out for one request: tokens, log probabilities, the end."""

import pytest
import torch

from runtime import Request, SamplingParams
from runtime import engine as engine_module
from tests.engine.support import GREEDY, MODES, Receiver


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
