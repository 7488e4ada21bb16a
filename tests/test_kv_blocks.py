"""Blocks under whatever clients do: nothing leaks, nothing is shared that differs, every answer
ends as it would have alone. The model is a pure function of the tokens before; what it writes at a
position is a number that names them.
"""

from types import SimpleNamespace as Tiny

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runtime import kv_cache
from runtime.block_pool import BlockPool, prompt_keys
from runtime.config import ModelConfig
from runtime.kv_cache import BLOCK, KVCache
from runtime.scheduler import Scheduler
from runtime.sequence import Batch, Request, Sample, SamplingParams, Sequence, Status
from runtime.stats import Totals

STOP_ID = 0
PART = 2 * BLOCK
POOL_BLOCKS = 9
MAX_POSITIONS = POOL_BLOCKS * BLOCK


@pytest.fixture(autouse=True)
def _few_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that blocks outlive the last logits of their prompts."""
    monkeypatch.setattr(kv_cache, "MAX_ENDS", 2)


def name_of(tokens: tuple[int, ...]) -> int:
    """The model: what stands in the pool at a position, and its logits; fp32 holds it."""
    return hash(tokens) % (1 << 24)


def pick(logits: int, name: str) -> int:
    """Each request draws in its own way, now and then the stop token."""
    return (logits + 7 * int(name[1:])) % 50


def solo_answer(s: Sequence) -> list[int]:
    tokens: list[int] = []
    while len(tokens) < s.max_tokens and (not tokens or tokens[-1] != STOP_ID):
        tokens.append(pick(name_of((*s.request.prompt_ids, *tokens)), s.id))
    return tokens


class World:
    """A scheduler with its pool, and the engine's part in between."""

    def __init__(self, config: ModelConfig) -> None:
        cache = KVCache(config, MAX_POSITIONS, torch.float32, torch.device("cpu"), PART)
        self.cache, self.blocks = cache, cache.blocks
        self.scheduler = Scheduler(cache, 4, lambda sampling: {STOP_ID}, Totals())
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
        if batch.prompt_part is not None and not batch.prompt_part:
            assert s.cache.length == s.num_prompt
            return Sample(pick(int(s.cache.logits_V), s.id))
        tokens = (*s.request.prompt_ids, *s.output_ids)
        count = 1 if batch.prompt_part is None else len(batch.prompt_part)
        for position in range(s.cache.length, s.cache.length + count):
            block = s.cache.block_ids[position // BLOCK]
            rows = s.cache.pool_BL2GTK[block, :, :, :, position % BLOCK]
            rows.fill_(name_of(tokens[: position + 1]))
        s.cache.length += count
        logits = name_of(tokens[: s.cache.length])
        if batch.prompt_part is not None and s.cache.length == s.num_prompt:
            self.cache.keep_end(s.cache, torch.tensor(logits))
        return Sample(pick(logits, s.id))

    def check(self) -> None:
        holders = [s for s in self.sequences if s.cache is not None]
        assert all((s in holders) == (s.status is Status.RUNNING) for s in self.sequences)
        uses = [0] * POOL_BLOCKS
        for s in holders:
            assert len(set(s.cache.block_ids)) == len(s.cache.block_ids)
            for block in s.cache.block_ids:
                uses[block] += 1
            tokens = (*s.request.prompt_ids, *s.output_ids)
            names = [name_of(tokens[: i + 1]) for i in range(s.cache.length)]
            assert s.cache.read(2, s.cache.length)[1, 1, :, 7].tolist() == names
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
            answer = solo_answer(s)
            if s.id in self.aborted:
                assert s.output_ids == answer[: s.num_output]
            else:
                assert s.output_ids == answer
                assert s.finish_reason in ("stop", "length")


submits = st.tuples(
    st.sampled_from([7, 8]),
    st.sampled_from([0, 1, BLOCK, PART, PART + BLOCK, 2 * PART + 1, 3 * PART]),
    st.sampled_from([1, 2, 20, BLOCK, 40]),
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


def test_equal_prompts_are_read_once(tiny: Tiny) -> None:
    """Together and later, to the end of a block and into one; each writes its own answer."""
    for num_head, tail in ((0, 3), (PART, 5), (PART, BLOCK), (0, PART), (PART, 0)):
        world = World(ModelConfig.from_hf(tiny.config()))
        for max_tokens in (40, 9, 60):
            world.submit(7, num_head, tail, max_tokens)
        world.finish()
        world.submit(7, num_head, tail, 20)
        world.finish()
        num_prompt = num_head + tail
        assert [s.num_cached for s in world.sequences] == [0, *[num_prompt] * 3]


def test_without_its_last_logits_a_prompt_is_read_from_its_last_part_on(tiny: Tiny) -> None:
    world = World(ModelConfig.from_hf(tiny.config()))
    for tail in (2 * PART, 1, 2, 2 * PART):
        world.submit(7, 0, tail, 5)
        world.finish()
    assert [s.num_cached for s in world.sequences] == [0, 0, 0, PART]


def test_a_lone_sequence_fills_the_pool_whatever_is_kept_of_it(tiny: Tiny) -> None:
    world = World(ModelConfig.from_hf(tiny.config()))
    for _ in range(2):
        world.submit(7, 3 * PART, 3, MAX_POSITIONS)
        world.finish()
    assert world.sequences[1].num_cached > 0


def test_a_key_names_a_block_and_all_before_it() -> None:
    ids = list(range(200))
    keys = prompt_keys(ids, 32, 64)
    assert len(set(keys)) == len(keys) == 7
    assert prompt_keys(ids[:192], 32, 64) == keys[:6]
    assert prompt_keys([1, *ids[1:]], 32, 64)[0] != keys[0]
    assert prompt_keys([*ids[:32], 5, *ids[33:]], 32, 64)[0] == keys[0]
    assert not set(prompt_keys([5, *ids[1:]], 32, 64)) & set(keys)
    assert prompt_keys(ids, 16, 64)[1] != keys[0], "the same tokens in other blocks"
    # Behind the last whole part only equal prompts agree.
    shorter = prompt_keys(ids[:-1], 32, 64)
    assert shorter[:6] == keys[:6]
    assert shorter[6] != keys[6]
    assert not set(prompt_keys(ids[:191], 32, 64)[4:]) & set(keys)
    assert prompt_keys(ids[:50], 32, 64)[0] != keys[0]
    salted = [prompt_keys(ids, 32, 64, salt) for salt in ("a", "b", "\ud800")]
    assert len({key for row in (keys, *salted) for key in row}) == 4 * 7
    assert prompt_keys(ids, 32, 64, "a") == salted[0]


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
