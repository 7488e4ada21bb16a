"""/v1/responses through the official client, streamed and whole."""

import json
from typing import Any

import httpx
import pytest
from openai import OpenAI
from pydantic import BaseModel

from tests.fake_engine import FakeEngine, LiveServer, error_of, say, serving, wait_until

PATH = "/v1/responses"
WEATHER = {
    "type": "function",
    "name": "get_weather",
    "description": "Weather of a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": True,
}
IN_BERN = '<tool_call>{"name": "get_weather", "arguments": {"city": "Bern"}}</tool_call>'


@pytest.fixture(scope="module")
def live(tokenizer: Any) -> Any:
    """With room for the description of tools in bytes."""
    engine = FakeEngine()
    engine.max_context = 4096
    with serving(engine, tokenizer) as server:
        yield server


def test_text(client: OpenAI, engine: FakeEngine, tokenizer: Any) -> None:
    response = client.responses.create(
        model="tiny", input="hi", instructions="Be brief.", max_output_tokens=50,
        metadata={"a": "b"}, temperature=0.5,
    )  # fmt: skip
    assert response.output_text == "Paris."
    assert (response.status, response.object) == ("completed", "response")
    assert (response.instructions, response.metadata) == ("Be brief.", {"a": "b"})
    assert (response.temperature, response.max_output_tokens) == (0.5, 50)
    assert response.incomplete_details is None
    assert response.usage.output_tokens == 7
    request = engine.requests[0]
    assert response.usage.input_tokens == len(request.prompt_ids)
    assert response.usage.input_tokens_details.cached_tokens == len(request.prompt_ids) // 2
    assert request.sampling.max_tokens == 50
    assert tokenizer.decode(request.prompt_ids) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_the_events_of_a_stream(client: OpenAI) -> None:
    events = list(client.responses.create(model="tiny", input="hi", stream=True))
    kinds = [event.type for event in events]
    num_deltas = kinds.count("response.output_text.delta")
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * num_deltas,
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == "Paris."
    first, last = events[0].response, events[-1].response
    assert (first.status, first.output, first.usage) == ("in_progress", [], None)
    assert (last.status, last.output_text, last.id) == ("completed", "Paris.", first.id)
    assert last.usage.output_tokens == 7


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_is_cut(client: OpenAI, stream: bool) -> None:
    reply = client.responses.create(model="tiny", input="hi", max_output_tokens=3, stream=stream)
    events = list(reply) if stream else []
    response = events[-1].response if stream else reply
    assert response.status == "incomplete"
    assert response.incomplete_details.reason == "max_output_tokens"
    assert (response.output_text, response.output[0].status) == ("Par", "incomplete")
    assert [event.type for event in events][-1:] == ["response.incomplete"] * stream


class Person(BaseModel):
    name: str
    age: int


def test_structured_text(client: OpenAI, engine: FakeEngine) -> None:
    engine.script = say('{"name": "Ada", "age": 36}')
    response = client.responses.parse(model="tiny", input="hi", text_format=Person)
    assert response.output_parsed == Person(name="Ada", age=36)
    engine.script = say("I would rather talk.")
    response = client.responses.create(
        model="tiny", input="hi", text={"format": {"type": "json_object"}}, max_output_tokens=9
    )
    assert response.output_text.startswith("{")


