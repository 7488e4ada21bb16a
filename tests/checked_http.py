"""An HTTP client that holds every reply of the API to OpenAI's schemas while it is read.

Whatever a test looks at in a reply, its form is looked at too: JSON as a whole, streams event by
event, refusals of every route.
"""

import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import httpx

from tests import openai_schemas as spec

Check = Callable[[Any], Any]
REPLIES = {
    "/v1/chat/completions": "ChatCompletion",
    "/v1/completions": "Completion",
    "/v1/responses": "Response",
    "/v1/models": spec.MODELS,
}
CHUNKS = {
    "/v1/chat/completions": "ChatCompletionChunk",
    "/v1/completions": spec.STREAMED_COMPLETION,
}
DONE = "[DONE]"


def checked_client(**settings: Any) -> httpx.Client:
    return httpx.Client(transport=CheckedTransport(), **settings)


class CheckedTransport(httpx.BaseTransport):
    """Who reads a reply that is not as the schemas say gets a jsonschema.ValidationError."""

    def __init__(self, inner: httpx.BaseTransport | None = None) -> None:
        self._inner = inner or httpx.HTTPTransport()

    def close(self) -> None:
        self._inner.close()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        reply = self._inner.handle_request(request)
        assert isinstance(reply.stream, httpx.SyncByteStream)
        path, kind = request.url.path, reply.headers.get("content-type", "")
        if kind.startswith("text/event-stream") and path in REPLIES:
            reply.stream = _CheckedEvents(reply.stream, path)
        elif kind.startswith("application/json") and request.method != "HEAD":
            name = _reply_name(path) if reply.is_success else spec.ERROR
            if name:
                reply.stream = _CheckedJson(reply.stream, partial(spec.check, name=name))
        return reply


def _reply_name(path: str) -> str | None:
    """None: not a route of OpenAI's."""
    return "Model" if path.startswith("/v1/models/") else REPLIES.get(path)


class _CheckedJson(httpx.SyncByteStream):
    def __init__(self, inner: httpx.SyncByteStream, check: Check) -> None:
        self._inner, self._check = inner, check

    def __iter__(self) -> Iterator[bytes]:
        text = b""
        for part in self._inner:
            text += part
            yield part
        self._check(json.loads(text))

    def close(self) -> None:
        self._inner.close()


class _CheckedEvents(httpx.SyncByteStream):
    def __init__(self, inner: httpx.SyncByteStream, path: str) -> None:
        self._inner, self._path = inner, path

    def __iter__(self) -> Iterator[bytes]:
        rest = b""
        for part in self._inner:
            *events, rest = (rest + part).split(b"\n\n")
            for event in events:
                _check_event(event.decode(), self._path)
            yield part
        assert rest == b"", f"a stream ends within an event: {rest!r}"

    def close(self) -> None:
        self._inner.close()


def _check_event(event: str, path: str) -> None:
    """An event is one line of data, named only in /v1/responses; a ping is a comment alone."""
    *named, line = event.split("\n")
    if line.startswith(":") or line == f"data: {DONE}":
        assert named == []
        return
    assert line.startswith("data: ")
    value = json.loads(line.removeprefix("data: "))
    if path in CHUNKS:
        assert named == []
        spec.check(value, spec.ERROR if "error" in value else CHUNKS[path])
    else:
        assert named == [f"event: {value['type']}"]
        spec.check_event(value)
