"""The engine: takes requests from any thread, runs them on one, hands out tokens by callback.

`step()` is the table of contents. The engine thread owns everything below `submit` and `abort`:
scheduler, caches, model, sampler, audit, stats. A request is answered or refused, never dropped:
if the thread dies, every request in it gets an error event and new ones are refused.
Knows token ids only; text lives in the server.
"""

import logging
import queue
import threading
import uuid
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Ids
from contextlib import nullcontext
from dataclasses import replace
from time import monotonic, perf_counter
from typing import Any

from torch import Tensor

from .accelerator import is_loss
from .audit import Audit
from .build import EngineParts, build
from .config import PROMPT_PART, EngineConfig, Mode, ModelConfig
from .drift_guard import DriftGuard
from .errors import GenerationFailed, HotneuronError
from .ffn_meter import FfnMeter
from .hybrid_meter import HybridMeter
from .idle import IdleWork
from .inbox import Inbox
from .kv_cache import KVCache, SequenceCache
from .replacement import Replacement
from .report import engine_report
from .request_check import check_request
from .sampler import Sampler, prompt_logprobs
from .scheduler import Event, Scheduler
from .sequence import Batch, EventCallback, Request, Sample, SamplingParams, Sequence, TokenEvent
from .speed import Comparison, measure_decode, random_prompt
from .stats import Stats

log = logging.getLogger(__name__)
STOPPING = "the engine is shutting down"


