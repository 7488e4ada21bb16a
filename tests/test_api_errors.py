"""Refusals: every one is an OpenAI error object; and who leaves is no longer computed for."""

import json
import logging
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server import ServerConfig, load_tokenizer
from server.schemas import ChatCompletionRequest, CompletionRequest, GenerationRequest
from tests.fake_engine import FakeEngine, LiveServer, say, serving, wait_until

CHAT, PLAIN = "/v1/chat/completions", "/v1/completions"
HI: list[dict[str, Any]] = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path) -> Any:
    return load_tokenizer(tiny_model_dir)


@pytest.fixture(scope="module")
def shared(tokenizer: Any) -> Iterator[LiveServer]:
    with serving(FakeEngine(), tokenizer) as live:
        yield live


@pytest.fixture
def live(tokenizer: Any) -> Iterator[LiveServer]:
    """A server of one's own, with room for one running and one waiting request."""
    engine = FakeEngine(say("x" * 400), max_batch=1, max_queue=1)
    with serving(engine, tokenizer) as live:
        yield live


def error_of(reply: httpx.Response) -> dict[str, Any]:
    """The error object, after checking that it has exactly the four keys of the specification."""
    assert reply.headers["x-request-id"]
    body = reply.json()
    assert set(body) == {"error"}
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    assert isinstance(error["type"], str)
    assert error["code"] is None or isinstance(error["code"], str)
    assert "0x" not in error["message"]
    assert "Traceback" not in error["message"]
    return error


def chat(**fields: Any) -> str:
    return json.dumps({"messages": HI, **fields})


def plain(**fields: Any) -> str:
    return json.dumps({"prompt": "a", **fields})


def message(**fields: Any) -> str:
    return json.dumps({"messages": [{"role": "user", "content": "hi", **fields}]})


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, "", None),
        (CHAT, "{", None),
        (CHAT, "[]", None),
        (CHAT, '"text"', None),
        (CHAT, "null", None),
        (CHAT, "\x00", None),
        (CHAT, "[" * 100_000, None),
        (CHAT, '{"max_tokens": ' + "9" * 5000 + "}", None),
        (CHAT, "{}", "messages"),
        (CHAT, chat(messages=[]), "messages"),
        (CHAT, chat(messages="hi"), "messages"),
        (CHAT, chat(messages=[1]), "messages[0]"),
        (CHAT, message(role="king"), "messages[0].role"),
        (CHAT, message(content=None), "messages[0].content"),
        (CHAT, message(content=5), "messages[0].content"),
        (CHAT, message(content=[{"type": "image_url"}]), "messages[0].content[0].type"),
        (CHAT, message(content=[{"type": "text"}]), "messages[0].content[0].text"),
        (CHAT, message(content=[{"text": "x"}]), "messages[0].content[0].type"),
        (CHAT, '{"messages":[{"role":"user","content":"\\ud800"}]}', "messages"),
        (PLAIN, '{"prompt": "\\ud800"}', "prompt"),
        (CHAT, '{"messages": [], "logit_bias": {"\\ud800": 1}}', "logit_bias." + 3 * "\ufffd"),
        (CHAT, message(role="tool"), "messages[0].tool_call_id"),
        (CHAT, chat(max_tokens=-1), "max_tokens"),
        (CHAT, chat(max_tokens=0), "max_tokens"),
        (CHAT, chat(max_tokens="5"), "max_tokens"),
        (CHAT, chat(max_tokens=True), "max_tokens"),
        (CHAT, chat(max_completion_tokens=1.5), "max_completion_tokens"),
        (CHAT, chat(temperature=-0.1), "temperature"),
        (CHAT, chat(temperature=2.1), "temperature"),
        (CHAT, chat(temperature=float("nan")), "temperature"),
        (CHAT, chat(top_p=0), "top_p"),
        (CHAT, chat(n=0), "n"),
        (CHAT, chat(n=17), "n"),
        (CHAT, chat(seed=2**63), "seed"),
        (CHAT, chat(stop=[1]), "stop[0]"),
        (CHAT, chat(stop=""), "stop"),
        (CHAT, chat(logit_bias={"foo": 1}), "logit_bias.foo"),
        (CHAT, chat(logit_bias={"9999": 1}), "logit_bias"),
        (CHAT, chat(logit_bias={"5": 101}), "logit_bias.5"),
        (CHAT, chat(top_logprobs=2), "top_logprobs"),
        (CHAT, chat(logprobs=True, top_logprobs=21), "top_logprobs"),
        (CHAT, chat(stream="yes"), "stream"),
        (CHAT, chat(stream_options={"include_usage": True}), "stream_options"),
        (CHAT, chat(min_tokens=5, max_tokens=3), "min_tokens"),
        (CHAT, chat(continue_final_message=True), "messages"),
        (CHAT, chat(chat_template_kwargs={"tokenize": True}), "messages"),
        (PLAIN, "{}", "prompt"),
        (PLAIN, plain(prompt=""), "prompt"),
        (PLAIN, plain(prompt=[]), "prompt"),
        (PLAIN, plain(prompt=[[]]), "prompt"),
        (PLAIN, plain(prompt=[1, "a"]), "prompt[1]"),
        (PLAIN, plain(prompt=[-1]), "prompt[0]"),
        (PLAIN, plain(prompt=[9999]), "prompt"),
        (PLAIN, plain(prompt=["a"] * 100), "prompt"),
        (PLAIN, plain(max_tokens=0), "max_tokens"),
        (PLAIN, plain(logprobs=21), "logprobs"),
        ("/tokenize", "{}", "prompt"),
        ("/detokenize", '{"tokens": ["a"]}', "tokens[0]"),
    ],
)
def test_bad_bodies(shared: LiveServer, path: str, body: str, param: str | None) -> None:
    headers = {"content-type": "application/json"}
    reply = shared.http.post(path, content=body.encode(), headers=headers)
    error = error_of(reply)
    assert reply.status_code == 400
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert shared.engine.num_jobs == 0


SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    | st.sampled_from(["user", "text", "json_object", "auto", 0, 1, -1, 2**64, 0.5])
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "1"]), inner, max_size=3
        )
    ),
    max_leaves=6,
)


@pytest.mark.parametrize(
    ("path", "schema"), [(CHAT, ChatCompletionRequest), (PLAIN, CompletionRequest)]
)
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_no_body_is_a_server_error(
    shared: LiveServer, path: str, schema: type[GenerationRequest], data: st.DataObject
) -> None:
    valid = {"messages": HI, "prompt": "a", "max_tokens": 2}
    names = st.sampled_from([*schema.model_fields, *schema.refused])
    body = valid | data.draw(st.dictionaries(names, VALUES, max_size=2))
    text = json.dumps(body)
    headers = {"content-type": "application/json"}
    reply = shared.http.post(path, content=text, headers=headers)
    assert reply.status_code in (200, 400, 404)
    if reply.status_code != 200:
        error_of(reply)
    assert '"code": "internal"' not in reply.text


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        (CHAT, "tools", [{"type": "function", "function": {"name": "f"}}]),
        (CHAT, "tool_choice", "required"),
        (CHAT, "functions", [{"name": "f"}]),
        (CHAT, "response_format", {"type": "json_object"}),
        (CHAT, "response_format", {"type": "json_schema", "json_schema": {"name": "x"}}),
        (CHAT, "structured_outputs", {"choice": ["a"]}),
        (CHAT, "modalities", ["text", "audio"]),
        (CHAT, "web_search_options", {"x": 1}),
        (CHAT, "best_of", 2),
        (CHAT, "echo", True),
        (CHAT, "chat_template", "{{ x }}"),
        (PLAIN, "suffix", "end"),
        (PLAIN, "best_of", 3),
        (PLAIN, "use_beam_search", True),
        (PLAIN, "guided_json", {"type": "object"}),
    ],
)
def test_what_would_change_the_answer_is_refused(
    shared: LiveServer, path: str, field: str, value: Any
) -> None:
    body = {"messages": HI, "prompt": "a", field: value}
    reply = shared.http.post(path, json=body)
    error = error_of(reply)
    assert (reply.status_code, error["code"]) == (400, "unsupported_parameter")
    assert error["param"] == field


def test_harmless_fields_are_ignored(shared: LiveServer, caplog: pytest.LogCaptureFixture) -> None:
    body = {
        "messages": HI, "user": "me", "store": True, "metadata": {"a": "b"}, "tools": [],
        "service_tier": "auto", "tool_choice": "none", "response_format": {"type": "text"},
        "parallel_tool_calls": True, "best_of": 1, "audio": None, "reasoning_effort": "low",
    }  # fmt: skip
    with caplog.at_level(logging.WARNING, "server"):
        assert shared.http.post(CHAT, json=body).status_code == 200
        assert not caplog.records
        for _ in range(2):
            assert shared.http.post(CHAT, json={**body, "zzz": 1}).status_code == 200
    assert [r.getMessage() for r in caplog.records] == ["ignoring the unknown request field 'zzz'"]


def test_paths_methods_and_media_types(shared: LiveServer) -> None:
    reply = shared.http.get("/v1/embeddings")
    assert (reply.status_code, error_of(reply)["code"]) == (404, "not_found")
    reply = shared.http.get(CHAT)
    assert (reply.status_code, error_of(reply)["code"]) == (405, "method_not_allowed")
    assert reply.headers["allow"] == "POST"
    reply = shared.http.post(CHAT, content=chat(), headers={"content-type": "text/plain"})
    assert reply.status_code == 400
    assert "Content-Type: application/json" in error_of(reply)["message"]


