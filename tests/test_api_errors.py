"""Refusals: every one is an OpenAI error object that names what was wrong."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server import ServerConfig, load_tokenizer
from server.chat_schemas import ChatCompletionRequest
from server.schemas import CompletionRequest, GenerationRequest
from tests.checked_http import checked_client
from tests.fake_engine import CHAT, HI, PLAIN, FakeEngine, LiveServer, error_of, serving


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path) -> Any:
    return load_tokenizer(tiny_model_dir)


@pytest.fixture(scope="module")
def shared(tokenizer: Any) -> Iterator[LiveServer]:
    with serving(FakeEngine(), tokenizer) as live:
        yield live


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
        ("/detokenize", '{"tokens": [9999]}', "tokens"),
        ("/detokenize", '{"tokens": [4294967296]}', "tokens[0]"),
        (CHAT, chat(stop_token_ids=[1 << 40]), "stop_token_ids[0]"),
        (CHAT, chat(sparsity={"mode": "sparse"}), "sparsity.mode"),
        (CHAT, chat(sparsity={"recall": 1}), "sparsity.recall"),
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
        (CHAT, "functions", [{"name": "f"}]),
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
        "parallel_tool_calls": True, "best_of": 1, "audio": {"voice": "ash", "format": "wav"},
        "reasoning_effort": "low",
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
            openai.OpenAI(
                base_url=live.url + "/v1", api_key="no", http_client=checked_client()
            ) as client,
            pytest.raises(openai.AuthenticationError),
        ):
            client.models.list()


def test_keys_that_no_header_can_carry_are_refused() -> None:
    with pytest.raises(ValueError, match="--api-key"):
        ServerConfig("tiny", api_keys=("",))


def test_a_model_without_chat_template(tiny_model_dir: Path) -> None:
    tokenizer = load_tokenizer(tiny_model_dir)
    tokenizer.chat_template = None
    with serving(FakeEngine(), tokenizer) as live:
        reply = live.http.post(CHAT, json={"messages": HI})
        assert reply.status_code == 400
        assert "use /v1/completions" in error_of(reply)["message"]
        assert live.http.post(PLAIN, json={"prompt": "a"}).status_code == 200
