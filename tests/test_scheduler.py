"""Scheduling policy, bounds and aborts on plain sequences: no model, no threads."""

from types import SimpleNamespace as Tiny

import pytest
import torch

from runtime.config import ModelConfig
from runtime.errors import EngineDead, InvalidRequest, QueueFull
from runtime.inbox import Inbox
from runtime.kv_cache import BLOCK, KVCache, bytes_per_token
from runtime.scheduler import Event, Scheduler
from runtime.sequence import Batch, Request, Sample, SamplingParams, Sequence, Status
from runtime.stats import Totals

STOP_ID = 7
PART = 2 * BLOCK


def sequence(
    name: str, prompt: int = 3, max_tokens: int = 4, client: str = "", **sampling: object
) -> Sequence:
    request = Request(name, tuple(range(prompt)), SamplingParams(**sampling), client)
    return Sequence(request, max_tokens, "dense", on_event=lambda event: None)


@pytest.fixture
def make(tiny: Tiny):
    def make(num_blocks: int = 32, max_batch: int = 4) -> Scheduler:
        config = ModelConfig.from_hf(tiny.config())
        kv_tokens, device = num_blocks * BLOCK, torch.device("cpu")
        cache = KVCache(config, kv_tokens, torch.float32, device, PART)
        return Scheduler(cache, max_batch, lambda s: {STOP_ID, *s.stop_token_ids}, Totals())

    return make


def run(scheduler: Scheduler, batch: Batch, *token_ids: int) -> list[Event]:
    """What the engine does with a batch; every new token is 1 unless given."""
    for s in batch.sequences:
        s.cache.length += 1 if batch.prompt_part is None else len(batch.prompt_part)
        assert s.cache.length <= s.cache.capacity
    samples = [Sample(token_id) for token_id in token_ids or [1] * len(batch.rows)]
    return scheduler.commit(batch, samples)


def test_prompts_alternate_with_decode(make) -> None:
    scheduler = make()
    for name in "abc":
        scheduler.add(sequence(name, max_tokens=10))
    kinds = []
    for _ in range(6):
        batch = scheduler.next_batch()
        kinds.append((batch.is_prefill, "".join(s.id for s in batch.sequences)))
        run(scheduler, batch)
    assert kinds == [
        (True, "a"), (False, "a"), (True, "b"), (False, "ab"), (True, "c"), (False, "abc"),
    ]  # fmt: skip


def test_a_long_prompt_is_read_in_parts_between_decode_steps(make) -> None:
    scheduler = make(max_batch=2)
    long = sequence("b", prompt=2 * PART + 9, max_tokens=2)
    for s in (sequence("a", max_tokens=20), long, sequence("c")):
        scheduler.add(s)
    steps = []
    for _ in range(8):
        batch = scheduler.next_batch()
        part = batch.prompt_part
        steps.append(("".join(s.id for s in batch.sequences), part and (part.start, part.stop)))
        run(scheduler, batch)
    assert steps == [
        ("a", (0, 3)), ("a", None),
        ("b", (0, PART)), ("a", None),
        ("b", (PART, 2 * PART)), ("a", None),
        ("b", (2 * PART, 2 * PART + 9)), ("ab", None),
    ]  # fmt: skip
    assert long.finish_reason == "length"  # its second token came in the last step
    assert scheduler.next_batch().sequences[0].id == "c", "a slot is free"


def test_a_prompt_under_way_can_be_aborted(make) -> None:
    scheduler = make()
    scheduler.add(sequence("a", prompt=PART + 1))
    scheduler.next_batch()
    assert scheduler.num_admitted == 1
    ((a, event),) = scheduler.abort("a")
    assert (event.finish_reason, event.token_id, a.cache) == ("abort", None, None)
    assert not scheduler.has_work
    assert scheduler.next_batch() is None
    assert scheduler._kv_cache.blocks.num_used == 0


def test_clients_take_turns(make) -> None:
    scheduler = make(max_batch=1)
    for name in ("a1", "a2", "a3", "b1", "c1", "b2"):
        scheduler.add(sequence(name, max_tokens=1, client=name[0]))
    scheduler.abort("b1")
    order = []
    while (batch := scheduler.next_batch()) is not None:
        order.append(batch.sequences[0].id)
        run(scheduler, batch)
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
        run(scheduler, batch)
    batch = scheduler.next_batch()
    assert [s.id for s in batch.sequences] == ["b", "d", "a", "c"]