@pytest.mark.parametrize("stream", [False, True])
def test_calls(client: OpenAI, engine: FakeEngine, stream: bool) -> None:
    engine.script = say(f"Let me see. {IN_BERN}\n{IN_BERN}")
    reply = client.responses.create(model="tiny", input="hi", tools=[WEATHER], stream=stream)
    events = list(reply) if stream else []
    response = events[-1].response if stream else reply
    message, first, second = response.output
    assert message.content[0].text == "Let me see. "
    assert (first.type, first.name, first.arguments) == (
        "function_call", "get_weather", '{"city": "Bern"}',
    )  # fmt: skip
    assert first.call_id != second.call_id
    assert response.tools[0].name == "get_weather"
    if stream:
        arguments = dict.fromkeys((first.id, second.id), "")
        for event in events:
            if event.type == "response.function_call_arguments.delta":
                arguments[event.item_id] += event.delta
        assert set(arguments.values()) == {'{"city": "Bern"}'}
        kinds = [event.type for event in events]
        assert kinds.count("response.function_call_arguments.done") == 2
        assert kinds.count("response.output_item.done") == 3


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "get_weather"}])
def test_a_call_can_be_demanded(client: OpenAI, engine: FakeEngine, choice: Any) -> None:
    engine.script = say(IN_BERN)
    response = client.responses.create(
        model="tiny", input="hi", tools=[WEATHER], tool_choice=choice, parallel_tool_calls=False
    )
    assert [item.type for item in response.output] == ["function_call"]


def test_a_conversation_comes_back_as_input(
    client: OpenAI, engine: FakeEngine, tokenizer: Any
) -> None:
    engine.script = say(f"Hm.{IN_BERN}")
    first = client.responses.create(model="tiny", input="hi", tools=[WEATHER])
    call = first.output[1]
    client.responses.create(
        model="tiny",
        tools=[WEATHER],
        input=[
            {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
            {"type": "reasoning", "id": "rs_1", "summary": []},
            *[item.model_dump() for item in first.output],
            {"type": "function_call_output", "call_id": call.call_id, "output": "rain"},
        ],
    )
    text = tokenizer.decode(engine.requests[1].prompt_ids)
    assert text.partition("<|im_end|>\n")[2] == (
        f"<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nHm.\n{IN_BERN}<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\nrain\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_logprobs(client: OpenAI) -> None:
    response = client.responses.create(
        model="tiny", input="hi", include=["message.output_text.logprobs"], top_logprobs=2
    )
    logprobs = response.output[0].content[0].logprobs
    assert [entry.token for entry in logprobs] == list("Paris.")
    assert all(len(entry.top_logprobs) == 2 for entry in logprobs)
    events = client.responses.create(
        model="tiny", input="hi", top_logprobs=0, stream=True,
        include=["message.output_text.logprobs"],
    )  # fmt: skip
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert [entry.token for event in deltas for entry in event.logprobs] == list("Paris.")


def test_a_stream_that_fails(live: LiveServer, engine: FakeEngine) -> None:
    engine.fail_with = "out of memory"
    text = live.http.post(PATH, json={"input": "hi", "stream": True}).text
    *events, done = [event for event in text.split("\n\n") if event]
    assert done == "data: [DONE]"
    failed, error = (json.loads(event.partition("data: ")[2]) for event in events[-2:])
    assert (failed["type"], failed["response"]["status"]) == ("response.failed", "failed")
    assert failed["response"]["error"]["code"] == "server_error"
    assert (error["type"], error["code"], error["param"]) == ("error", "engine_error", None)
    reply = live.http.post(PATH, json={"input": "hi"})
    assert (reply.status_code, error_of(reply)["code"]) == (500, "engine_error")


def test_a_form_that_fails_in_mid_answer(live: LiveServer, engine: FakeEngine) -> None:
    """It goes over a limit only when the answer follows it: the client's to change."""
    engine.script = say('"aaaaaaaa')
    schema = {"type": "string", "pattern": "^(a{1000}){1000}$"}
    body = {
        "input": "hi",
        "text": {"format": {"type": "json_schema", "name": "x", "schema": schema}},
    }
    reply = live.http.post(PATH, json=body)
    assert (reply.status_code, error_of(reply)["code"]) == (400, "constraint_failed")
    assert error_of(reply)["param"] == "text.format"
    text = live.http.post(PATH, json={**body, "stream": True}).text
    failed, error = (
        json.loads(event.partition("data: ")[2]) for event in text.split("\n\n")[-4:-2]
    )
    assert failed["response"]["error"]["code"] == "invalid_prompt"
    assert (error["code"], error["param"]) == ("constraint_failed", "text.format")


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"input": None}, "input", "invalid_value"),
        ({"input": []}, "input", "invalid_value"),
        ({"input": 5}, "input", "invalid_value"),
        ({"input": [5]}, "input[0]", "invalid_type"),
        ({"input": [{"role": "system", "content": "x"}]}, "input", "invalid_value"),
        ({"input": [{"role": "king", "content": "x"}]}, "input[0].role", "invalid_value"),
        ({"input": [{"content": "x"}]}, "input[0].role", "missing_required_parameter"),
        ({"input": [{"role": "user"}]}, "input[0].content", "missing_required_parameter"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type", "invalid_value"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
         "input[0].content[0].type", "unsupported_content_type"),
        ({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]},
         "input[0].call_id", "missing_required_parameter"),
        ({"input": "x" * 5000}, "input", "context_length_exceeded"),
        ({"input": "\ud800"}, "input", "invalid_value"),
        ({"max_output_tokens": 0}, "max_output_tokens", "invalid_value"),
        ({"max_output_tokens": 4096}, "input", "context_length_exceeded"),
        ({"temperature": 3}, "temperature", "invalid_value"),
        ({"model": "gpt-9"}, "model", "model_not_found"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "unsupported_parameter"),
        ({"conversation": "conv_1"}, "conversation", "unsupported_parameter"),
        ({"background": True}, "background", "unsupported_parameter"),
        ({"truncation": "auto"}, "truncation", "unsupported_parameter"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "invalid_value"),
        ({"tools": [{**WEATHER, "parameters": {"type": "string"}}]}, "tools[0].parameters",
         "invalid_value"),
        ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema",
         "missing_required_parameter"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "objct"}}}},
         "text.format", "invalid_value"),
        ({"top_logprobs": 21}, "top_logprobs", "invalid_value"),
        ({"sparsity": {"mode": "sparse"}}, "sparsity.mode", "invalid_value"),
    ],
)  # fmt: skip
def test_bad_bodies(live: LiveServer, fields: Any, param: str, code: str) -> None:
    headers = {"content-type": "application/json"}
    body = json.dumps({"input": "hi", **fields})
    reply = live.http.post(PATH, content=body, headers=headers)
    error = error_of(reply)
    assert reply.status_code == (404 if code == "model_not_found" else 400)
    assert (error["param"], error["code"]) == (param, code)


