"""The answers of one HTTP request: token events of the engine become text deltas.

`Answer` is one of them (detokenizer, stop strings, which log probabilities belong to shown text).
`Generation` owns all of one HTTP request: submits a `Request` for each, merges their events and,
whatever happens, aborts in the engine what has not finished. The engine thread only puts events on
the loop's queue; everything else runs on the loop.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from runtime import Request, TokenEvent
from runtime.errors import EngineDead
from runtime.sequence import EventCallback, TokenLogprobs
from runtime.sequence import Usage as EngineUsage

from .answer_times import AnswerObserver, AnswerTimes, EndedAnswer
from .client_limits import ClientLimits
from .errors import ApiError
from .state import EngineLike
from .text import Detokenizer, StopStrings, TextCodec
from .tool_calls import CallDelta, ToolCallReader


@dataclass(frozen=True)
class ShownToken:
    """A token of the answer and where its text starts in it, in characters."""

    token_id: int
    start: int
    logprobs: TokenLogprobs | None


@dataclass(frozen=True)
class Delta:
    """News of one answer. `tokens` are those whose text starts in what was shown up to now."""

    choice: int
    text: str = ""
    tokens: tuple[ShownToken, ...] = ()
    calls: tuple[CallDelta, ...] = ()
    finish_reason: str | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None

    @property
    def is_empty(self) -> bool:
        has_words = self.text or self.tokens or self.calls
        return not (has_words or self.finish_reason or self.prompt_logprobs)


@dataclass(frozen=True)
class AnswerOptions:
    """How tokens become text, as the client asked."""

    stops: Sequence[str] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    min_tokens: int = 0
    discard_tokens: bool = False
    """The client wants no tokens, only the prompt's log probabilities: one is made and dropped."""
    has_tools: bool = False
    """The answer may call tools: what is a call is read out of its text."""
    lists_end_token: bool = False
    """The token that ended the answer is one of its tokens, though it adds no text."""


class Answer:
    """One answer while it grows. Knows nothing of the engine but its events."""

    def __init__(self, choice: int, codec: TextCodec, options: AnswerOptions) -> None:
        self.choice = choice
        self.num_tokens = 0
        self.finish_reason: str | None = None
        self._options = options
        self._decoder = Detokenizer(codec, skip_special_tokens=options.skip_special_tokens)
        self._stops = StopStrings(options.stops, include=options.include_stop)
        self._decoded = 0  # characters, shown or held back
        self._shown = 0
        self._waiting: deque[ShownToken] = deque()  # tokens none of whose text is shown yet
        self._reader = ToolCallReader() if options.has_tools else None

    def feed(self, event: TokenEvent) -> Delta:
        """The event's news. Sets `finish_reason` at the engine's end or at a stop string."""
        if event.token_id is not None and self._options.discard_tokens:
            self.finish_reason = event.finish_reason and "length"
            return Delta(
                self.choice,
                finish_reason=self.finish_reason,
                prompt_logprobs=event.prompt_logprobs,
            )
        text = ""
        # The engine delivers the end token too; it is no part of the text.
        is_end_token = event.finish_reason == "stop" and not self._options.include_stop
        if event.token_id is not None:
            self.num_tokens += 1
            if not is_end_token:
                text = self._take(event.token_id, event.logprobs)
        if event.finish_reason and not self._stops.hit:
            text += self._watch(self._decoder.finish())
            if not self._stops.hit:
                text += self._stops.finish()
                if event.token_id is not None and is_end_token and self._options.lists_end_token:
                    self._waiting.append(ShownToken(event.token_id, self._decoded, event.logprobs))
        self.finish_reason = "stop" if self._stops.hit else event.finish_reason
        self._shown += len(text)
        tokens = self._release()
        calls: tuple[CallDelta, ...] = ()
        if self._reader is not None:
            text, calls = self._read_calls(self._reader, text)
        return Delta(self.choice, text, tokens, calls, self.finish_reason, event.prompt_logprobs)

    def _read_calls(self, reader: ToolCallReader, text: str) -> tuple[str, tuple[CallDelta, ...]]:
        text, calls = reader.feed(text)
        if self.finish_reason:
            text += reader.finish()
        if self.finish_reason == "stop" and reader.num_calls:
            self.finish_reason = "tool_calls"
        return text, tuple(calls)

    def _take(self, token_id: int, logprobs: TokenLogprobs | None) -> str:
        self._waiting.append(ShownToken(token_id, self._decoded, logprobs))
        return self._watch(self._decoder.feed(token_id))

    def _watch(self, decoded: str) -> str:
        self._decoded += len(decoded)
        if self.num_tokens < self._options.min_tokens:
            return self._stops.finish() + decoded
        return self._stops.feed(decoded)

    def _release(self) -> tuple[ShownToken, ...]:
        ended_whole = bool(self.finish_reason) and not self._stops.hit
        released = []
        while self._waiting and (ended_whole or self._waiting[0].start < self._shown):
            released.append(self._waiting.popleft())
        return tuple(released)


@dataclass
class _Part:
    """One answer with its request and the times of its events."""

    request: Request
    answer: Answer
    times: AnswerTimes
    is_submitted: bool = False
    usage: EngineUsage | None = None


