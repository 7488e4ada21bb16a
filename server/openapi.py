"""What /openapi.json says beside the replies: errors of each route, and streams of events."""

from typing import Any

from pydantic import BaseModel

Responses = dict[int | str, dict[str, Any]]


class ErrorObject(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    """Every refusal and every failure."""

    error: ErrorObject


def _errors(meanings: dict[int | str, str]) -> Responses:
    return {status: {"model": ErrorReply, "description": why} for status, why in meanings.items()}


READ_ERRORS = _errors({
    401: "The API key is missing or wrong.",
    "4XX": "Another refusal.",
    500: "The server failed on this request.",
    503: "The engine has stopped.",
})  # fmt: skip
"""Of routes that only tell something."""

ASK_ERRORS = _errors({
    400: "The request is wrong, or asks for what this server does not do; `param` names the field.",
    401: "The API key is missing or wrong.",
    404: "The model does not exist.",
    413: "The body is larger than this server reads.",
    429: "This client has as many answers under way as it may. Retry-After says when to try again.",
    "4XX": "Another refusal.",
    500: "The server failed on this request.",
    503: "The queue is full, or the engine has stopped. Retry-After says when to try again.",
})  # fmt: skip
"""Of routes that read a body."""


def or_events(what: str) -> Responses:
    """A stream of events where the request has `stream: true`; the schema is that of one event."""
    event = {
        "type": "object",
        "description": f"An event, sent with `stream: true`. `data` is {what}.",
        "properties": {"data": {"type": "string"}, "event": {"type": "string"}},
        "required": ["data"],
    }
    return {200: {"content": {"text/event-stream": {"schema": event}}}}
