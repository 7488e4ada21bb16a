"""What only real clients do to a server: malformed bodies, leaving in the middle, coming back."""

import json
import socket
import threading
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest

from tests.clients.questions import ASKED
from tests.clients.running_server import KEY, MODEL, RunningServer, serving

CHAT = "/v1/chat/completions"
HI = {"role": "user", "content": "hi"}


def error_of(reply: httpx.Response) -> dict[str, Any]:
    """The error object, which has the four keys of the specification and no others."""
    (error,) = reply.json().values()
    assert set(error) == {"message", "type", "param", "code"}
    return error


def body(**fields: Any) -> bytes:
    return json.dumps({"model": MODEL, "messages": [HI], "max_tokens": 4, **fields}).encode()


MALFORMED: list[bytes] = [
    b"",
    b" ",
    b"{",
    b"nonsense",
    b"[]",
    b"null",
    b"0",
    b'"text"',
    b"\x00\x01\x02",
    b"\xff\xfe{\x00}\x00",
    b'{"messages": [}',
    b'{"messages": [{"role": "user", "content": "\\ud83d"}]}',
    b'{"messages": [{"role": "user", "content": "\xff"}]}',
    b"[" * 200_000,
    b'{"a":' * 50_000,
    b'{"temperature": 1e999, "messages": [{"role": "user", "content": "hi"}]}',
    b'{"max_tokens": ' + b"9" * 10_000 + b', "messages": []}',
    b"messages=hi&model=default",
    body()[:-1],
    body() + b"}",
    body(messages="hi"),
    body(messages={}),
    body(messages=[[]]),
    body(messages=[{"role": "user"}]),
    body(messages=[{"role": "king", "content": "hi"}]),
    body(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]),
    body(max_tokens="many"),
    body(max_tokens=-1),
    body(temperature="NaN"),
    body(n=10**6),
    body(stop=[""]),
    body(logit_bias={"a": 1}),
    body(stream="maybe"),
    body(seed=1.5),
    body(top_logprobs=3),
]


def test_there_are_thirty_malformed_bodies() -> None:
    assert len(set(MALFORMED)) >= 30


@pytest.mark.parametrize("content", MALFORMED, ids=range(len(MALFORMED)))
@pytest.mark.parametrize("media_type", ["application/json", None])
def test_malformed_bodies(server: RunningServer, content: bytes, media_type: str | None) -> None:
    headers = {"content-type": media_type} if media_type else {}
    with server.http() as http:
        reply = http.post(CHAT, content=content, headers=headers)
    assert reply.status_code == 400, reply.text
    assert error_of(reply)["type"] == "invalid_request_error"
    assert reply.headers["x-request-id"]
    assert "Traceback" not in reply.text


def test_a_body_that_is_too_large(server: RunningServer) -> None:
    with server.http() as http:
        reply = http.post(CHAT, content=body(user="x" * (8 << 20)))
    assert reply.status_code == 413
    assert error_of(reply)["code"] == "request_too_large"


@pytest.fixture(scope="module")
def narrow() -> Iterator[RunningServer]:
    """Room for one running and one waiting request."""
    with serving("--max-batch", "1", "--max-queue", "1") as running:
        yield running


class Caller:
    """A connection without a client library, to be cut at any moment."""

    def __init__(self, server: RunningServer, content: bytes) -> None:
        address = urlsplit(server.origin)
        self._socket = socket.create_connection((address.hostname, address.port), timeout=60)
        head = (
            f"POST {CHAT} HTTP/1.1\r\nHost: {address.netloc}\r\nAuthorization: Bearer {KEY}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        )
        self._socket.sendall(head.encode() + content)

    def read_until(self, mark: bytes) -> None:
        seen = b""
        while mark not in seen:
            received = self._socket.recv(4096)
            assert received, seen
            seen += received

    def leave(self) -> None:
        self._socket.close()


def endless(*, stream: bool, prompt: str = "Tell me a story.") -> bytes:
    messages = [{"role": "user", "content": prompt}]
    return body(messages=messages, stream=stream, max_tokens=1500, ignore_eos=True)


@pytest.mark.parametrize("stream", [True, False])
def test_leaving_while_decoding(narrow: RunningServer, stream: bool) -> None:
    caller = Caller(narrow, endless(stream=stream))
    if stream:
        caller.read_until(b'"content":"')
        caller.read_until(b'"content":"')
    narrow.wait_for_gauges(1, 0)
    caller.leave()
    narrow.wait_for_gauges(0, 0, seconds=5)


@pytest.mark.parametrize("stream", [True, False])
def test_leaving_during_prefill(narrow: RunningServer, stream: bool) -> None:
    caller = Caller(narrow, endless(stream=stream, prompt="word " * 6000))
    narrow.wait_for_gauges(1, 0)
    caller.leave()
    narrow.wait_for_gauges(0, 0, seconds=20)


@pytest.mark.parametrize("stream", [True, False])
def test_leaving_the_queue(narrow: RunningServer, stream: bool) -> None:
    running = Caller(narrow, endless(stream=True))
    running.read_until(b'"content":"')
    waiting = Caller(narrow, endless(stream=stream))
    narrow.wait_for_gauges(1, 1)
    waiting.leave()
    narrow.wait_for_gauges(1, 0, seconds=5)
    running.read_until(b'"content":"')  # the one that runs goes on
    running.leave()
    narrow.wait_for_gauges(0, 0, seconds=5)


def test_the_client_retries_a_full_queue_until_there_is_room(narrow: RunningServer) -> None:
    callers = [Caller(narrow, endless(stream=True)), Caller(narrow, endless(stream=True))]
    narrow.wait_for_gauges(1, 1)
    statuses: list[tuple[int, str | None]] = []

    def leave_after_a_refusal() -> None:
        for caller in callers:
            caller.leave()

    with openai.OpenAI(base_url=narrow.url, api_key=KEY, max_retries=5) as client:

        def note(reply: Any) -> None:
            statuses.append((reply.status_code, reply.headers.get("retry-after")))
            if reply.status_code == 503:
                threading.Thread(target=leave_after_a_refusal).start()

        client._client.event_hooks["response"] = [note]
        answer = client.chat.completions.create(
            model=MODEL, messages=ASKED, temperature=0, max_tokens=12
        )
    assert "Paris" in (answer.choices[0].message.content or "")
    (first, retry_after), *_, (last, _) = statuses
    assert (first, last) == (503, 200)
    assert retry_after is not None
    assert int(retry_after) >= 1
    narrow.wait_for_gauges(0, 0)


def test_without_retries_the_refusal_says_why(narrow: RunningServer) -> None:
    callers = [Caller(narrow, endless(stream=True)), Caller(narrow, endless(stream=True))]
    narrow.wait_for_gauges(1, 1)
    with (
        openai.OpenAI(base_url=narrow.url, api_key=KEY, max_retries=0) as client,
        pytest.raises(openai.InternalServerError) as refusal,
    ):
        client.chat.completions.create(model=MODEL, messages=ASKED)
    assert refusal.value.status_code == 503
    assert refusal.value.code == "server_overloaded"
    for caller in callers:
        caller.leave()
    narrow.wait_for_gauges(0, 0)
