"""From deltas to replies: as chat or as plain completion, in chunks or whole.

A layout is made per HTTP request and knows its choices; it keeps no state between deltas.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from runtime.sequence import TokenLogprobs

from .generation import Delta, ShownToken
from .replies import (
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatLogprobs,
    ChatReplyMessage,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    FunctionReply,
    TokenLogprob,
    ToolCallReply,
    TopLogprob,
    Usage,
)
from .text import Detokenizer, TextCodec
from .tool_calls import CallDelta, whole_calls

LEAST_LOGPROB = -9999.0  # JSON has no minus infinity


@dataclass(frozen=True)
class ReplyHead:
    """What all chunks of one reply share."""

    id: str
    model: str
    system_fingerprint: str
    created: int = field(default_factory=lambda: int(time.time()))

    def fields(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.system_fingerprint,
        }


@dataclass(frozen=True)
class ChatFormat:
    """Deltas as chat chunks and as one chat completion."""

    codec: TextCodec
    head: ReplyHead
    num_choices: int
    wants_logprobs: bool
    must_call: bool = False

    def first_chunks(self) -> list[ChatCompletionChunk]:
        content = None if self.must_call else ""
        opening = ChatReplyMessage(role="assistant", content=content, refusal=None)
        return [self._chunk(i, opening, None, None) for i in range(self.num_choices)]

    def chunks(self, delta: Delta) -> list[ChatCompletionChunk]:
        made = []
        logprobs = self._logprobs(delta.tokens)
        if delta.text or (self.wants_logprobs and delta.tokens and not delta.calls):
            message = ChatReplyMessage(content=delta.text)
            made.append(self._chunk(delta.choice, message, logprobs, None))
            logprobs = self._logprobs(())
        for call in delta.calls:
            message = ChatReplyMessage(tool_calls=[_call_chunk(call)])
            made.append(self._chunk(delta.choice, message, logprobs, None))
            logprobs = self._logprobs(())
        if delta.finish_reason:
            made.append(self._chunk(delta.choice, ChatReplyMessage(), None, delta.finish_reason))
        return made

    def usage_chunk(self) -> ChatCompletionChunk:
        """The last one, of no choice; who sends it fills in the usage."""
        return ChatCompletionChunk(**self.head.fields(), object="chat.completion.chunk", choices=[])

    def whole(self, deltas: Sequence[Delta], total: Usage) -> ChatCompletion:
        choices = []
        for i in range(self.num_choices):
            own = [delta for delta in deltas if delta.choice == i]
            choices.append(
                ChatChoice(
                    index=i,
                    message=_whole_message(own),
                    logprobs=self._logprobs([token for delta in own for token in delta.tokens]),
                    finish_reason=_finish_reason(own),
                )
            )
        return ChatCompletion(
            **self.head.fields(), object="chat.completion", choices=choices, usage=total
        )

    def _chunk(
        self,
        index: int,
        message: ChatReplyMessage,
        logprobs: ChatLogprobs | None,
        finish_reason: Any,
    ) -> ChatCompletionChunk:
        choice = ChatChunkChoice(
            index=index, delta=message, logprobs=logprobs, finish_reason=finish_reason
        )
        return ChatCompletionChunk(
            **self.head.fields(), object="chat.completion.chunk", choices=[choice]
        )

    def _logprobs(self, tokens: Sequence[ShownToken]) -> ChatLogprobs | None:
        if not self.wants_logprobs:
            return None
        return ChatLogprobs(content=describe_tokens(self.codec, tokens), refusal=None)


def describe_tokens(codec: TextCodec, tokens: Sequence[ShownToken]) -> list[TokenLogprob]:
    """Log probabilities as chats and responses have them; tokens without any are left out."""
    described = []
    for token in tokens:
        if token.logprobs is not None:
            top = [TopLogprob(**_token(codec, *pair)) for pair in token.logprobs.top]
            own = _token(codec, token.token_id, token.logprobs.logprob)
            described.append(TokenLogprob(**own, top_logprobs=top))
    return described


def _token(codec: TextCodec, token_id: int, logprob: float) -> dict[str, Any]:
    return {
        "token": codec.token_text(token_id),
        "logprob": max(logprob, LEAST_LOGPROB),
        "bytes": list(codec.token_bytes(token_id)),
    }


def _whole_message(deltas: Sequence[Delta]) -> ChatReplyMessage:
    text = "".join(delta.text for delta in deltas)
    calls = whole_calls([call for delta in deltas for call in delta.calls])
    if not calls:
        return ChatReplyMessage(role="assistant", content=text, refusal=None)
    return ChatReplyMessage(
        role="assistant",
        content=text or None,
        refusal=None,
        tool_calls=[
            ToolCallReply(
                id=call.id,
                type="function",
                function=FunctionReply(name=call.name, arguments=call.arguments),
            )
            for call in calls
        ],
    )


def _call_chunk(call: CallDelta) -> ToolCallReply:
    """The first chunk of a call names it, later ones carry fragments of its arguments."""
    if call.name is None:
        return ToolCallReply(index=call.index, function=FunctionReply(arguments=call.arguments))
    function = FunctionReply(name=call.name, arguments=call.arguments)
    return ToolCallReply(index=call.index, id=call.id, type="function", function=function)


@dataclass(frozen=True)
class Echo:
    """The prompt as the head of an answer: its text, its ids and where each starts in the text."""

    text: str
    token_ids: Sequence[int]
    starts: Sequence[int]


@dataclass(frozen=True)
class CompletionFormat:
    """Deltas as `text_completion` objects, in one piece or in many."""

    codec: TextCodec
    head: ReplyHead
    wants_logprobs: bool
    echoes: Sequence[Echo | None]  # one per choice

    def first_chunks(self) -> list[Completion]:
        """Echoed prompts; with log probabilities they must wait for the engine's first event."""
        if self.wants_logprobs:
            return []
        return [
            self._completion(
                [CompletionChoice(index=i, text=echo.text, logprobs=None, finish_reason=None)]
            )
            for i, echo in enumerate(self.echoes)
            if echo
        ]

    def chunks(self, delta: Delta) -> list[Completion]:
        with_echo = delta.prompt_logprobs is not None
        return [
            self._completion([self._choice(delta.choice, [delta], with_echo, delta.finish_reason)])
        ]

    def usage_chunk(self) -> Completion:
        return self._completion([])

    def whole(self, deltas: Sequence[Delta], total: Usage) -> Completion:
        choices = []
        for i in range(len(self.echoes)):
            own = [delta for delta in deltas if delta.choice == i]
            choices.append(self._choice(i, own, True, _finish_reason(own)))
        completion = self._completion(choices)
        completion.usage = total
        return completion

    def _completion(self, choices: list[CompletionChoice]) -> Completion:
        return Completion(**self.head.fields(), object="text_completion", choices=choices)

    def _choice(
        self, index: int, deltas: Sequence[Delta], with_echo: bool, finish_reason: Any
    ) -> CompletionChoice:
        echo = self.echoes[index]
        text = "".join(delta.text for delta in deltas)
        return CompletionChoice(
            index=index,
            text=echo.text + text if echo and with_echo else text,
            logprobs=self._logprobs(echo, deltas) if self.wants_logprobs else None,
            finish_reason=finish_reason,
        )

    def _logprobs(self, echo: Echo | None, deltas: Sequence[Delta]) -> CompletionLogprobs:
        rows: list[tuple[int, int, TokenLogprobs | None]] = []
        for delta in deltas:
            if echo and delta.prompt_logprobs is not None:
                rows += zip(echo.token_ids, echo.starts, delta.prompt_logprobs, strict=True)
        shift = len(echo.text) if echo else 0
        for delta in deltas:
            rows += [
                (token.token_id, shift + token.start, token.logprobs) for token in delta.tokens
            ]
        return CompletionLogprobs(
            tokens=[self.codec.token_text(token_id) for token_id, _, _ in rows],
            token_logprobs=[max(own.logprob, LEAST_LOGPROB) if own else None for _, _, own in rows],
            top_logprobs=[self._top(own) if own else None for _, _, own in rows],
            text_offset=[start for _, start, _ in rows],
        )

    def _top(self, own: TokenLogprobs) -> dict[str, float]:
        """The likeliest tokens, and always the one that was taken."""
        pairs = [*own.top, (own.token_id, own.logprob)]
        return {self.codec.token_text(i): max(value, LEAST_LOGPROB) for i, value in reversed(pairs)}


def make_echo(codec: TextCodec, text: str | None, token_ids: Sequence[int]) -> Echo:
    """`text` as the client sent it, or None for a prompt of ids: then specials show as well."""
    decoder = Detokenizer(codec, skip_special_tokens=text is not None)
    pieces, starts, length = [], [], 0
    for token_id in token_ids:
        starts.append(length)
        pieces.append(decoder.feed(token_id))
        length += len(pieces[-1])
    whole = "".join(pieces) + decoder.finish()
    return Echo(whole if text is None else text, token_ids, starts)


def _finish_reason(deltas: Sequence[Delta]) -> Any:
    return next(delta.finish_reason for delta in deltas if delta.finish_reason)
