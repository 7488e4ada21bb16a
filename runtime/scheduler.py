"""Owns which sequences wait and which run. Policy: first come, first served.

A sequence is admitted when a batch slot and its whole cache room are free, otherwise it stays
waiting. Prompts are read one per step, alternating with decode steps, so that a burst of arrivals
does not stall the answers under way. Knows nothing of threads, models or sampling.
"""

from collections import deque
from collections.abc import Callable, Iterable

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


class Scheduler:
    def __init__(
        self,
        kv_cache: KVCache,
        max_batch: int,
        stop_ids: Callable[[SamplingParams], set[int]],
    ) -> None:
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.max_batch = max_batch
        self._kv_cache = kv_cache
        self._stop_ids = stop_ids
        self._just_read = False  # the last batch was a prompt

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def next_batch(self) -> Batch | None:
        """A prompt if one can be admitted and it is its turn, else one token for all running."""
        self._just_read = self._can_admit() and not (self._just_read and self.running)
        if self._just_read:
            sequence = self.waiting.popleft()
            sequence.cache = self._kv_cache.allocate(sequence.capacity)
            sequence.status = Status.RUNNING
            self.running.append(sequence)
            return Batch((sequence,), is_prefill=True)
        if self.running:
            return Batch(tuple(self.running), is_prefill=False)
        return None

    def _can_admit(self) -> bool:
        return (
            bool(self.waiting)
            and len(self.running) < self.max_batch
            and self._kv_cache.can_allocate(self.waiting[0].capacity)
        )

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
            )
            if reason is not None:
                self._release(sequence, reason)
            events.append((sequence, event))
        return events

    def abort(self, request_id: str) -> list[Event]:
        """End a waiting or running request; an unknown id has just finished, which is no error."""
        for sequence in (*self.waiting, *self.running):
            if sequence.id == request_id:
                return [self._end(sequence, "abort", None)]
        return []

    def end_all(self, reason: FinishReason, error: str | None = None) -> list[Event]:
        """End everything that waits or runs."""
        return [self._end(s, reason, error) for s in (*self.waiting, *self.running)]

    def _end(self, sequence: Sequence, reason: FinishReason, error: str | None) -> Event:
        self._release(sequence, reason)
        event = TokenEvent(sequence.id, None, sequence.num_output, None, reason, error)
        return sequence, event

    def _release(self, sequence: Sequence, reason: FinishReason) -> None:
        if sequence.status is Status.WAITING:
            self.waiting.remove(sequence)
        else:
            self.running.remove(sequence)
        if sequence.cache is not None:
            self._kv_cache.free(sequence.cache)
            sequence.cache = None
        sequence.status, sequence.finish_reason = Status.FINISHED, reason
