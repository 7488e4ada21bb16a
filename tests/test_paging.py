"""The engine with little cache room: answers are those of an engine with plenty, to the bit."""

import queue
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from runtime import Engine, EngineConfig, Request, SamplingParams, TokenEvent
from runtime import engine as engine_module
from runtime.kv_cache import BLOCK

MakeModel = Callable[..., Path]
MODES = ("dense", "exact", "predicted")
PART = 128  # of a prompt, read at once: the tiny model's context is short
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, num_logprobs=2, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(make_sparse_model: MakeModel) -> Path:
    return make_sparse_model("gate", tie_word_embeddings=False, hidden_act_param=0.2)


@pytest.fixture(autouse=True)
def _short_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "PROMPT_PART", PART)


@pytest.fixture
def make_engine(folder: Path) -> Iterator[Callable[..., Engine]]:
    made = []

    def make(**settings) -> Engine:
        made.append(Engine.from_config(EngineConfig(folder, **{"threads": 1, **settings})))
        return made[-1]

    yield make
    for engine in made:
        engine.stop()


def prompt(num_tokens: int, seed: int = 0) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(0, 256, (num_tokens,), generator=generator).tolist())


def serve(engine: Engine, requests: list[Request]) -> dict[str, list[TokenEvent]]:
    """All at once, on this thread; the events of each."""
    events: dict[str, list[TokenEvent]] = {request.id: [] for request in requests}
    for request in requests:
        engine.submit(request, lambda event: events[event.request_id].append(event))
    while engine.step():
        pass
    assert all(row[-1].finish_reason for row in events.values())
    assert engine.kv_cache.blocks.num_used == 0
    assert engine.num_in_flight == 0
    return events


def answers(events: dict[str, list[TokenEvent]]) -> dict[str, list]:
    """Tokens and their log probabilities, to the bit."""
    return {name: [(e.token_id, e.logprobs, e.index) for e in row] for name, row in events.items()}


@pytest.mark.parametrize("threads", [1, 2])
def test_preemption_changes_no_bit(make_engine, threads: int) -> None:
    """Greedy and seeded, in every mode, beside others and alone."""
    requests = [
        Request(
            f"r{n}",
            prompt(20 + 7 * n, seed=n),
            replace(GREEDY, temperature=n % 2, seed=n, max_tokens=100, frequency_penalty=0.5),
            mode=MODES[n % 3],
            audit=n == 5,
        )
        for n in range(6)
    ]
    roomy = make_engine()
    alone = {}
    for request in requests:
        alone |= answers(serve(roomy, [request]))
    assert roomy.stats.totals.preemptions == 0
    tight = make_engine(kv_tokens=8 * BLOCK, threads=threads)
    events = serve(tight, requests)
    assert answers(events) == alone
    assert events["r5"][-1].usage.audit["tokens"] == 99, "none twice"
    assert tight.stats.totals.preemptions > 0
    assert tight.stats.totals.generated_tokens == 600


def test_a_prompt_found_in_the_cache_changes_no_bit(make_engine) -> None:
    """In all modes, whoever read it first, and after its blocks were taken by others."""
    engine = make_engine(kv_tokens=20 * BLOCK, max_context=512)
    head = prompt(2 * PART + 30)
    requests = [
        Request(f"{mode}-{n}", head[:num_head] + prompt(tail, seed=n), GREEDY, mode=mode)
        for mode in MODES
        for n, (num_head, tail) in enumerate(
            [(len(head), 9), (2 * PART, 1), (PART + 1, 60), (100, PART)]
        )
    ]
    fresh = {}
    for request in requests:
        (row,) = serve(make_engine(max_context=512), [request]).values()
        assert row[0].usage.cached_tokens == 0
        fresh |= answers({request.id: row})
    cached = []
    for order in (requests, requests[::-1]):
        events = serve(engine, order)
        assert answers(events) == fresh
        cached += [row[0].usage.cached_tokens for row in events.values()]
    assert {0, PART, 2 * PART} < set(cached)
    assert {len(r.prompt_ids) for r in requests} & set(cached), "equal prompts, other modes"
    totals = engine.stats.totals
    assert totals.prefix_hit_tokens == sum(cached)
    assert totals.prompt_tokens + totals.prefix_hit_tokens == totals.prefix_queried_tokens
    assert totals.prefix_queried_tokens == 2 * sum(len(r.prompt_ids) for r in requests)


