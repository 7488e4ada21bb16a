"""A full queue, clients that leave, an engine that fails: nobody waits for nothing."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest

from server import load_tokenizer
from tests.checked_http import checked_client
from tests.fake_engine import (
    CHAT,
    HI,
    PLAIN,
    FakeEngine,
    LiveServer,
    error_of,
    say,
    serving,
    wait_until,
)


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path) -> Any:
    return load_tokenizer(tiny_model_dir)


@pytest.fixture
def live(tokenizer: Any) -> Iterator[LiveServer]:
    """A server of one's own, with room for one running and one waiting request."""
    engine = FakeEngine(say("x" * 400), max_batch=1, max_queue=1)
    with serving(engine, tokenizer) as live:
        yield live


def test_a_full_queue(live: LiveServer) -> None:
    live.engine.gate.clear()
    body = {"messages": HI, "stream": True, "max_tokens": 3}
    with (
        live.http.stream("POST", CHAT, json=body) as first,
        live.http.stream("POST", CHAT, json=body) as second,
    ):
        assert wait_until(lambda: live.engine.num_jobs == 2)
        reply = live.http.post(CHAT, json=body)
        error = error_of(reply)
        assert (reply.status_code, error["code"]) == (503, "server_overloaded")
        assert error["type"] == "server_error"
        assert int(reply.headers["retry-after"]) >= 1
        line = 'hotneuron_admission_rejections_total{model_name="tiny",reason="queue_full"} 1.0'
        assert line in live.http.get("/metrics").text
        live.engine.gate.set()
        for stream in (first, second):
            assert stream.read().endswith(b"[DONE]\n\n")


def test_the_official_client_waits_for_a_full_queue(live: LiveServer) -> None:
    live.engine.gate.clear()
    body = {"messages": HI, "stream": True, "max_tokens": 3}
    with (
        live.http.stream("POST", CHAT, json=body),
        live.http.stream("POST", CHAT, json=body),
        openai.OpenAI(
            base_url=live.url + "/v1", api_key="x", http_client=checked_client()
        ) as client,
    ):
        assert wait_until(lambda: live.engine.num_jobs == 2)
        refusals: list[int] = []
        client._client.event_hooks["response"] = [
            lambda reply: (refusals.append(reply.status_code), live.engine.gate.set())
        ]
        answer = client.chat.completions.create(model="tiny", messages=HI, max_tokens=2)  # type: ignore[arg-type]
    assert answer.choices[0].message.content == "xx"
    assert refusals[0] == 503
    assert refusals[-1] == 200


def test_one_key_cannot_take_the_queue(tokenizer: Any) -> None:
    """Its unfinished answers are bounded; another's requests go on, and its own when some end."""
    mine, theirs = ({"authorization": f"Bearer {key}"} for key in ("mine", "theirs"))
    keys = {"api_keys": ("mine", "theirs"), "max_per_client": 3}
    with serving(FakeEngine(say("x" * 400)), tokenizer, **keys) as live:
        live.engine.gate.clear()
        body = {"messages": HI, "stream": True, "max_tokens": 3}
        with live.http.stream("POST", CHAT, json={**body, "n": 2}, headers=mine) as stream:
            assert wait_until(lambda: live.engine.num_jobs == 2)
            for path, asked in (
                (CHAT, {**body, "n": 2}),
                (CHAT, {"messages": HI, "n": 2}),
                (PLAIN, {"prompt": ["a", "b"]}),
            ):
                reply = live.http.post(path, json=asked, headers=mine)
                error = error_of(reply)
                assert (reply.status_code, error["code"]) == (429, "rate_limit_exceeded")
                assert error["type"] == "rate_limit_error"
                assert "--max-per-client" in error["message"]
                assert int(reply.headers["retry-after"]) >= 1
            reply = live.http.post(CHAT, json={**body, "n": 4}, headers=theirs)
            assert (reply.status_code, error_of(reply)["param"]) == (400, "n")
            assert live.engine.num_jobs == 2
            with (
                live.http.stream("POST", CHAT, json=body, headers=mine) as third,
                live.http.stream("POST", CHAT, json={**body, "n": 3}, headers=theirs) as other,
            ):
                assert wait_until(lambda: live.engine.num_jobs == 6)
                live.engine.gate.set()
                for answered in (stream, third, other):
                    assert answered.read().endswith(b"[DONE]\n\n")
        for _ in range(3):  # what has ended, was refused or was left is not counted
            with live.http.stream("POST", CHAT, json={**body, "max_tokens": 400}, headers=mine):
                pass
        assert wait_until(lambda: live.engine.num_jobs == 0)
        reply = live.http.post(CHAT, json={"messages": HI, "n": 3}, headers=mine)
        assert reply.status_code == 200
        counted = 'admission_rejections_total{model_name="tiny",reason="rate_limit_exceeded"} 3.0'
        assert counted in live.http.get("/metrics", headers=mine).text
        assert live.http.get("/server_info", headers=mine).json()["limits"]["max_per_client"] == 3
        assert not live.app.state.server.client_limits._held


