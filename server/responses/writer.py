"""From deltas of an answer to a response: its items while they grow, the events that tell so."""

import uuid
from dataclasses import dataclass, field
from typing import Any

from ..errors import ApiError
from ..generation import Delta
from ..layouts import describe_tokens
from ..text import TextCodec
from ..tool_calls import CallDelta
from .replies import (
    IncompleteDetails,
    OutputCall,
    OutputItem,
    OutputMessage,
    OutputText,
    ResponseError,
    ResponseReply,
    ResponseUsage,
)

Event = dict[str, Any]


@dataclass
class ResponseWriter:
    """Owns the response while it is written; `take_events` takes what was told of it."""

    codec: TextCodec
    response: ResponseReply
    _events: list[Event] = field(default_factory=list)
    _num_events: int = 0
    _open: OutputItem | None = None  # the last of the output, while it grows

    def take_events(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def start(self) -> None:
        for kind in ("response.created", "response.in_progress"):
            self._tell_response(kind)

    def feed(self, delta: Delta) -> None:
        if delta.text or (delta.tokens and isinstance(self._open, OutputMessage)):
            self._write_text(delta)
        for call in delta.calls:
            self._write_call(call)
        if delta.finish_reason == "length":
            self.response.incomplete_details = IncompleteDetails(reason="max_output_tokens")

    def finish(self, usage: ResponseUsage, completed_at: int) -> None:
        """An answer without a word is a message without text."""
        response = self.response
        is_whole = response.incomplete_details is None
        if not response.output:
            self._begin_message()
        self._end_item("completed" if is_whole else "incomplete")
        response.usage = usage
        response.status = "completed" if is_whole else "incomplete"
        response.completed_at = completed_at if is_whole else None
        self._tell_response(f"response.{response.status}")

    def fail(self, error: ApiError) -> None:
        """For streams: otherwise an error is a response of its own."""
        self.response.status = "failed"
        code = "server_error" if error.status_code >= 500 else "invalid_prompt"
        self.response.error = ResponseError(code=code, message=str(error.detail))
        self._tell_response("response.failed")
        self._tell("error", code=error.code, message=str(error.detail), param=error.param)

    def _write_text(self, delta: Delta) -> None:
        if not isinstance(self._open, OutputMessage):
            self._begin_message()
        message = self._open
        assert isinstance(message, OutputMessage)
        logprobs = describe_tokens(self.codec, delta.tokens)
        (part,) = message.content
        part.text += delta.text
        part.logprobs += logprobs
        self._tell(
            "response.output_text.delta",
            **self._place(message),
            content_index=0,
            delta=delta.text,
            logprobs=[logprob.model_dump() for logprob in logprobs],
        )

    def _begin_message(self) -> None:
        message = OutputMessage(id=_new_id("msg"), status="in_progress", content=[])
        self._begin_item(message)
        part = OutputText(text="", annotations=[], logprobs=[])
        message.content.append(part)
        self._tell(
            "response.content_part.added",
            **self._place(message),
            content_index=0,
            part=part.model_dump(),
        )

    def _write_call(self, delta: CallDelta) -> None:
        if delta.name is not None:
            call = OutputCall(
                id=_new_id("fc"),
                call_id=str(delta.id),
                name=delta.name,
                arguments="",
                status="in_progress",
            )
            self._begin_item(call)
        if delta.arguments:
            assert isinstance(self._open, OutputCall)
            self._open.arguments += delta.arguments
            self._tell(
                "response.function_call_arguments.delta",
                **self._place(self._open),
                delta=delta.arguments,
            )

    def _begin_item(self, item: OutputItem) -> None:
        self._end_item("completed")
        self.response.output.append(item)
        self._open = item
        self._tell_item("response.output_item.added", item)

    def _end_item(self, status: Any) -> None:
        item, self._open = self._open, None
        if item is None:
            return
        item.status = status
        place = self._place(item)
        if isinstance(item, OutputMessage):
            part = item.content[0].model_dump()
            self._tell(
                "response.output_text.done",
                **place,
                content_index=0,
                text=part["text"],
                logprobs=part["logprobs"],
            )
            self._tell("response.content_part.done", **place, content_index=0, part=part)
        else:
            self._tell(
                "response.function_call_arguments.done",
                **place,
                name=item.name,
                arguments=item.arguments,
            )
        self._tell_item("response.output_item.done", item)

    def _place(self, item: OutputItem) -> Event:
        return {"item_id": item.id, "output_index": len(self.response.output) - 1}

    def _tell_item(self, kind: str, item: OutputItem) -> None:
        index = len(self.response.output) - 1
        self._tell(kind, output_index=index, item=item.model_dump())

    def _tell_response(self, kind: str) -> None:
        self._tell(kind, response=self.response.as_dict())

    def _tell(self, kind: str, **fields: Any) -> None:
        self._events.append({"type": kind, "sequence_number": self._num_events, **fields})
        self._num_events += 1


def _new_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"