def test_answers_to_one_prompt_share_it(make_engine) -> None:
    engine = make_engine(max_context=512)
    ids = prompt(2 * PART + 5)
    sampling = replace(GREEDY, temperature=1.0)
    requests = [Request(f"r{n}", ids, replace(sampling, seed=n)) for n in range(4)]
    most = 0
    step = engine.scheduler.next_batch

    def watched():
        nonlocal most
        most = max(most, engine.kv_cache.blocks.num_used)
        return step()

    engine.scheduler.next_batch = watched
    events = serve(engine, requests)
    assert len({tuple(e.token_id for e in row) for row in events.values()}) == 4
    assert [row[-1].usage.cached_tokens for row in events.values()] == [0, *[len(ids)] * 3]
    assert most == 2 * PART // BLOCK + 4
    assert engine.stats.totals.prompt_tokens == len(ids)
    alone = {}
    for request in requests:
        alone |= answers(serve(make_engine(max_context=512), [request]))
    assert answers(events) == alone


def test_a_salt_keeps_a_prompt_from_others(make_engine) -> None:
    """Equal prompts share it within a salt alone; the answers are the same."""
    engine = make_engine(max_context=512)
    ids = prompt(PART + 5)
    salts = ("", "a", "b", "a", "")
    events = {}
    for n, salt in enumerate(salts):  # one after the other: what was found does not hang on time
        events |= serve(engine, [Request(f"r{n}", ids, GREEDY, cache_salt=salt)])
    assert [row[-1].usage.cached_tokens for row in events.values()] == [0, 0, 0, *[len(ids)] * 2]
    assert len({tuple(e.token_id for e in row) for row in events.values()}) == 1


def test_prompt_logprobs_are_complete_beside_the_cache(make_engine) -> None:
    engine = make_engine(max_context=512)
    ids = prompt(PART + 9)
    (first,) = serve(engine, [Request("a", ids, GREEDY)]).values()
    sampling = replace(GREEDY, prompt_logprobs=1)
    (second,) = serve(engine, [Request("b", ids, sampling)]).values()
    assert [p.token_id for p in second[0].prompt_logprobs[1:]] == list(ids[1:])
    assert [e.token_id for e in first] == [e.token_id for e in second]


def test_prompt_logprobs_come_once_whatever_is_preempted(make_engine) -> None:
    sampling = replace(GREEDY, prompt_logprobs=0, max_tokens=60)
    requests = [Request(f"r{n}", prompt(50 + n, seed=n), sampling) for n in range(4)]
    roomy, tight = make_engine(), make_engine(kv_tokens=5 * BLOCK)
    expected, found = serve(roomy, requests), serve(tight, requests)
    assert tight.stats.totals.preemptions > 0
    for name, row in found.items():
        assert [e.prompt_logprobs for e in row] == [e.prompt_logprobs for e in expected[name]]
        assert row[0].prompt_logprobs is not None


