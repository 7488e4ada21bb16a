"""Many requests: together as alone, within the bounds, refused by name."""

import pytest

from runtime import Request, SamplingParams
from runtime.errors import ContextLengthExceeded, InvalidRequest, QueueFull
from tests.engine.support import GREEDY, Receiver


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
