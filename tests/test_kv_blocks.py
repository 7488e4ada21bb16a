"""Blocks under whatever clients do: nothing leaks, nothing is shared that differs, every answer
ends as it would have alone. The model is a pure function of the tokens before; blocks hold what it
wrote.
"""

from types import SimpleNamespace as Tiny

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runtime.block_pool import BlockPool, block_keys
from runtime.config import ModelConfig
from runtime.kv_cache import BLOCK, KVCache
from runtime.scheduler import Scheduler
from runtime.sequence import Batch, Request, Sample, SamplingParams, Sequence, Status
from runtime.stats import Totals

STOP_ID = 0
PART = 2 * BLOCK
POOL_BLOCKS = 9
MAX_POSITIONS = POOL_BLOCKS * BLOCK


def next_token(tokens: tuple[int, ...]) -> int:
    """The model: some function of all tokens, now and then the stop token."""
    return hash(tokens) % 50


def solo_answer(prompt: tuple[int, ...], max_tokens: int) -> list[int]:
    tokens: list[int] = []
    while len(tokens) < max_tokens and (not tokens or tokens[-1] != STOP_ID):
        tokens.append(next_token((*prompt, *tokens)))
    return tokens


class World:
    """A scheduler with its pool, and what stands in each block: position -> tokens up to there."""

    def __init__(self, config: ModelConfig) -> None:
        cache = KVCache(config, MAX_POSITIONS, torch.float32, torch.device("cpu"), PART)
        self.blocks = cache.blocks
        self.scheduler = Scheduler(cache, 4, lambda sampling: {STOP_ID}, Totals())
        self.written = [[()] * BLOCK for _ in range(POOL_BLOCKS)]
        self.sequences: list[Sequence] = []
        self.aborted: set[str] = set()

    def submit(self, head: int, num_head: int, tail: int, max_tokens: int) -> None:
        name = f"r{len(self.sequences)}"
        prompt = (*[head] * num_head, *range(1, tail + 1))
        max_tokens = min(max_tokens, MAX_POSITIONS + 1 - len(prompt))
        request = Request(name, prompt, SamplingParams(), client=str(head))
        self.sequences.append(Sequence(request, max_tokens, "dense", lambda event: None))
        self.scheduler.add(self.sequences[-1])

    def abort(self, number: int) -> None:
        if self.sequences:
            s = self.sequences[number % len(self.sequences)]
            self.aborted |= {e.request_id for _, e in self.scheduler.abort(s.id)}
            assert s.status is Status.FINISHED

    def step(self) -> bool:
        batch = self.scheduler.next_batch()
        if batch is None:
            return False
        samples = [self._compute(s, batch) for s in batch.sequences]
        self.scheduler.commit(batch, [samples[n] for n in batch.rows])
        return True

    def _compute(self, s: Sequence, batch: Batch) -> Sample:
        tokens = (*s.request.prompt_ids, *s.output_ids)
        count = 1 if batch.prompt_part is None else len(batch.prompt_part)
        for position in range(s.cache.length, s.cache.length + count):
            block = s.cache.block_ids[position // BLOCK]
            self.written[block][position % BLOCK] = tokens[: position + 1]
        s.cache.length += count
        return Sample(next_token(tokens[: s.cache.length]))

    def check(self) -> None:
        holders = [s for s in self.sequences if s.cache is not None]
        assert all((s in holders) == (s.status is Status.RUNNING) for s in self.sequences)
        uses = [0] * POOL_BLOCKS
        for s in holders:
            assert len(set(s.cache.block_ids)) == len(s.cache.block_ids)
            for block in s.cache.block_ids:
                uses[block] += 1
            tokens = (*s.request.prompt_ids, *s.output_ids)
            for position in range(s.cache.length):
                block = s.cache.block_ids[position // BLOCK]
                assert self.written[block][position % BLOCK] == tokens[: position + 1]
        pool = self.blocks
        assert pool._uses == uses
        free, idle = pool._free, list(pool._idle)
        assert sorted(free + idle) == [b for b in range(POOL_BLOCKS) if uses[b] == 0]
        assert pool.num_used == sum(n > 0 for n in uses)
        assert set(idle) <= set(pool._key_of)
        assert not set(free) & set(pool._key_of)
        assert pool._by_key == {key: block for block, key in pool._key_of.items()}

    def finish(self) -> None:
        for _ in range(10_000):
            if not self.step():
                break
            self.check()
        assert not self.scheduler.has_work, "the scheduler is stuck"
        self.check()
        assert (self.blocks.num_used, self.scheduler.num_admitted) == (0, 0)
        for s in self.sequences:
            answer = solo_answer(s.request.prompt_ids, s.max_tokens)
            if s.id in self.aborted:
                assert s.output_ids == answer[: s.num_output]
            else:
                assert s.output_ids == answer
                assert s.finish_reason in ("stop", "length")


submits = st.tuples(
    st.sampled_from([7, 8]),
    st.sampled_from([0, 1, BLOCK, PART, PART + BLOCK, 2 * PART + 1, 3 * PART]),
    st.integers(1, 40),
    st.integers(1, 150),
)
steps = st.one_of(submits, st.integers(0, 20), st.just("step"), st.just("steps"))


@given(st.lists(steps, min_size=1, max_size=40))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_clients_do_no_block_leaks_and_no_answer_changes(tiny: Tiny, steps: list) -> None:
    world = World(ModelConfig.from_hf(tiny.config()))
    for step in steps:
        match step:
            case (head, num_head, tail, max_tokens):
                world.submit(head, num_head, tail, max_tokens)
            case int():
                world.abort(step)
            case "step":
                world.step()
            case "steps":
                for _ in range(15):
                    world.step()
        world.check()
    world.finish()


def test_a_full_pool_preempts_shares_and_evicts(tiny: Tiny) -> None:
    """The world above does meet what it is about."""
    world = World(ModelConfig.from_hf(tiny.config()))
    for _ in range(3):
        world.submit(7, 2 * PART, 3, 90)
        world.submit(8, 0, 3, 150)
    world.finish()
    totals = world.scheduler._totals
    assert totals.preemptions > 0
    assert 0 < totals.prefix_hit_tokens < totals.prefix_queried_tokens
    assert world.blocks.num_kept > 0


def test_a_key_names_a_block_and_all_before_it() -> None:
    ids = list(range(100))
    keys = block_keys(ids, 32)
    assert len(set(keys)) == len(keys) == 3
    assert block_keys(ids[:95], 32) == keys[:2]
    assert block_keys([1, *ids[1:]], 32)[0] != keys[0]
    assert block_keys([*ids[:32], 5, *ids[33:]], 32)[0] == keys[0]
    assert not set(block_keys([*ids[:1], 5, *ids[2:]], 32)) & set(keys)
    assert block_keys(ids, 16)[1] != keys[0], "the same tokens in other blocks"


def test_idle_blocks_are_taken_last_and_the_least_recently_used_first() -> None:
    pool, keys = BlockPool(5), [bytes([i]) for i in range(4)]
    old, new = pool.take(2), pool.take(2)
    for block, key in zip(old + new, keys, strict=True):
        pool.keep(block, key)
    assert pool.find([*keys[:2], b"none", keys[2]]) == old
    pool.release(old)
    assert pool.num_used == 4
    pool.release(old)
    pool.release(new)
    assert (pool.num_used, pool.num_available, pool.num_kept) == (0, 5, 4)
    assert pool.find(keys[:1]) == old[:1]
    pool.release(old[:1])
    taken = pool.take(3)
    assert taken[1:] == [old[1], new[1]], "a prompt's end goes before its beginning"
    assert pool.find(keys) == old[:1]
    with pytest.raises(AssertionError):
        pool.take(3)
