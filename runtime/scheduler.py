"""Owns which sequences wait and which run. Policy: first come, first served, clients in turn.

A sequence is admitted when a batch slot and blocks for all its tokens are free. Prompts are read
one after the other, in parts of fixed size that alternate with decode steps: neither a burst of
arrivals nor a long prompt stalls the answers under way, and what is read together does not depend
on who else is there. A decoding sequence takes blocks as it grows. When there are none left, the
youngest gives its own back and waits, before all that never ran, to be computed again: its prompt
is read as before, its answer's tokens are decoded as before, one a step, and none is drawn twice.
So the oldest always comes to its end. Knows nothing of threads, models or sampling.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from time import perf_counter

from .fair_queue import FairQueue
from .kv_cache import KVCache
from .sequence import (
    Batch,
    FinishReason,
    Sample,
    SamplingParams,
    Sequence,
    Status,
    TokenEvent,
)
from .stats import Totals

Event = tuple[Sequence, TokenEvent]


class Scheduler:
    def __init__(
        self,
        kv_cache: KVCache,
        max_batch: int,
        stop_ids: Callable[[SamplingParams], set[int]],
        totals: Totals,
    ) -> None:
        self.waiting = FairQueue()
        self.preempted: list[Sequence] = []  # ran before, and wait to run again
        self.running: list[Sequence] = []
        self.reading: Sequence | None = None  # its prompt is under way
        self.max_batch = max_batch
        self._kv_cache = kv_cache
        self._stop_ids = stop_ids
        self._totals = totals
        self._just_read = False  # the last batch was a prompt
        self._num_arrived = 0

    @property
    def has_work(self) -> bool:
        return bool(self._all())

    @property
    def num_admitted(self) -> int:
        """Sequences that hold a cache."""
        return len(self._admitted())

    def add(self, sequence: Sequence) -> None:
        sequence.arrival = self._num_arrived
        self._num_arrived += 1
        if sequence.sampling.prompt_logprobs is None:  # they need every position's logits
            request = sequence.request
            sequence.keys = self._kv_cache.keys(request.prompt_ids, request.cache_salt)
        self.waiting.append(sequence)

    def next_batch(self) -> Batch | None:
        """A part of a prompt and one token for all running, in turn. The caller computes it and
        calls `commit`. The part is empty where the whole prompt was found in the cache."""
        if self._just_read:
            batch = self._decode() or self._read()
        else:
            batch = self._read() or self._decode()
        self._just_read = batch is not None and batch.is_prefill
        return batch

    def _read(self) -> Batch | None:
        if self.reading is None and not self._admit():
            return None
        sequence = self.reading
        assert sequence is not None
        start = sequence.num_computed
        part = range(start, min(start + self._kv_cache.part, sequence.num_prompt))
        is_last = part.stop == sequence.num_prompt
        return Batch((sequence,), (0,) if is_last and not sequence.output_ids else (), part)

    def _decode(self) -> Batch | None:
        self._make_room()
        if not self.running:
            return None
        sequences = tuple(sorted(self.running, key=lambda sequence: sequence.mode))
        return Batch(sequences, tuple(n for n, s in enumerate(sequences) if s.is_at_end))

    def _admit(self) -> bool:
        """Start to read the next prompt, if there is room for one."""
        if self.num_admitted == self.max_batch:
            return False
        is_new = not self.preempted
        sequence = self.waiting.first() if is_new else min(self.preempted, key=_arrival)
        if sequence is None:
            return False
        # Those that run will soon want a block each.
        sequence.cache = self._kv_cache.open(
            sequence.keys, sequence.num_prompt, sequence.num_tokens, spare=self.num_admitted
        )
        if sequence.cache is None:
            return False
        if is_new:
            self.waiting.pop_first()
            sequence.admitted_at = perf_counter()
            sequence.num_cached = sequence.num_computed
            self._totals.prefix_queried_tokens += sequence.num_prompt if sequence.keys else 0
            self._totals.prefix_hit_tokens += sequence.num_cached
        else:
            self.preempted.remove(sequence)
        sequence.status = Status.RUNNING
        self.reading = sequence
        return True

    def _make_room(self) -> None:
        """One more position for each that runs; the youngest give way to the older."""
        for sequence in sorted(self.running, key=_arrival):
            while sequence.cache is not None and not self._kv_cache.extend(sequence.cache):
                self._preempt(max(self._admitted(), key=_arrival))

    def _preempt(self, sequence: Sequence) -> None:
        self._leave(sequence)
        sequence.status, sequence.prompt_logprobs = Status.WAITING, None
        self.preempted.append(sequence)
        self._totals.preemptions += 1

    def commit(self, batch: Batch, samples: Iterable[Sample]) -> list[Event]:
        """The batch was computed: append the tokens, end what is done, and say so."""
        if batch.prompt_part is not None:
            self._commit_part(batch.sequences[0], batch.prompt_part)
        events = []
        for sequence, sample in zip(batch.sampled, samples, strict=True):
            events += self._commit_sample(sequence, sample)
        return events

    def _commit_part(self, sequence: Sequence, part: range) -> None:
        assert sequence.cache is not None
        self._kv_cache.keep_part(sequence.cache, part)
        if part.stop == sequence.num_prompt:
            self.reading = None
            self.running.append(sequence)

    def _commit_sample(self, sequence: Sequence, sample: Sample) -> list[Event]:
        if sample.token_id is None:
            sequence, event = self._end(sequence, "error", sample.error)
            return [(sequence, replace(event, is_mask_error=sample.is_mask_error))]
        sequence.output_ids.append(sample.token_id)
        reason: FinishReason | None = None
        if sample.token_id in self._stop_ids(sequence.sampling):
            reason = "stop"
        elif sequence.num_output >= sequence.max_tokens:
            reason = "length"
        is_first = sequence.num_output == 1
        event = TokenEvent(
            sequence.id,
            sample.token_id,
            sequence.num_output - 1,
            sample.logprobs,
            reason,
            prompt_logprobs=sequence.prompt_logprobs if is_first else None,
            usage=sequence.usage,
        )
        if reason is not None:
            self._release(sequence, reason)
        elif sample.ends_answer:
            return [(sequence, event), self._end(sequence, "stop", None)]
        return [(sequence, event)]

    def abort(self, request_id: str) -> list[Event]:
        """End a waiting or running request; an unknown id has just finished, which is no error."""
        for sequence in self._all():
            if sequence.id == request_id:
                return [self._end(sequence, "abort", None)]
        return []

    def end_all(self, reason: FinishReason, error: str | None = None) -> list[Event]:
        """End everything that waits or runs."""
        return [self._end(sequence, reason, error) for sequence in self._all()]

    def _admitted(self) -> list[Sequence]:
        return self.running if self.reading is None else [self.reading, *self.running]

    def _all(self) -> list[Sequence]:
        return [*self.waiting, *self.preempted, *self._admitted()]

    def _end(self, sequence: Sequence, reason: FinishReason, error: str | None) -> Event:
        self._release(sequence, reason)
        event = TokenEvent(
            sequence.id, None, sequence.num_output, None, reason, error, usage=sequence.usage
        )
        return sequence, event

    def _release(self, sequence: Sequence, reason: FinishReason) -> None:
        if sequence.status is Status.RUNNING:
            self._leave(sequence)
        elif sequence in self.preempted:
            self.preempted.remove(sequence)
        else:
            self.waiting.remove(sequence)
        sequence.status, sequence.finish_reason = Status.FINISHED, reason

    def _leave(self, sequence: Sequence) -> None:
        """Take it out of those that run; its blocks are free."""
        if sequence is self.reading:
            self.reading = None
        else:
            self.running.remove(sequence)
        assert sequence.cache is not None
        self._kv_cache.close(sequence.cache)
        sequence.cache = None


def _arrival(sequence: Sequence) -> int:
    return sequence.arrival
