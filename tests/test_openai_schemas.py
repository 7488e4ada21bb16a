"""Every reply and every chunk against OpenAI's schemas, over many kinds of requests.

The clients of all tests hold replies to the schemas while they read (checked_http.py); here are
requests of every kind, and what whole and streamed answers owe to each other.
"""

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import jsonschema
import pytest

from tests import openai_schemas as spec
from tests.checked_http import CheckedTransport
from tests.fake_engine import CHAT, HI, PLAIN, FakeEngine, LiveServer, say, serving

RESPONSES = "/v1/responses"
TOOL = {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}
TOOLS = [{"type": "function", "function": TOOL}]
CALL = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": [1, 2]}}}

CHATS: list[tuple[str, dict[str, Any]]] = [
    ("Paris.", {}),
    ("", {}),
    ("Paris.", {"n": 3, "max_tokens": 3}),
    ("né 🙂", {"logprobs": True, "top_logprobs": 3}),
    ("Paris. stop", {"logprobs": True, "stop": " st"}),
    ("2", {"response_format": JSON_SCHEMA}),
    (f"Hm. {CALL}\n{CALL}", {"tools": TOOLS, "n": 2}),
    (CALL, {"tools": TOOLS, "tool_choice": "required", "logprobs": True}),
    (CALL, {"tools": TOOLS, "max_tokens": 50}),
    ("Paris.", {"sparsity": {"mode": "exact", "audit": True}}),
]
PLAINS: list[tuple[str, dict[str, Any]]] = [
    ("Paris.", {}),
    ("Paris.", {"prompt": ["a", "b"], "n": 2}),
    ("Paris.", {"prompt": [[97], [98]], "echo": True, "logprobs": 2}),
    ("Paris.", {"echo": True, "max_tokens": 0, "logprobs": 0}),
    ("Paris.", {"echo": True}),
    ("12", {"regex": "[0-9]+", "logprobs": 1, "max_tokens": 1}),
]
ASKED: list[tuple[str, dict[str, Any]]] = [
    ("Paris.", {}),
    ("", {"instructions": "Be brief.", "metadata": {"a": "b"}, "temperature": 0.5}),
    ("né 🙂", {"top_logprobs": 2, "include": ["message.output_text.logprobs"]}),
    ("Paris.", {"max_output_tokens": 2}),
    ("Paris.", {"sparsity": {"mode": "exact", "audit": True}}),
    (f"Hm. {CALL}\n{CALL}", {"tools": [{"type": "function", **TOOL}]}),
    ("1", {"text": {"format": {"type": "json_object"}}, "max_output_tokens": 30}),
]


@pytest.fixture(scope="module")
def live(tokenizer: Any) -> Iterator[LiveServer]:
    engine = FakeEngine()
    engine.max_context = 4096
    with serving(engine, tokenizer) as server:
        yield server


def events_of(reply: httpx.Response) -> list[Any]:
    """The JSON of each event; checks the frame around them."""
    assert reply.headers["content-type"].startswith("text/event-stream")
    *blocks, done, empty = reply.text.split("\n\n")
    assert (done, empty) == ("data: [DONE]", "")
    events = []
    for block in blocks:
        *named, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert named == ([f"event: {events[-1]['type']}"] if "type" in events[-1] else [])
    return events


@pytest.mark.parametrize("with_usage", [False, True])
@pytest.mark.parametrize(
    ("path", "said", "fields"),
    [(CHAT, *case) for case in CHATS] + [(PLAIN, *case) for case in PLAINS],
)
def test_completions(
    live: LiveServer, engine: FakeEngine, path: str, said: str, fields: Any, with_usage: bool
) -> None:
    engine.script = say(said)
    body = {"messages": HI, "prompt": "a", "max_tokens": 200, **fields}
    reply = live.http.post(path, json=body).json()
    options = {"stream_options": {"include_usage": True}} if with_usage else {}
    chunks = events_of(live.http.post(path, json={**body, "stream": True, **options}))
    for chunk in chunks:
        assert ("usage" in chunk) == with_usage
    if with_usage:
        *rest, last = chunks
        assert (last["choices"], last["usage"]) == ([], reply["usage"])
        assert all(chunk["usage"] is None and chunk["choices"] for chunk in rest)
    reasons = {c["index"]: c["finish_reason"] for x in chunks for c in x["choices"]}
    assert reasons == {c["index"]: c["finish_reason"] for c in reply["choices"]}
    assert len({(chunk["id"], chunk["created"]) for chunk in chunks}) == 1