def test_the_official_client_tries_again_when_told_to_wait(tokenizer: Any) -> None:
    with (
        serving(FakeEngine(say("x" * 400)), tokenizer, max_per_client=1) as live,
        openai.OpenAI(
            base_url=live.url + "/v1", api_key="x", http_client=checked_client()
        ) as client,
    ):
        live.engine.gate.clear()
        with live.http.stream("POST", CHAT, json={"messages": HI, "stream": True, "max_tokens": 3}):
            assert wait_until(lambda: live.engine.num_jobs == 1)
            statuses: list[int] = []
            client._client.event_hooks["response"] = [
                lambda reply: (statuses.append(reply.status_code), live.engine.gate.set())
            ]
            answer = client.chat.completions.create(model="tiny", messages=HI, max_tokens=2)  # type: ignore[arg-type]
    assert answer.choices[0].message.content == "xx"
    assert (statuses[0], statuses[-1]) == (429, 200)


def test_several_answers_are_taken_whole_or_not_at_all(live: LiveServer) -> None:
    live.engine.gate.clear()
    with live.http.stream("POST", CHAT, json={"messages": HI, "stream": True}):
        assert wait_until(lambda: live.engine.num_jobs == 1)
        reply = live.http.post(CHAT, json={"messages": HI, "n": 2})
        assert reply.status_code == 503
        assert live.engine.num_jobs == 1
        live.engine.gate.set()


class Caller:
    """A raw connection that can be dropped at any moment."""

    def __init__(self, live: LiveServer, body: dict[str, Any]) -> None:
        payload = json.dumps(body).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        self._socket = socket.create_connection(("127.0.0.1", urlsplit(live.url).port or 0))
        self._socket.sendall(f"{head}Content-Length: {len(payload)}\r\n\r\n".encode() + payload)

    def read(self, until: bytes) -> None:
        seen = b""
        while until not in seen:
            seen += self._socket.recv(4096)

    def leave(self) -> None:
        self._socket.close()


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("n", [1, 2])
def test_leaving_frees_the_engine(live: LiveServer, stream: bool, n: int) -> None:
    live.engine.step_seconds = 0.01
    caller = Caller(live, {"messages": HI, "stream": stream, "n": n})
    assert wait_until(lambda: live.engine.num_jobs == n)
    if stream:
        caller.read(b'"content":"x"')
    caller.leave()
    assert wait_until(lambda: live.engine.num_jobs == 0)
    assert len(live.engine.aborted) == n
    text = live.http.get("/metrics").text
    assert f'finished_reason="abort",model_name="tiny"}} {n}.0' in text
    assert 'hotneuron_num_requests_running{model_name="tiny"} 0.0' in text


