"""Scheduling policy, bounds and aborts on plain sequences: no model, no threads."""

from types import SimpleNamespace as Tiny

import pytest
import torch

from runtime.config import ModelConfig
from runtime.errors import EngineDead, InvalidRequest, QueueFull
from runtime.inbox import Inbox
from runtime.kv_cache import KVCache, bytes_per_token
from runtime.scheduler import PROMPT_PART, Scheduler
from runtime.sequence import Request, Sample, SamplingParams, Sequence, Status

STOP_ID = 7


def sequence(
    name: str, prompt: int = 3, max_tokens: int = 4, client: str = "", **sampling: object
) -> Sequence:
    request = Request(name, tuple(range(prompt)), SamplingParams(**sampling), client)
    return Sequence(request, max_tokens, "dense", on_event=lambda event: None)


@pytest.fixture
def make(tiny: Tiny):
    def make(kv_tokens: int = 1000, max_batch: int = 4) -> Scheduler:
        config = ModelConfig.from_hf(tiny.config())
        cache = KVCache(config, kv_tokens, torch.float32, torch.device("cpu"))
        return Scheduler(cache, max_batch, lambda s: {STOP_ID, *s.stop_token_ids})

    return make


def tokens(batch, token_id: int = 1) -> list[Sample]:
    return [Sample(token_id) for _ in batch.sequences]


def test_prompts_alternate_with_decode(make) -> None:
    scheduler = make()
    for name in "abc":
        scheduler.add(sequence(name, max_tokens=10))
    kinds = []
    for _ in range(6):
        batch = scheduler.next_batch()
        kinds.append((batch.is_prefill, "".join(s.id for s in batch.sequences)))
        scheduler.commit(batch, tokens(batch))
    assert kinds == [
        (True, "a"), (False, "a"), (True, "b"), (False, "ab"), (True, "c"), (False, "abc"),
    ]  # fmt: skip


def test_a_long_prompt_is_read_in_parts_between_decode_steps(make) -> None:
    scheduler = make(max_batch=2)
    long = sequence("b", prompt=2 * PROMPT_PART + 9, max_tokens=2)
    for s in (sequence("a", max_tokens=20), long, sequence("c")):
        scheduler.add(s)
    steps = []
    for _ in range(8):
        batch = scheduler.next_batch()
        part = batch.prompt_part
        steps.append(("".join(s.id for s in batch.sequences), part and (part.start, part.stop)))
        if not batch.leaves_prompt_open:
            scheduler.commit(batch, tokens(batch))
    assert steps == [
        ("a", (0, 3)), ("a", None),
        ("b", (0, PROMPT_PART)), ("a", None),
        ("b", (PROMPT_PART, 2 * PROMPT_PART)), ("a", None),
        ("b", (2 * PROMPT_PART, 2 * PROMPT_PART + 9)), ("ab", None),
    ]  # fmt: skip
    assert long.finish_reason == "length"  # its second token came in the last step
    assert scheduler.next_batch().sequences[0].id == "c", "a slot is free"


def test_a_prompt_under_way_can_be_aborted(make) -> None:
    scheduler = make()
    scheduler.add(sequence("a", prompt=PROMPT_PART + 1))
    scheduler.next_batch()
    assert scheduler.num_admitted == 1
    ((a, event),) = scheduler.abort("a")
    assert (event.finish_reason, event.token_id, a.cache) == ("abort", None, None)
    assert not scheduler.has_work
    assert scheduler.next_batch() is None
    assert scheduler._kv_cache.free_tokens == 1000


def test_clients_take_turns(make) -> None:
    scheduler = make(max_batch=1)
    for name in ("a1", "a2", "a3", "b1", "c1", "b2"):
        scheduler.add(sequence(name, max_tokens=1, client=name[0]))
    scheduler.abort("b1")
    order = []
    while (batch := scheduler.next_batch()) is not None:
        order.append(batch.sequences[0].id)
        scheduler.commit(batch, tokens(batch))
        if len(order) == 2:
            scheduler.add(sequence("d1", max_tokens=1, client="d"))
    assert order == ["a1", "b2", "c1", "a2", "d1", "a3"]


def test_sequences_of_one_mode_stand_together(make) -> None:
    scheduler = make()
    for name, mode in zip("abcd", ("exact", "dense", "exact", "dense"), strict=True):
        s = sequence(name, max_tokens=10)
        s.mode = mode
        scheduler.add(s)
    for _ in range(7):
        batch = scheduler.next_batch()
        scheduler.commit(batch, tokens(batch))
    batch = scheduler.next_batch()
    assert [s.id for s in batch.sequences] == ["b", "d", "a", "c"]


def test_an_answer_whose_mask_is_finished_ends_with_stop(make) -> None:
    scheduler = make()
    scheduler.add(sequence("a"))
    batch = scheduler.next_batch()
    events = [e for _, e in scheduler.commit(batch, [Sample(1, ends_answer=True)])]
    assert [(e.token_id, e.index, e.finish_reason) for e in events] == [
        (1, 0, None), (None, 1, "stop"),
    ]  # fmt: skip
    assert not scheduler.has_work


