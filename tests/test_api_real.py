"""The API in front of the real default model: what only a real model and tokenizer can show."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from openai import BadRequestError, OpenAI
from pydantic import BaseModel

from model_store import resolve_model
from runtime import Engine, EngineConfig
from server import load_tokenizer
from tests.checked_http import checked_client
from tests.fake_engine import CHAT, PLAIN, LiveServer, serving

QUESTION = [{"role": "user", "content": "Anna is 31 and lives in Rome. Describe Anna as JSON."}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


class Person(BaseModel):
    name: str
    age: int
    city: str


@pytest.fixture(scope="module")
def live() -> Iterator[LiveServer]:
    folder = resolve_model("default")
    config = EngineConfig(
        model_dir=folder, mode="predicted", model_name="default", max_context=1024, audit_rate=0.0
    )
    engine = Engine.from_config(config)
    engine.start()
    with serving(engine, load_tokenizer(folder), model_name="default") as server:
        yield server


@pytest.fixture
def client(live: LiveServer) -> Iterator[OpenAI]:
    with OpenAI(
        base_url=live.url + "/v1", api_key="x", max_retries=0, http_client=checked_client(),
        _strict_response_validation=True,
    ) as client:  # fmt: skip
        yield client


def ask(client: OpenAI, messages: Any = QUESTION, **fields: Any) -> Any:
    body = {"model": "default", "messages": messages, "temperature": 0, "max_tokens": 80, **fields}
    return client.chat.completions.create(**body)


def test_a_schema_is_filled_from_the_question(client: OpenAI) -> None:
    reply = client.chat.completions.parse(
        model="default", messages=QUESTION, temperature=0, response_format=Person
    )
    assert reply.choices[0].message.parsed == Person(name="Anna", age=31, city="Rome")


def test_a_form_that_goes_over_a_limit_ends_its_own_request(client: OpenAI) -> None:
    beside = {"max_tokens": 20, "stream": True}
    stream = ask(client, **beside)
    with pytest.raises(BadRequestError) as refused:
        ask(client, max_tokens=200, extra_body={"regex": "(a{1000}){1000}"})
    assert (refused.value.code, refused.value.param) == ("constraint_failed", "regex")
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    again = "".join(chunk.choices[0].delta.content or "" for chunk in ask(client, **beside))
    assert text == again != ""


@pytest.mark.parametrize("seed", range(3))
def test_hot_answers_keep_their_form(client: OpenAI, seed: int) -> None:
    """At temperature 2 a model of this size writes nonsense; the form holds all the same."""
    schema = Person.model_json_schema() | {"additionalProperties": False}
    schema["properties"]["name"]["maxLength"] = schema["properties"]["city"]["maxLength"] = 30
    schema["properties"]["age"] |= {"minimum": 0, "maximum": 120}
    reply = ask(
        client, temperature=2, seed=seed, n=2, max_tokens=200,
        response_format={
            "type": "json_schema", "json_schema": {"name": "p", "schema": schema, "strict": True}
        },
    )  # fmt: skip
    for choice in reply.choices:
        assert choice.finish_reason == "stop"
        Person.model_validate_json(choice.message.content)


def test_choice_regex_and_grammar(client: OpenAI) -> None:
    def text(**extra: Any) -> str:
        return str(ask(client, extra_body=extra).choices[0].message.content)

    assert text(structured_outputs={"choice": ["Anna", "Rome"]}) in ("Anna", "Rome")
    assert text(regex="[0-9]{4}-[0-9]{2}-[0-9]{2}")[4::3] == "--"
    assert text(grammar='root ::= "(" [0-9] ("," [0-9]){2} ")"')[::6] == "()"


def test_the_same_answer_streamed_and_whole(client: OpenAI) -> None:
    form = {"type": "json_object"}
    whole = ask(client, response_format=form).choices[0].message.content
    chunks = ask(client, response_format=form, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole


def test_tools(client: OpenAI) -> None:
    question = [{"role": "user", "content": "What is the weather in Paris?"}]
    named = {"type": "function", "function": {"name": "get_weather"}}
    reply = ask(client, question, tools=[WEATHER], tool_choice=named)
    (call,) = reply.choices[0].message.tool_calls
    assert json.loads(call.function.arguments) == {"city": "Paris"}
    assert reply.choices[0].finish_reason == "tool_calls"
    answer = [
        *question,
        reply.choices[0].message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "18 degrees, sunny"},
    ]
    last = ask(client, answer, tools=[WEATHER], tool_choice="none")
    assert last.choices[0].message.content


def test_responses(client: OpenAI) -> None:
    response = client.responses.parse(
        model="default", input=QUESTION[0]["content"], temperature=0, text_format=Person
    )
    assert response.output_parsed == Person(name="Anna", age=31, city="Rome")
    events = list(client.responses.create(
        model="default", input="Hi", temperature=0, max_output_tokens=8, stream=True
    ))  # fmt: skip
    assert events[-1].type == "response.incomplete"
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == events[-1].response.output_text


FUNCTION = WEATHER["function"]
REPLIES: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": (CHAT, {"messages": QUESTION, "n": 2, "logprobs": True, "top_logprobs": 2}),
    "json": (
        CHAT,
        {
            "messages": QUESTION,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "person", "schema": Person.model_json_schema()},
            },
        },
    ),
    "tools": (CHAT, {"messages": QUESTION, "tools": [WEATHER], "tool_choice": "required"}),
    "audited": (CHAT, {"messages": QUESTION, "sparsity": {"audit": True}}),
    "plain": (PLAIN, {"prompt": ["One, two,", "A, b,"], "n": 2, "echo": True, "logprobs": 2}),
    "response": ("/v1/responses", {"input": "Hi", "top_logprobs": 2}),
    "calls": (
        "/v1/responses",
        {
            "input": "Hi",
            "tools": [{"type": "function", **FUNCTION}],
            "tool_choice": "required",
            "sparsity": {"audit": True},
        },
    ),
}


@pytest.mark.parametrize("kind", REPLIES)
def test_every_kind_of_reply_is_as_openai_says(live: LiveServer, kind: str) -> None:
    """Whole and streamed; `live.http` holds both to OpenAI's schemas."""
    path, asked = REPLIES[kind]
    limit = "max_output_tokens" if path == "/v1/responses" else "max_tokens"
    body = {"temperature": 0, limit: 40, **asked}
    assert live.http.post(path, json=body).status_code == 200
    streamed = live.http.post(path, json=body | {"stream": True})
    *_, last, done, _ = streamed.text.split("\n\n")
    assert done == "data: [DONE]"
    event = json.loads(last.partition("data: ")[2])
    assert event.get("error") is None
    assert event.get("type") != "error"