@pytest.mark.parametrize(("said", "fields"), ASKED)
def test_responses(live: LiveServer, engine: FakeEngine, said: str, fields: Any) -> None:
    engine.script = say(said)
    body = {"input": "hi", **fields}
    whole = live.http.post(RESPONSES, json=body).json()
    events = events_of(live.http.post(RESPONSES, json={**body, "stream": True}))
    last = events[-1]["response"]
    assert [item["type"] for item in last["output"]] == [item["type"] for item in whole["output"]]
    assert (last["status"], last["usage"]) == (whole["status"], whole["usage"])


@pytest.mark.parametrize("path", [CHAT, PLAIN, RESPONSES])
def test_failures_in_mid_stream(live: LiveServer, engine: FakeEngine, path: str) -> None:
    engine.fail_with = "out of memory"
    asked = {CHAT: {"messages": HI}, PLAIN: {"prompt": "a"}, RESPONSES: {"input": "hi"}}
    events = events_of(live.http.post(path, json={**asked[path], "stream": True}))
    last = events[-1] if path == RESPONSES else events[-1]["error"]
    assert (last["code"], last["message"]) == ("engine_error", "out of memory")


def test_models(live: LiveServer) -> None:
    (model,) = live.http.get("/v1/models").json()["data"]
    assert live.http.get("/v1/models/tiny").json() == model
    assert live.http.get("/v1/models/other").json()["error"]["code"] == "model_not_found"


BREAKS: dict[str, Callable[[Any], Any]] = {
    "a key is missing": lambda reply: reply["choices"][0].pop("logprobs"),
    "an unknown key": lambda reply: reply.update(sparsity={"mode": "exact"}),
    "an unknown key within": lambda reply: reply["usage"].update(cached_tokens=1),
    "null for a key that may be missing": lambda reply: reply.update(usage=None),
    "null for one that may not": lambda reply: reply["choices"][0].update(finish_reason=None),
    "null where a list is": lambda reply: reply["choices"][0]["message"].update(tool_calls=None),
    "another kind": lambda reply: reply.update(created=1.5),
    "another word": lambda reply: reply["choices"][0].update(finish_reason="abort"),
}


@pytest.mark.parametrize("what", BREAKS)
def test_a_reply_that_departs_is_caught(live: LiveServer, engine: FakeEngine, what: str) -> None:
    reply = live.http.post(CHAT, json={"messages": HI}).json()
    spec.check(reply, "ChatCompletion")
    BREAKS[what](reply)
    with pytest.raises(jsonschema.ValidationError):
        reading(CHAT, "application/json", json.dumps(reply))


def reading(path: str, kind: str, body: str, status: int = 200) -> None:
    """As if a server had answered so."""

    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(
            status, headers={"content-type": kind}, stream=httpx.ByteStream(body.encode())
        )

    with httpx.Client(transport=CheckedTransport(httpx.MockTransport(answer))) as http:
        http.get(f"http://test{path}")


def test_an_event_that_departs_is_caught(live: LiveServer, engine: FakeEngine) -> None:
    kind = "text/event-stream; charset=utf-8"
    stream = live.http.post(CHAT, json={"messages": HI, "stream": True}).text
    reading(CHAT, kind, stream)
    for old, new, error in (
        ('"delta"', '"message"', jsonschema.ValidationError),
        ("data: {", "event: chunk\ndata: {", AssertionError),
        ("data: [DONE]\n\n", "data: [DONE]\n", AssertionError),
    ):
        with pytest.raises(error):
            reading(CHAT, kind, stream.replace(old, new))
    with pytest.raises(KeyError):
        reading(RESPONSES, kind, 'event: response.begun\ndata: {"type": "response.begun"}\n\n')


def test_a_refusal_that_departs_is_caught() -> None:
    for body in ('{"detail": "Not Found"}', '{"error": {"message": "no", "type": "x"}}'):
        with pytest.raises(jsonschema.ValidationError):
            reading("/tokenize", "application/json", body, status=404)


def test_the_api_describes_itself(live: LiveServer) -> None:
    """Every route says what it answers, errors included; none has FastAPI's own 422."""
    document = live.http.get("/openapi.json").json()
    asks = {CHAT, PLAIN, RESPONSES, "/tokenize", "/detokenize"}
    for path, methods in document["paths"].items():
        for operation in methods.values():
            statuses = set(operation["responses"])
            assert {"200", "401", "4XX", "500", "503"} <= statuses, path
            assert "422" not in statuses
            assert ({"400", "404", "413"} <= statuses) == (path in asks)
    assert asks < set(document["paths"])
    for name in ("ChatCompletion", "Completion", "ResponseReply", "ErrorReply", "ModelList"):
        assert document["components"]["schemas"][name]["required"]
    assert not [name for name in document["components"]["schemas"] if "__" in name]