class Engine:
    """Make one with `from_config`; `start` it to serve, or call `generate` without starting."""

    def __init__(self, parts: EngineParts) -> None:
        self.stats = Stats()
        self._adopt(parts)
        self._inbox = Inbox(self.config.max_batch + self.config.max_queue)
        self._idle = IdleWork()
        self._thread: threading.Thread | None = None
        self._drain_until: float | None = None  # set by stop()
        self._is_recovering = False

    def _adopt(self, parts: EngineParts) -> None:
        """Everything that depends on the model."""
        model = parts.model
        self.parts = parts
        self.config: EngineConfig = parts.config
        self.mode: Mode = parts.mode
        self.model = model
        self.model_config: ModelConfig = model.config
        self.model_name = parts.config.model_name or parts.config.model_dir.name
        self.max_context = min(model.max_context, parts.kv_tokens)
        self.eos_token_ids = model.config.eos_token_ids
        self.ffn_meter = FfnMeter(model.layers, model.config.num_neurons)
        self.hybrid_meter = HybridMeter(model.layers)
        floor = parts.config.recall_floor
        self.guard = None if floor is None else DriftGuard(model.layers, floor)
        self.audit = Audit(model, parts.config.audit_rate, guard=self.guard)
        self.sampler = Sampler(self.eos_token_ids)
        self.replacement = Replacement(model, self.audit)
        self.kv_cache = KVCache(
            model.config, parts.kv_tokens, model.dtype, model.device, PROMPT_PART, model.host_layers
        )
        self.scheduler = self._new_scheduler()

    @classmethod
    def from_config(cls, config: EngineConfig) -> "Engine":
        return cls(build(config))

    # -- any thread -------------------------------------------------------------------------------

    def start(self) -> None:
        if self._thread is not None:
            raise HotneuronError("the engine was started already")
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def stop(self, drain_seconds: float = 0.0) -> None:
        """Refuse new requests, let those inside finish for a while, abort the rest, end."""
        self._drain_until = monotonic() + drain_seconds
        self._inbox.close(STOPPING)
        self._inbox.wake()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def submit(self, request: Request, on_event: EventCallback) -> None:
        """Queue a request. `on_event` is called on the engine thread and must return at once."""
        max_tokens = check_request(request, self.model, self.mode, self.max_context)
        sequence = Sequence(request, max_tokens, request.mode or self.mode, on_event)
        if request.audit:
            sequence.audit = self.audit.new_request_audit()
        self._inbox.submit(sequence)

    def abort(self, request_id: str) -> None:
        """End a request, in whatever state it is; its last event says so."""
        self._inbox.abort(request_id)

    def is_alive(self) -> bool:
        """Whether requests are served."""
        started = self._thread is not None and self._thread.is_alive()
        return started and self._inbox.closed_reason is None

    @property
    def is_recovering(self) -> bool:
        """Not alive, but will be: the accelerator is lost, and the model is loaded on the CPU."""
        return self._is_recovering

    @property
    def num_in_flight(self) -> int:
        """Requests that wait or run."""
        return self._inbox.num_in_flight

    def report(self) -> dict[str, Any]:
        return engine_report(self)

    def generate(self, prompt_ids: Ids[int], sampling: SamplingParams) -> list[TokenEvent]:
        """One request, blocking; all its events."""
        events: queue.SimpleQueue[TokenEvent] = queue.SimpleQueue()
        request = Request(f"generate-{uuid.uuid4().hex}", tuple(prompt_ids), sampling)
        self.submit(request, events.put)
        result: list[TokenEvent] = []
        try:
            while not result or result[-1].finish_reason is None:
                if self._thread is None and events.empty():
                    self._step_inline()
                else:
                    result.append(events.get())
        except KeyboardInterrupt:
            self.abort(request.id)
            raise
        if result[-1].finish_reason == "error":
            raise GenerationFailed(result[-1].error)
        return result

    def _step_inline(self) -> None:
        try:
            self.step()
        except Exception as error:
            self._die(error)

    def measure_speed(
        self,
        mode: Mode,
        batch: int = 1,
        prompt_tokens: int = 32,
        new_tokens: int = 32,
        prompt_ids: Ids[int] | None = None,
    ) -> dict[str, Any]:
        """Decode speed now, before the engine is started."""
        if self._thread is not None:
            raise HotneuronError("measure speed before the engine is started")
        prompt = prompt_ids or random_prompt(self.model_config.vocab_size, prompt_tokens)
        with self.ffn_meter.paused():
            return measure_decode(self.model, mode, batch, prompt, new_tokens)

    def compare_speed(
        self, batch: int = 1, rounds: int = 6, round_tokens: int = 8, max_seconds: float = 30.0
    ) -> Comparison:
        """Measure this engine's mode against dense, on random text: at once before the engine is
        started, afterwards between requests, which go first. The last one is part of the report."""
        prompt = random_prompt(self.model_config.vocab_size, 32)
        comparison = Comparison(
            self.model, self.mode, prompt, batch, rounds, round_tokens, max_seconds
        )
        self._idle.start(self._rounds(comparison))
        self.stats.comparison = comparison
        if self._thread is None:
            while self._idle.run_slice():
                pass
        self._inbox.wake()
        return comparison

    def _rounds(self, comparison: Comparison) -> Iterator[None]:
        rounds = comparison.run()
        try:
            while not comparison.is_done:
                with self.ffn_meter.paused():
                    next(rounds, None)
                yield
        except Exception as error:  # such as too little memory: no reason to stop serving
            log.exception("measuring speed failed")
            comparison.error = f"{type(error).__name__}: {error}"
        else:
            self.stats.measured = comparison

    # -- engine thread ----------------------------------------------------------------------------

    def step(self) -> bool:
        """One turn of the engine; False when there is nothing to do."""
        self._admit()
        batch = self.scheduler.next_batch()
        if batch is None:
            return False
        timing = nullcontext() if batch.is_prefill else self.hybrid_meter.step()
        modes = [] if batch.is_prefill else [sequence.mode for sequence in batch.sequences]
        with self.stats.step(modes):
            with timing:
                logits_NV = self._forward(batch)
                samples = self._sample(logits_NV, batch)
            self._publish(self.scheduler.commit(batch, samples))
        self.replacement.apply_if_due()
        return True

    def _admit(self) -> None:
        arrived, aborted = self._inbox.take()
        for sequence in arrived:
            self.scheduler.add(sequence)
        self.stats.totals.requests += len(arrived)
        for request_id in aborted:
            self._publish(self.scheduler.abort(request_id))

    def _forward(self, batch: Batch) -> Tensor:
        caches = [s.cache for s in batch.sequences if s.cache is not None]
        assert len(caches) == len(batch.sequences), "the scheduler admits with a cache"
        if batch.prompt_part is not None:
            return self._read_prompt(batch.sequences[0], caches[0], batch.prompt_part)
        ids = [sequence.next_id for sequence in batch.sequences]
        return self.model.decode(
            ids,
            caches,
            [sequence.mode for sequence in batch.sequences],
            times=self.stats.times,
            tap=self.audit.tap(
                [sequence.id for sequence in batch.sequences],
                [s.audit if s.is_at_end else None for s in batch.sequences],
            ),
            layer_mode=None if self.guard is None else self.guard.mode,
            greedy=all(sequence.takes_the_likeliest for sequence in batch.sequences),
        )

    def _read_prompt(self, sequence: Sequence, cache: SequenceCache, part: range) -> Tensor:
        if not part:
            assert cache.logits_V is not None, "all of the prompt was found"
            return cache.logits_V[None]
        start = perf_counter()
        prompt = sequence.request.prompt_ids
        num_top = None if sequence.output_ids else sequence.sampling.prompt_logprobs
        ids = prompt[part.start : part.stop]
        logits = self.model.prefill(ids, cache, self.mode, all_logits=num_top is not None)
        if num_top is not None:
            seen = sequence.prompt_logprobs or [None]  # the first token follows nothing
            following = prompt[part.start + 1 : part.stop + 1]
            sequence.prompt_logprobs = seen + prompt_logprobs(logits, following, num_top)
            logits = logits[-1]
        if part.stop == len(prompt):
            self.kv_cache.keep_end(cache, logits)
        self.stats.times.prefill_s += perf_counter() - start
        self.stats.totals.prompt_tokens += len(ids)
        return logits[None]

    def _sample(self, logits_NV: Tensor, batch: Batch) -> list[Sample]:
        if not batch.rows:
            return []
        start = perf_counter()
        if len(batch.rows) < len(logits_NV):
            logits_NV = logits_NV[list(batch.rows)]
        samples = self.sampler.sample(logits_NV, batch.sampled)
        self.stats.times.sample_s += perf_counter() - start
        return samples

    def _publish(self, events: Iterable[Event]) -> None:
        for sequence, event in events:
            if event.finish_reason is not None:
                self._inbox.ended(sequence.id)
            self.stats.count(event)
            try:
                sequence.on_event(event)
            except Exception:
                # The receiver is gone or broken: its own request ends, the others go on.
                log.exception("the receiver of request %s failed", sequence.id)
                self._inbox.abort(sequence.id)

    def _run(self) -> None:
        while True:
            try:
                return self._serve()
            except Exception as error:
                if self.config.on_gpu_loss == "exit" or not is_loss(error):
                    return self._die(error)
                try:
                    self._move_to_cpu(error)
                except Exception as second:
                    return self._die(second)

    def _serve(self) -> None:
        """Until `stop`."""
        while not self._is_over():
            if self.step() or self._drain_until is not None:
                continue
            if not self._idle.run_slice():
                self._inbox.wait()
        self._admit()
        self._publish(self.scheduler.end_all("abort"))

    def _new_scheduler(self) -> Scheduler:
        return Scheduler(
            self.kv_cache, self.config.max_batch, self.sampler.stop_ids, self.stats.totals
        )

    def _is_over(self) -> bool:
        """Whether `stop` was called and either nothing is left or the time to drain is up."""
        if self._drain_until is None:
            return False
        return monotonic() >= self._drain_until or not self._inbox.num_in_flight

    def _move_to_cpu(self, error: Exception) -> None:
        """The accelerator is lost: answer everyone, load the model on the CPU, take requests."""
        log.exception("the accelerator is lost; loading the model on the CPU", exc_info=error)
        self._is_recovering = True
        try:
            self._answer_all(f"the accelerator was lost ({type(error).__name__}: {error}); send "
                             "the request again in a while")  # fmt: skip
            sink, config = self.audit.sink, self.parts.config
            self._adopt(
                build(replace(config, device="cpu", vram_budget_bytes=None, placement=None))
            )
            self.audit.sink = sink
            if self._drain_until is None:
                self._inbox.reopen()
        finally:
            self._is_recovering = False
        log.warning("serving on the CPU from now on")

    def _die(self, error: Exception) -> None:
        """Answer everyone, whatever state the scheduler was left in, and refuse from now on."""
        log.exception("the engine stopped after an error", exc_info=error)
        self._answer_all(f"the engine stopped after an error: {type(error).__name__}: {error}")
        self.kv_cache.forget_all()
        self.scheduler = self._new_scheduler()

    def _answer_all(self, reason: str) -> None:
        """With an error; no request is taken from now on."""
        sequences = self._inbox.kill(reason)
        events = [TokenEvent(s.id, None, s.num_output, None, "error", reason) for s in sequences]
        self._publish(zip(sequences, events, strict=True))