@dataclass
class Generation:
    """Submit once, then read `deltas()` to its end; `close()` aborts what is left."""

    engine: EngineLike
    observers: Sequence[AnswerObserver]
    client_limits: ClientLimits
    client: str = ""
    """Who asks (`client_of`)."""
    answers_per_prompt: int = 1
    parts: list[_Part] = field(default_factory=list)  # answers of one prompt stand together
    form_param: str | None = None
    """The field that says which form the answers must have."""
    poll_seconds: float = 15.0
    _events: asyncio.Queue[tuple[_Part, float, TokenEvent]] = field(default_factory=asyncio.Queue)
    _is_open: bool = False  # its answers count as the client's
    _start: float = field(default_factory=time.perf_counter)

    def add(self, request: Request, answer: Answer) -> None:
        self.parts.append(_Part(request, answer, AnswerTimes(self._start)))

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(part.request.prompt_ids) for part in self._firsts)

    @property
    def num_completion_tokens(self) -> int:
        return sum(part.answer.num_tokens for part in self.parts)

    @property
    def usages(self) -> list[EngineUsage]:
        """What the engine counted for each answer, as far as it has said so."""
        return [part.usage for part in self.parts if part.usage is not None]

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens that were not computed again."""
        return sum(part.usage.cached_tokens for part in self._firsts if part.usage)

    @property
    def _firsts(self) -> list[_Part]:
        """The first answer of each prompt: a prompt counts once, however many answers it gets."""
        return self.parts[:: self.answers_per_prompt]

    def submit(self) -> None:
        """Hand every request to the engine, or none of them. Raises ApiError where the client has
        too many already, QueueFull where the server has."""
        loop = asyncio.get_running_loop()
        self.client_limits.take(self.client, len(self.parts))
        self._is_open = True
        try:
            for part in self.parts:
                self.engine.submit(part.request, self._callback(loop, part))
                part.is_submitted = True
        except BaseException:
            self.close()
            raise

    async def deltas(self) -> AsyncIterator[Delta | None]:
        """Deltas until every answer has finished; None after each `poll_seconds` of silence."""
        try:
            while any(part.answer.finish_reason is None for part in self.parts):
                try:
                    async with asyncio.timeout(self.poll_seconds):
                        part, at, event = await self._events.get()
                except TimeoutError:
                    if not self.engine.is_alive():
                        raise EngineDead("the engine stopped before the answer was done") from None
                    yield None
                    continue
                if part.answer.finish_reason is not None:
                    continue  # what the engine still said before it saw our abort
                delta = self._feed(part, at, event)
                if not delta.is_empty:
                    yield delta
        finally:
            self.close()

    def close(self) -> None:
        """Abort every request that has not finished. Safe to call twice."""
        if self._is_open:
            self._is_open = False
            self.client_limits.give_back(self.client, len(self.parts))
        for part in self.parts:
            if part.is_submitted and part.answer.finish_reason is None:
                part.answer.finish_reason = "abort"
                self._end(part, "abort")
                self.engine.abort(part.request.id)

    def _feed(self, part: _Part, at: float, event: TokenEvent) -> Delta:
        if event.usage is not None:
            part.usage = event.usage
            part.times.admitted = event.usage.admitted_at
        if event.finish_reason in ("error", "abort"):
            part.answer.finish_reason = event.finish_reason
            self._end(part, event.finish_reason)
            if event.finish_reason == "error":
                raise self._failure(event)
            raise ApiError(503, "The engine stopped before the answer was done.", code="aborted")
        if event.token_id is not None:
            self._note_token(part.times, at)
        delta = part.answer.feed(event)
        if delta.finish_reason:
            self._end(part, delta.finish_reason)
            if event.finish_reason is None:  # a stop string, which the engine does not know of
                self.engine.abort(part.request.id)
        return delta

    def _failure(self, event: TokenEvent) -> ApiError:
        message = event.error or "the engine failed on this request"
        if event.is_mask_error:
            message += "; make the schema or grammar simpler, or the answer shorter"
            return ApiError(400, message, param=self.form_param, code="constraint_failed")
        return ApiError(500, message, code="engine_error")

    def _note_token(self, times: AnswerTimes, at: float) -> None:
        for observer in self.observers:
            observer.token_came(times, at)
        times.first_token = times.first_token or at
        times.last_token = at

    def _end(self, part: _Part, reason: str) -> None:
        part.times.ended = time.perf_counter()
        request = part.request
        ended = EndedAnswer(
            request_id=request.id,
            mode=request.mode or self.engine.config.mode,
            reason=reason,
            num_prompt_tokens=len(request.prompt_ids),
            num_tokens=part.answer.num_tokens,
            max_tokens=request.sampling.max_tokens,
            times=part.times,
        )
        for observer in self.observers:
            observer.answer_ended(ended)

    def _callback(self, loop: asyncio.AbstractEventLoop, part: _Part) -> EventCallback:
        def on_event(event: TokenEvent) -> None:
            at = time.perf_counter()
            try:
                loop.call_soon_threadsafe(self._events.put_nowait, (part, at, event))
            except RuntimeError:
                # The loop was closed: the server is gone and nobody waits for this answer.
                if not loop.is_closed():
                    raise

        return on_event
