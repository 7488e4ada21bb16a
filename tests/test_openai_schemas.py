"""Every reply and every chunk against the specification, over many kinds of requests."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import pytest

from tests import openai_schemas as spec
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
    (f"Hm. {CALL}\n{CALL}", {"tools": [{"type": "function", **TOOL}]}),
    ("1", {"text": {"format": {"type": "json_object"}}, "max_output_tokens": 30}),
]


@pytest.fixture(scope="module")
def live(tokenizer: Any) -> Iterator[LiveServer]:
    engine = FakeEngine()
    engine.max_context = 4096
    with serving(engine, tokenizer) as server:
        yield server


def check(value: Any, schema: spec.Schema) -> None:
    jsonschema.Draft202012Validator(schema).validate(value)


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
    whole, piece = (spec.CHAT, spec.CHUNK) if path == CHAT else (spec.COMPLETION, spec.PIECE)
    reply = live.http.post(path, json=body).json()
    check(reply, whole)
    options = {"stream_options": {"include_usage": True}} if with_usage else {}
    chunks = events_of(live.http.post(path, json={**body, "stream": True, **options}))
    for chunk in chunks:
        check(chunk, piece)
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
    check(whole, spec.RESPONSE)
    events = events_of(live.http.post(RESPONSES, json={**body, "stream": True}))
    for event in events:
        check(event, spec.event(event["type"]))
    last = events[-1]["response"]
    assert [item["type"] for item in last["output"]] == [item["type"] for item in whole["output"]]
    assert (last["status"], last["usage"]) == (whole["status"], whole["usage"])


@pytest.mark.parametrize("path", [CHAT, PLAIN, RESPONSES])
def test_failures_in_mid_stream(live: LiveServer, engine: FakeEngine, path: str) -> None:
    engine.fail_with = "out of memory"
    asked = {CHAT: {"messages": HI}, PLAIN: {"prompt": "a"}, RESPONSES: {"input": "hi"}}
    events = events_of(live.http.post(path, json={**asked[path], "stream": True}))
    if path == RESPONSES:
        for event in events:
            check(event, spec.event(event["type"]))
    else:
        check(events[-1], spec.ERROR)


def test_models(live: LiveServer) -> None:
    check(live.http.get("/v1/models").json(), spec.MODELS)
    check(live.http.get("/v1/models/tiny").json(), spec.MODEL)
    check(live.http.get("/v1/models/other").json(), spec.ERROR)


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