def test_the_clients_own_stream_helper(client: OpenAI, engine: FakeEngine) -> None:
    """It builds the response up from the events, and stumbles over any that is out of place."""
    engine.script = say('{"name": "Ada", "age": 36}')
    with client.responses.stream(model="tiny", input="hi", text_format=Person) as stream:
        kinds = [event.type for event in stream]
        response = stream.get_final_response()
    assert kinds[-1] == "response.completed"
    assert response.output_parsed == Person(name="Ada", age=36)
    engine.script = say(f"Hm.{IN_BERN}")
    with client.responses.stream(model="tiny", input="hi", tools=[WEATHER]) as stream:
        snapshots = [
            event.snapshot
            for event in stream
            if event.type == "response.function_call_arguments.delta"
        ]
        response = stream.get_final_response()
    assert snapshots[-1] == '{"city": "Bern"}'
    assert [item.type for item in response.output] == ["message", "function_call"]
    assert response.output[1].parsed_arguments == {"city": "Bern"}


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves(live: LiveServer, engine: FakeEngine, stream: bool) -> None:
    engine.gate.clear()
    try:
        body = {"input": "hi", "stream": stream}
        with pytest.raises(httpx.TimeoutException):
            live.http.post(PATH, json=body, timeout=0.5)
        assert wait_until(lambda: engine.aborted == [engine.requests[0].id])
    finally:
        engine.gate.set()