def test_an_abort_frees_its_blocks_within_a_step(make_engine) -> None:
    """In the queue, in the middle of its prompt, while decoding, and while preempted."""
    engine = make_engine(kv_tokens=8 * BLOCK, max_context=8 * BLOCK, max_batch=2)
    blocks, events = engine.kv_cache.blocks, []
    ids = prompt(PART + 40)
    for name in ("reads", "waits"):
        engine.submit(Request(name, ids, GREEDY), events.append)
    engine.step()
    assert engine.scheduler.reading.id == "reads"
    assert blocks.num_used == 6
    for name in ("waits", "reads"):
        engine.abort(name)
    assert not engine.step()
    assert [(e.request_id, e.finish_reason) for e in events] == [
        ("waits", "abort"), ("reads", "abort"),
    ]  # fmt: skip
    assert blocks.num_used == 0
    long = replace(GREEDY, max_tokens=150)
    for name in ("old", "young"):
        engine.submit(Request(name, prompt(20), long), events.append)
    while not engine.scheduler.preempted:
        assert engine.step()
    engine.abort("young")
    engine.abort("old")
    assert not engine.step()
    assert [e.request_id for e in events if e.finish_reason][2:] == ["young", "old"]
    assert blocks.num_used == 0
    report = engine.report()
    assert report["kv_blocks"] == {"used": 0, "kept": 1, "total": 8}, "the first was evicted"
    assert (report["queue"]["running"], report["queue"]["waiting"]) == (0, 0)


def test_the_gauges_of_a_dead_engine_are_zero(make_engine) -> None:
    engine, events = make_engine(), []

    def fail(*args, **kwargs):
        raise RuntimeError("a wire came loose")

    engine.model.decode = fail
    for n in range(3):
        engine.submit(Request(f"r{n}", prompt(9), GREEDY), events.append)
    engine.start()
    engine._thread.join(20)
    assert [e.finish_reason for e in events if e.finish_reason] == ["error"] * 3
    assert not engine.is_alive()
    report = engine.report()
    assert (report["queue"]["running"], report["queue"]["waiting"]) == (0, 0)
    assert report["kv_blocks"]["used"] == 0


def test_a_crowd_with_random_aborts(make_engine) -> None:
    """Clients in threads, little room, some give up: the others get what they get alone, and
    nothing stays behind."""
    rng = random.Random(0)
    requests = [
        Request(
            f"r{n}",
            prompt(rng.choice([5, 30, PART + 3]), seed=rng.randrange(4)),
            replace(GREEDY, temperature=n % 2, seed=n, max_tokens=rng.randrange(30, 60)),
            client=f"c{n % 3}",
            mode=rng.choice(MODES),
        )
        for n in range(40)
    ]
    roomy = make_engine(max_context=256)
    alone = {}
    for request in requests:
        alone |= answers(serve(roomy, [request]))
    engine = make_engine(kv_tokens=7 * BLOCK, max_context=7 * BLOCK, max_batch=6, max_queue=60)
    events: dict[str, list[TokenEvent]] = {request.id: [] for request in requests}
    ended = queue.SimpleQueue()

    def receive(event: TokenEvent) -> None:
        row = events[event.request_id]
        row.append(event)
        if len(row) == 3 and event.request_id.endswith("3"):
            engine.abort(event.request_id)
        if event.finish_reason is not None:
            ended.put(event.request_id)

    def submit(part: list[Request]) -> None:
        for request in part:
            engine.submit(request, receive)
            if request.id.endswith("7"):
                engine.abort(request.id)

    engine.start()
    threads = [threading.Thread(target=submit, args=(requests[n::3],)) for n in range(3)]
    for thread in threads:
        thread.start()
    for _ in requests:
        ended.get(timeout=60)
    for name, found in answers(events).items():
        if events[name][-1].finish_reason == "abort":
            assert name[-1] in "37"
            assert found[:-1] == alone[name][: len(found) - 1]
        else:
            assert found == alone[name]
    totals, report = engine.stats.totals, engine.report()
    assert totals.preemptions > 0, "there was little room"
    assert totals.prefix_hit_tokens > 0, "there are few prompts"
    assert totals.finished + totals.aborted == 40
    assert (report["queue"]["running"], report["queue"]["waiting"]) == (0, 0)
    assert report["kv_blocks"]["used"] == engine.num_in_flight == 0