def test_an_unknown_model(shared: LiveServer) -> None:
    for reply in (
        shared.http.post(CHAT, json={"messages": HI, "model": "gpt-9"}),
        shared.http.get("/v1/models/gpt-9"),
    ):
        error = error_of(reply)
        assert (reply.status_code, error["code"]) == (404, "model_not_found")
        assert error["param"] == "model"
        assert "'tiny'" in error["message"]


def test_a_prompt_longer_than_the_context(shared: LiveServer) -> None:
    long = [{"role": "user", "content": "x" * 600}]
    reply = shared.http.post(CHAT, json={"messages": long})
    error = error_of(reply)
    assert (reply.status_code, error["code"]) == (400, "context_length_exceeded")
    assert error["param"] == "messages"
    assert "maximum context length is 512 tokens" in error["message"]
    assert "resulted in 619 tokens" in error["message"]
    reply = shared.http.post(PLAIN, json={"prompt": [1] * 500, "max_tokens": 13})
    assert "513 tokens (500 in the prompt, 13 in the completion)" in error_of(reply)["message"]
    reply = shared.http.post(PLAIN, json={"prompt": [1] * 500, "max_tokens": 12})
    assert reply.status_code == 200


@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_ten_megabyte_body(shared: LiveServer, is_chunked: bool) -> None:
    body = chat(user="x" * 10_000_000).encode()
    pieces = (body[i : i + 65536] for i in range(0, len(body), 65536))
    headers = {"content-type": "application/json"}
    reply = shared.http.post(CHAT, content=pieces if is_chunked else body, headers=headers)
    error = error_of(reply)
    assert (reply.status_code, error["code"]) == (413, "request_too_large")
    assert str(4 << 20) in error["message"]


def test_request_ids(shared: LiveServer) -> None:
    for path in ("/health", "/nope"):
        reply = shared.http.get(path, headers={"x-request-id": "mine-1"})
        assert reply.headers["x-request-id"] == "mine-1"
        reply = shared.http.get(path, headers={"x-request-id": "x" * 200})
        assert reply.headers["x-request-id"].startswith("req_")


def test_api_keys(tokenizer: Any) -> None:
    with serving(FakeEngine(), tokenizer, api_keys=("one", "two")) as live:

        def get(path: str, **headers: str) -> httpx.Response:
            return live.http.get(path, headers=headers)

        for path in ("/health", "/ready"):
            assert get(path).status_code == 200
        for path in ("/v1/models", "/metrics", "/version", "/nope", "/openapi.json", CHAT):
            reply = get(path)
            assert (reply.status_code, error_of(reply)["code"]) == (401, "invalid_api_key")
            assert reply.headers["www-authenticate"].startswith("Bearer")
        for value in ("Bearer three", "Bearer", "Bearer onetwo", "Basic one", "one"):
            assert get("/v1/models", authorization=value).status_code == 401
        for key in ("one", "two"):
            assert get("/v1/models", authorization=f"Bearer {key}").status_code == 200
            assert get("/v1/models", **{"x-api-key": key}).status_code == 200
        with (
            openai.OpenAI(base_url=live.url + "/v1", api_key="no") as client,
            pytest.raises(openai.AuthenticationError),
        ):
            client.models.list()


def test_keys_that_no_header_can_carry_are_refused() -> None:
    with pytest.raises(ValueError, match="--api-key"):
        ServerConfig("tiny", api_keys=("",))


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
        live.engine.gate.set()
        for stream in (first, second):
            assert stream.read().endswith(b"[DONE]\n\n")


def test_the_official_client_waits_for_a_full_queue(live: LiveServer) -> None:
    live.engine.gate.clear()
    body = {"messages": HI, "stream": True, "max_tokens": 3}
    with (
        live.http.stream("POST", CHAT, json=body),
        live.http.stream("POST", CHAT, json=body),
        openai.OpenAI(base_url=live.url + "/v1", api_key="x") as client,
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
    with openai.OpenAI(base_url=live.url + "/v1", api_key="x") as client:
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


def test_a_model_without_chat_template(tiny_model_dir: Path) -> None:
    tokenizer = load_tokenizer(tiny_model_dir)
    tokenizer.chat_template = None
    with serving(FakeEngine(), tokenizer) as live:
        reply = live.http.post(CHAT, json={"messages": HI})
        assert reply.status_code == 400
        assert "use /v1/completions" in error_of(reply)["message"]
        assert live.http.post(PLAIN, json={"prompt": "a"}).status_code == 200