def test_max_batch_bounds_running(make) -> None:
    scheduler = make(max_batch=2)
    for name in "abcd":
        scheduler.add(sequence(name, max_tokens=3))
    most, done = 0, []
    while (batch := scheduler.next_batch()) is not None:
        most = max(most, len(scheduler.running))
        done += [e for _, e in scheduler.commit(batch, tokens(batch)) if e.finish_reason]
    assert most == 2
    assert [e.request_id for e in done] == ["a", "b", "c", "d"]
    assert {e.finish_reason for e in done} == {"length"}
    assert not scheduler.has_work


def test_a_sequence_waits_until_its_whole_cache_fits(make) -> None:
    scheduler = make(kv_tokens=10)
    scheduler.add(sequence("a", prompt=3, max_tokens=4))  # 3 + 4 - 1 = 6 positions
    scheduler.add(sequence("b", prompt=2, max_tokens=4))  # 5: does not fit beside a
    scheduler.add(sequence("c", prompt=1, max_tokens=1))  # 1 would fit, but b came first
    while scheduler.running or scheduler.waiting:
        batch = scheduler.next_batch()
        names = {s.id for s in scheduler.running}
        assert not {"a", "b"} <= names
        assert "c" not in names or "a" not in names
        scheduler.commit(batch, tokens(batch))
    assert scheduler._kv_cache.free_tokens == 10


def test_a_sequence_never_outgrows_its_cache(make) -> None:
    scheduler = make()
    a = sequence("a", prompt=3, max_tokens=4)
    scheduler.add(a)
    while (batch := scheduler.next_batch()) is not None:
        if batch.is_prefill:
            a.cache.length = 3
        else:
            assert a.cache.length < a.cache.capacity
            a.cache.length += 1
        scheduler.commit(batch, tokens(batch))
    assert a.output_ids == [1, 1, 1, 1]


def test_stop_token_is_delivered_with_its_reason(make) -> None:
    scheduler = make()
    scheduler.add(sequence("a"))
    scheduler.add(sequence("b", stop_token_ids=(5,)))
    events = []
    for token_id in (1, STOP_ID, 5):
        batch = scheduler.next_batch()
        events += [e for _, e in scheduler.commit(batch, tokens(batch, token_id))]
    assert [(e.request_id, e.token_id, e.index, e.finish_reason) for e in events] == [
        ("a", 1, 0, None), ("a", STOP_ID, 1, "stop"), ("b", 5, 0, "stop"),
    ]  # fmt: skip


def test_a_row_without_token_ends_only_its_request(make) -> None:
    scheduler = make()
    scheduler.add(sequence("a"))
    scheduler.add(sequence("b"))
    for _ in range(3):
        batch = scheduler.next_batch()
        scheduler.commit(batch, tokens(batch))
    batch = scheduler.next_batch()
    assert len(batch.sequences) == 2
    (_, bad), (_, good) = scheduler.commit(batch, [Sample(None, error="not finite"), Sample(1)])
    assert (bad.token_id, bad.finish_reason, bad.error) == (None, "error", "not finite")
    assert good.finish_reason in (None, "length")
    assert [s.id for s in scheduler.running] == ([] if good.finish_reason else ["b"])


def test_abort_waiting_running_and_unknown(make) -> None:
    scheduler = make(max_batch=1)
    scheduler.add(sequence("a"))
    scheduler.add(sequence("b"))
    scheduler.commit(batch := scheduler.next_batch(), tokens(batch))
    free = scheduler._kv_cache.free_tokens
    ((b, event),) = scheduler.abort("b")
    assert (event.finish_reason, event.index, b.status) == ("abort", 0, Status.FINISHED)
    ((a, event),) = scheduler.abort("a")
    assert (event.finish_reason, event.index, a.cache) == ("abort", 1, None)
    assert scheduler._kv_cache.free_tokens > free
    assert scheduler.abort("a") == []
    assert not scheduler.has_work


def test_kv_cache_budget(tiny: Tiny) -> None:
    config = ModelConfig.from_hf(tiny.config())
    cache = KVCache(config, 10, torch.bfloat16, torch.device("cpu"))
    assert bytes_per_token(config, torch.bfloat16) == 3 * 2 * 2 * 16 * 2
    first = cache.allocate(6)
    assert first.kv_L2GSK.shape == (3, 2, 2, 6, 16)
    assert first.kv_L2GSK.is_contiguous()
    assert cache.can_allocate(4)
    assert not cache.can_allocate(5)
    cache.free(first)
    assert cache.can_allocate(10)
    with pytest.raises(AssertionError):
        cache.free(first)


def test_inbox_bounds_what_is_in_flight() -> None:
    inbox = Inbox(limit=2)
    inbox.submit(sequence("a"))
    with pytest.raises(InvalidRequest, match="in flight"):
        inbox.submit(sequence("a"))
    inbox.submit(sequence("b"))
    with pytest.raises(QueueFull, match="--max-queue"):
        inbox.submit(sequence("c"))
    arrived, _ = inbox.take()
    assert [s.id for s in arrived] == ["a", "b"]
    with pytest.raises(QueueFull):  # taken is not ended
        inbox.submit(sequence("c"))
    inbox.ended("a")
    inbox.submit(sequence("a"))
    inbox.close("closing down")
    inbox.ended("b")
    with pytest.raises(EngineDead, match="closing down"):
        inbox.submit(sequence("d"))
    assert [s.id for s in inbox.kill("dead")] == ["a"]