def test_an_answer_whose_mask_is_finished_ends_with_stop(make) -> None:
    scheduler = make()
    scheduler.add(sequence("a"))
    batch = scheduler.next_batch()
    batch.sequences[0].cache.length = 3
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
        done += [e for _, e in run(scheduler, batch) if e.finish_reason]
    assert most == 2
    assert [e.request_id for e in done] == ["a", "b", "c", "d"]
    assert {e.finish_reason for e in done} == {"length"}
    assert not scheduler.has_work


def test_a_sequence_waits_until_its_prompt_fits(make) -> None:
    scheduler = make(num_blocks=3)
    scheduler.add(sequence("a", prompt=2 * BLOCK))
    scheduler.add(sequence("b", prompt=BLOCK, max_tokens=1))  # a may want a third block
    scheduler.add(sequence("c", prompt=1, max_tokens=1))  # b came first
    order = []
    while (batch := scheduler.next_batch()) is not None:
        order.append("".join(s.id for s in batch.sequences))
        run(scheduler, batch)
    assert order == ["a"] * 4 + ["b", "c"]
    assert scheduler._kv_cache.blocks.num_used == 0


def test_a_sequence_takes_blocks_as_it_grows(make) -> None:
    scheduler = make()
    a = sequence("a", prompt=3, max_tokens=2 * BLOCK)
    scheduler.add(a)
    used = []
    while (batch := scheduler.next_batch()) is not None:
        used.append(len(a.cache.block_ids))
        run(scheduler, batch)
    # the last token is not computed, so 3 + 2 * BLOCK - 1 positions are
    assert used == [1] * (1 + BLOCK - 3) + [2] * BLOCK + [3] * 2
    assert a.output_ids == [1] * 2 * BLOCK


def test_the_youngest_gives_way_and_comes_back(make) -> None:
    """Three sequences of three blocks each in a pool of five: all end, with their tokens drawn
    once, the oldest without a break."""
    scheduler = make(num_blocks=5)
    names = ("a", "b", "c")
    sequences = [sequence(name, prompt=BLOCK - 3, max_tokens=2 * BLOCK) for name in names]
    for s in sequences:
        scheduler.add(s)
    drawn = dict.fromkeys(names, 0)
    steps_of_a = 0
    while (batch := scheduler.next_batch()) is not None:
        steps_of_a += sequences[0] in batch.sequences
        for s in batch.sampled:
            drawn[s.id] += 1
        run(scheduler, batch, *(100 + drawn[s.id] for s in batch.sampled))
        assert scheduler._kv_cache.blocks.num_used <= 5
    for s in sequences:
        assert s.output_ids == [100 + i for i in range(1, 2 * BLOCK + 1)]
    assert steps_of_a == 2 * BLOCK
    assert scheduler._totals.preemptions > 0
    assert scheduler._kv_cache.blocks.num_used == 0


def test_a_preempted_sequence_goes_before_new_ones_and_can_be_aborted(make) -> None:
    scheduler = make(num_blocks=4)
    old = sequence("old", prompt=BLOCK, max_tokens=BLOCK + 2)
    young = sequence("young", prompt=BLOCK - 9, max_tokens=60)
    for s in (old, young):
        scheduler.add(s)
    while not scheduler.preempted:
        run(scheduler, scheduler.next_batch())
    assert scheduler.preempted == [young]
    scheduler.add(sequence("new", prompt=1, max_tokens=1))
    while old.status is not Status.FINISHED:
        run(scheduler, batch := scheduler.next_batch())
        assert [s.id for s in batch.sequences] == ["old"]
    assert [s.id for s in scheduler.next_batch().sequences] == ["young"]
    scheduler.abort("young")
    assert [s.id for s in scheduler.next_batch().sequences] == ["new"]
    assert [s.id for s in scheduler._all()] == ["new"]


