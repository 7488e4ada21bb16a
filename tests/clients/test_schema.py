"""Replies of the real model, byte by byte as they come, against OpenAI's published schemas: the
HTTP client of `server` holds them to those (see checked_http.py)."""

import json
from collections.abc import Sequence
from typing import Any

import pytest

from tests.clients.questions import ASKED, WEATHER, WEATHER_TOOL, Verdict
from tests.clients.running_server import MODEL, RunningServer

CHAT, PLAIN, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
WEATHER_ASKED = [{"role": "user", "content": WEATHER}]
VERDICT = {"name": "verdict", "schema": Verdict.model_json_schema()}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": (CHAT, {"messages": ASKED}),
    "several answers": (CHAT, {"messages": ASKED, "n": 3}),
    "log probabilities": (CHAT, {"messages": ASKED, "logprobs": True, "top_logprobs": 3}),
    "stop": (CHAT, {"messages": ASKED, "stop": [" is"]}),
    "emoji": (CHAT, {"messages": [{"role": "user", "content": "Repeat: 🎉 日本語 👩‍👩‍👧"}]}),
    "json": (
        CHAT,
        {
            "messages": ASKED,
            "response_format": {"type": "json_schema", "json_schema": VERDICT},
            "max_tokens": 60,
        },
    ),
    "tools": (
        CHAT,
        {
            "messages": WEATHER_ASKED,
            "tools": [WEATHER_TOOL],
            "tool_choice": "required",
            "max_tokens": 200,
        },
    ),
    "plain": (PLAIN, {"prompt": "The capital of France is"}),
    "several prompts": (PLAIN, {"prompt": ["One, two,", "A, b,"], "n": 2}),
    "token ids": (PLAIN, {"prompt": [[504, 3575], [282]], "echo": True, "logprobs": 2}),
}


def payloads(stream: str) -> list[Any]:
    """The JSON of each `data:` line; the last line must be [DONE]."""
    data = [line for line in stream.splitlines() if line.startswith("data: ")]
    assert data[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in data[:-1]]


@pytest.mark.parametrize("kind", KINDS)
def test_whole_and_streamed(server: RunningServer, kind: str) -> None:
    path, asked = KINDS[kind]
    body = {"model": MODEL, "temperature": 0, "max_tokens": 24, **asked}
    with server.http() as http:
        reply = http.post(path, json=body)
        assert reply.status_code == 200, reply.text
        streamed = http.post(
            path, json=body | {"stream": True, "stream_options": {"include_usage": True}}
        )
    answer = reply.json()
    *chunks, last = payloads(streamed.text)
    assert last["choices"] == []
    for key in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert last["usage"][key] == answer["usage"][key]
    assert all(chunk["usage"] is None for chunk in chunks)
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    for choice in answer["choices"]:
        parts = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        check_parts(parts, choice)


def check_parts(parts: Sequence[dict[str, Any]], choice: dict[str, Any]) -> None:
    """A choice's parts of a stream say what the whole one says, in the right order."""
    *before, last = [part["finish_reason"] for part in parts]
    assert before == [None] * len(before)
    assert last == choice["finish_reason"]
    if "text" in choice:
        assert "".join(part["text"] for part in parts) == choice["text"]
        return
    deltas, message = [part["delta"] for part in parts], choice["message"]
    assert [delta.get("role") for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
    assert "".join(delta.get("content") or "" for delta in deltas) == (message["content"] or "")
    pieces = [call for delta in deltas for call in delta.get("tool_calls", ())]
    for index, call in enumerate(message.get("tool_calls", ())):
        first, *rest = [piece for piece in pieces if piece["index"] == index]
        assert first["id"]
        assert first["type"] == "function"
        assert first["function"]["name"] == call["function"]["name"]
        assert all("id" not in piece and "name" not in piece["function"] for piece in rest)
        arguments = "".join(p["function"].get("arguments", "") for p in (first, *rest))
        assert arguments == call["function"]["arguments"]


def test_responses(server: RunningServer) -> None:
    body = {"model": MODEL, "input": "hi", "temperature": 0, "max_output_tokens": 12}
    with server.http() as http:
        whole = http.post(RESPONSES, json=body).json()
        streamed = http.post(RESPONSES, json=body | {"stream": True})
    events = payloads(streamed.text)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    *_, last = events
    assert last["response"]["output"][0]["content"] == whole["output"][0]["content"]


def test_models_and_errors(server: RunningServer) -> None:
    with server.http() as http:
        (model,) = http.get("/v1/models").json()["data"]
        assert http.get(f"/v1/models/{MODEL}").json()["id"] == model["id"] == MODEL
        refusals = [
            http.get("/v1/models/gpt-4"),
            http.post(CHAT, json={"messages": []}),
            http.get(CHAT),
            http.get("/v1/models", headers={"authorization": "Bearer no"}),
        ]
    assert [refusal.status_code for refusal in refusals] == [404, 400, 405, 401]