@pytest.mark.parametrize("stream", [True, False])
def test_leaving_the_queue(live: LiveServer, stream: bool) -> None:
    """The one that waits leaves; the one that runs is not touched."""
    live.engine.gate.clear()
    running = Caller(live, {"messages": HI, "stream": True, "max_tokens": 5})
    assert wait_until(lambda: live.engine.num_jobs == 1)
    waiting = Caller(live, {"messages": HI, "stream": stream})
    assert wait_until(lambda: live.engine.num_jobs == 2)
    waiting.leave()
    assert wait_until(lambda: live.engine.num_jobs == 1)
    assert live.engine.aborted == [live.engine.requests[1].id]
    live.engine.gate.set()
    running.read(b"[DONE]")
    running.leave()
    assert len(live.engine.aborted) == 1


def test_a_finished_request_is_not_aborted(live: LiveServer) -> None:
    for stream in (True, False):
        live.http.post(CHAT, json={"messages": HI, "max_tokens": 3, "stream": stream})
    assert live.engine.aborted == []


def test_an_engine_error(live: LiveServer) -> None:
    live.engine.fail_with = "the step failed"
    reply = live.http.post(CHAT, json={"messages": HI})
    error = error_of(reply)
    assert (reply.status_code, error["code"]) == (500, "engine_error")
    assert error["message"] == "the step failed"


def test_an_engine_error_in_a_stream(live: LiveServer) -> None:
    live.engine.step_seconds = 0.005
    with openai.OpenAI(
        base_url=live.url + "/v1", api_key="x", http_client=checked_client()
    ) as client:
        stream = client.chat.completions.create(model="tiny", messages=HI, stream=True)  # type: ignore[call-overload]
        for _ in range(3):
            next(stream)
        live.engine.fail_with = "the step failed"
        with pytest.raises(openai.APIError, match="the step failed"):
            list(stream)
    live.engine.fail_with = "again"
    reply = live.http.post(CHAT, json={"messages": HI, "stream": True})
    assert reply.status_code == 200
    *_, last, done = reply.text.strip().split("\n\n")
    assert json.loads(last.removeprefix("data: "))["error"]["message"] == "again"
    assert done == "data: [DONE]"


def test_an_engine_that_stops(live: LiveServer) -> None:
    live.engine.gate.clear()
    body = {"messages": HI, "stream": True}
    with live.http.stream("POST", CHAT, json=body) as reply:
        assert wait_until(lambda: live.engine.num_jobs == 1)
        live.engine.stop()
        assert '"code":"aborted"' in reply.read().decode().replace(": ", ":")
    for path in ("/health", "/ready"):
        reply = live.http.get(path)
        assert (reply.status_code, error_of(reply)["code"]) == (503, "engine_dead")
    reply = live.http.post(CHAT, json={"messages": HI})
    assert (reply.status_code, error_of(reply)["code"]) == (503, "engine_dead")


def test_an_engine_that_dies_silently(tokenizer: Any) -> None:
    with serving(FakeEngine(), tokenizer, ping_seconds=0.05) as live:
        live.engine.gate.clear()
        live.engine.die()
        live.engine._is_stopped = False
        with live.http.stream("POST", CHAT, json={"messages": HI, "stream": True}) as reply:
            assert wait_until(lambda: live.engine.num_jobs == 1)
            live.engine.die()
            assert "engine_dead" in reply.read().decode()


@pytest.mark.parametrize("stream", [True, False])
def test_what_nobody_foresaw_is_a_500_without_details(
    live: LiveServer, stream: bool, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("secret <object at 0x7f00>")

    where = "server.generation.Answer.feed" if stream else "server.routes.check_room"
    monkeypatch.setattr(where, broken)
    reply = live.http.post(CHAT, json={"messages": HI, "stream": stream})
    assert "secret" not in reply.text
    assert "its log has the cause" in reply.text
    if not stream:
        assert reply.status_code == 500
        assert error_of(reply)["type"] == "server_error"
    assert wait_until(lambda: "secret" in caplog.text)
    assert wait_until(lambda: live.engine.num_jobs == 0)
