"""Owns which sequences wait and which run. Policy: first come, first served, clients in turn.

A sequence is admitted when a batch slot and its whole cache room are free, otherwise it stays
waiting. Prompts are read one after the other, in parts of fixed size that alternate with decode
steps: neither a burst of arrivals nor a long prompt stalls the answers under way, and what is read
together does not depend on who else is there. Knows nothing of threads, models or sampling.
"""

from collections.abc import Callable, Iterable

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

Event = tuple[Sequence, TokenEvent]
PROMPT_PART = 256  # tokens: few decode steps long, and long enough for products of whole matrices


class Scheduler:
    def __init__(
        self,
        kv_cache: KVCache,
        max_batch: int,
        stop_ids: Callable[[SamplingParams], set[int]],
    ) -> None:
        self.waiting = FairQueue()
        self.running: list[Sequence] = []
        self.reading: Sequence | None = None  # its prompt is under way
        self.max_batch = max_batch
        self._kv_cache = kv_cache
        self._stop_ids = stop_ids
        self._just_read = False  # the last batch was a prompt

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.num_admitted)

    @property
    def num_admitted(self) -> int:
        """Sequences that hold a cache."""
        return len(self.running) + (self.reading is not None)

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def next_batch(self) -> Batch | None:
        """A part of a prompt if there is one and it is its turn, else one token for all running."""
        can_read = self.reading is not None or self._can_admit()
        self._just_read = can_read and not (self._just_read and self.running)
        if self._just_read:
            return self._next_part(self.reading or self._admit())
        if self.running:
            return Batch(tuple(sorted(self.running, key=lambda sequence: sequence.mode)))
        return None

    def _can_admit(self) -> bool:
        first = self.waiting.first()
        return (
            first is not None
            and self.num_admitted < self.max_batch
            and self._kv_cache.can_allocate(first.capacity)
        )

    def _admit(self) -> Sequence:
        sequence = self.waiting.pop_first()
        sequence.cache = self._kv_cache.allocate(sequence.capacity)
        sequence.status = Status.RUNNING
        self.reading = sequence
        return sequence

    def _next_part(self, sequence: Sequence) -> Batch:
        """What is read counts as read: the caller runs the batch or ends the sequence."""
        part = range(sequence.num_read, min(sequence.num_read + PROMPT_PART, sequence.num_prompt))
        sequence.num_read = part.stop
        if part.stop == sequence.num_prompt:
            self.reading = None
            self.running.append(sequence)
        return Batch((sequence,), part)

    def commit(self, batch: Batch, samples: Iterable[Sample]) -> list[Event]:
        """Append the tokens, end what is done, and say so."""
        events = []
        for sequence, sample in zip(batch.sequences, samples, strict=True):
            if sample.token_id is None:
                events.append(self._end(sequence, "error", sample.error))
                continue
            sequence.output_ids.append(sample.token_id)
            reason: FinishReason | None = None
            if sample.token_id in self._stop_ids(sequence.sampling):
                reason = "stop"
            elif sequence.num_output >= sequence.max_tokens:
                reason = "length"
            event = TokenEvent(
                sequence.id,
                sample.token_id,
                sequence.num_output - 1,
                sample.logprobs,
                reason,
                prompt_logprobs=sequence.prompt_logprobs if batch.is_prefill else None,
                usage=sequence.usage,
            )
            events.append((sequence, event))
            if reason is not None:
                self._release(sequence, reason)
            elif sample.ends_answer:
                events.append(self._end(sequence, "stop", None))
        return events

    def abort(self, request_id: str) -> list[Event]:
        """End a waiting or running request; an unknown id has just finished, which is no error."""
        for sequence in self._all():
            if sequence.id == request_id:
                return [self._end(sequence, "abort", None)]
        return []

    def end_all(self, reason: FinishReason, error: str | None = None) -> list[Event]:
        """End everything that waits or runs."""
        return [self._end(sequence, reason, error) for sequence in self._all()]

    def _all(self) -> list[Sequence]:
        reading = [] if self.reading is None else [self.reading]
        return [*self.waiting, *reading, *self.running]

    def _end(self, sequence: Sequence, reason: FinishReason, error: str | None) -> Event:
        self._release(sequence, reason)
        event = TokenEvent(
            sequence.id, None, sequence.num_output, None, reason, error, usage=sequence.usage
        )
        return sequence, event

    def _release(self, sequence: Sequence, reason: FinishReason) -> None:
        if sequence.status is Status.WAITING:
            self.waiting.remove(sequence)
        elif sequence is self.reading:
            self.reading = None
        else:
            self.running.remove(sequence)
        if sequence.cache is not None:
            self._kv_cache.free(sequence.cache)
            sequence.cache = None
        sequence.status, sequence.finish_reason = Status.FINISHED, reason