def test_prompts_that_begin_alike_share_whole_parts(make) -> None:
    scheduler = make()
    blocks = scheduler._kv_cache.blocks

    def read(name: str, prompt: int, **sampling: object) -> tuple[Sequence, int]:
        """How much of the prompt was found."""
        s = sequence(name, prompt=prompt, **sampling)
        scheduler.add(s)
        while s.num_computed < prompt:
            run(scheduler, scheduler.next_batch())
        return s, s.usage.cached_tokens

    first, cached = read("first", 2 * PART + 9)
    assert cached == 0
    second, cached = read("second", 3 * PART)
    assert cached == 2 * PART, "the first's last part was not whole"
    assert second.cache.block_ids[:4] == first.cache.block_ids[:4]
    assert blocks.num_used == 5 + 2
    assert read("logprobs", 3 * PART, prompt_logprobs=1)[1] == 0, "they need all logits"
    scheduler.abort("logprobs")
    scheduler.abort("first")
    scheduler.abort("second")
    assert blocks.num_used == 0
    assert blocks.num_kept == 6
    assert read("third", 3 * PART)[1] == 2 * PART, "the last token is always read"
    assert read("fourth", 3 * PART + 1)[1] == 3 * PART
    other = sequence("other", prompt=3 * PART)
    other.request = Request("other", (5, *range(1, 3 * PART)))
    scheduler.add(other)
    run(scheduler, scheduler.next_batch())
    assert other.usage.cached_tokens == 0, "one token differs at the very start"


def test_stop_token_is_delivered_with_its_reason(make) -> None:
    scheduler = make()
    scheduler.add(sequence("a"))
    scheduler.add(sequence("b", stop_token_ids=(5,)))
    events = []
    for token_id in (1, STOP_ID, 5):
        batch = scheduler.next_batch()
        events += [e for _, e in run(scheduler, batch, *[token_id] * len(batch.rows))]
    assert [(e.request_id, e.token_id, e.index, e.finish_reason) for e in events] == [
        ("a", 1, 0, None), ("a", STOP_ID, 1, "stop"), ("b", 5, 0, "stop"),
    ]  # fmt: skip


def test_a_row_without_token_ends_only_its_request(make) -> None:
    scheduler = make()
    scheduler.add(sequence("a"))
    scheduler.add(sequence("b"))
    for _ in range(3):
        batch = scheduler.next_batch()
        run(scheduler, batch)
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
    run(scheduler, scheduler.next_batch())
    assert scheduler._kv_cache.blocks.num_used == 1
    ((b, event),) = scheduler.abort("b")
    assert (event.finish_reason, event.index, b.status) == ("abort", 0, Status.FINISHED)
    ((a, event),) = scheduler.abort("a")
    assert (event.finish_reason, event.index, a.cache) == ("abort", 1, None)
    assert scheduler._kv_cache.blocks.num_used == 0
    assert scheduler.abort("a") == []
    assert not scheduler.has_work


def test_kv_cache_layout_and_budget(tiny: Tiny) -> None:
    config = ModelConfig.from_hf(tiny.config())
    kv_cache = KVCache(config, 3 * BLOCK + 1, torch.bfloat16, torch.device("cpu"), PART)
    assert bytes_per_token(config, torch.bfloat16) == 3 * 2 * 2 * 16 * 2
    assert kv_cache.num_tokens == 4 * BLOCK, "a budget that is no whole number of blocks"
    cache = kv_cache.open((), 40, 40, spare=0)
    assert cache.pool_BL2GTK.shape == (4, 3, 2, 2, BLOCK, 16)
    assert cache.pool_BL2GTK.is_contiguous()
    k_NGK, v_NGK = torch.randn(2, 40, 2, 16).bfloat16()
    cache.write(1, 0, k_NGK, v_NGK)
    kept_2GSK = cache.read(1, 40)
    assert torch.equal(kept_2GSK[0].transpose(0, 1), k_NGK)
    assert torch.equal(kept_2GSK[1].transpose(0, 1), v_NGK)
    cache.length = 40
    assert kv_cache.open((), 9, 9, spare=2) is None
    assert kv_cache.extend(cache)
    assert len(cache.block_ids) == 2, "there was room"
    for num_blocks in (3, 4):
        cache.length = cache.capacity
        assert kv_cache.extend(cache)
        assert len(cache.block_ids) == len(cache.table) == num_blocks
    cache.length = cache.capacity
    assert not kv_cache.extend(cache)
    ids = list(cache.block_ids)
    kv_cache.close(cache)
    assert kv_cache.blocks.num_used == 0
    with pytest.raises(AssertionError, match="twice"):
        kv_cache.blocks.release(ids)


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