def test_models_and_refusals_are_as_openai_says(live: LiveServer) -> None:
    (model,) = live.http.get("/v1/models").json()["data"]
    assert live.http.get("/v1/models/default").json()["id"] == model["id"] == "default"
    too_long = {"messages": [{"role": "user", "content": "word " * 2000}]}
    for path, body, code in (
        (CHAT, too_long, "context_length_exceeded"),
        (PLAIN, {"prompt": "a", "model": "gpt-4"}, "model_not_found"),
        ("/v1/responses", {"input": []}, "invalid_value"),
    ):
        assert live.http.post(path, json=body).json()["error"]["code"] == code


def test_sparsity_of_a_request(client: OpenAI) -> None:
    fields = {"messages": QUESTION, "max_tokens": 8}
    usage = ask(client, **fields, extra_body={"sparsity": {"mode": "exact", "audit": True}}).usage
    assert usage.sparsity["mode"] == "exact"
    assert usage.sparsity["audited_tokens"] == 7  # the first token comes of the prompt, read dense
    assert 0.5 < usage.sparsity["natural_sparsity"] < 1
    usage = ask(client, **fields, extra_body={"sparsity": {"mode": "dense"}}).usage
    assert (usage.sparsity["mode"], usage.sparsity["recall"]) == ("dense", None)
    assert not hasattr(ask(client, **fields).usage, "sparsity")


def test_log_likelihoods_as_evaluations_ask_for_them(live: LiveServer) -> None:
    """As lm-eval does: [[ids]], echo, logprobs 1, one token. The prompt's values are its own."""
    ids = live.http.post("/tokenize", json={"prompt": "The capital of France is Paris."}).json()
    body = {
        "prompt": [ids["tokens"]], "echo": True, "logprobs": 1, "temperature": 0, "seed": 1234,
        "sparsity": {"mode": "dense"},
    }  # fmt: skip

    def values(max_tokens: int) -> list[float | None]:
        reply = live.http.post("/v1/completions", json={**body, "max_tokens": max_tokens}).json()
        logprobs: list[float | None] = reply["choices"][0]["logprobs"]["token_logprobs"]
        return logprobs[: len(ids["tokens"])]

    first, *rest = values(1)
    assert first is None
    assert values(0)[1:] == rest
    assert all(value is not None and value <= 0 for value in rest)


def test_characters_of_several_tokens(client: OpenAI) -> None:
    """A regular expression makes the model write characters that no token of it holds whole."""
    text = "日本🙂é"
    for stream in (False, True):
        reply = ask(client, extra_body={"regex": text}, stream=stream)
        if stream:
            pieces = [chunk.choices[0].delta.content or "" for chunk in reply]
            assert not any("\ufffd" in piece for piece in pieces)
            assert "".join(pieces) == text
        else:
            assert reply.choices[0].message.content == text
