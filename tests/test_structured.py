"""Structured output: the answer has the form that was asked for, whatever the model would say."""

import json
import logging
from collections.abc import Iterator
from random import Random
from typing import Any

import jsonschema
import pytest
from openai import OpenAI
from pydantic import BaseModel

from runtime.token_mask import allowed_tokens
from server.grammar_trial import GrammarTrial, TrialFailed
from server.grammars import MAX_GRAMMAR_BYTES, GrammarError, GrammarSpec, LLGuidance
from tests.fake_engine import (
    CHAT,
    EOS_ID,
    HI,
    PLAIN,
    VOCAB_SIZE,
    FakeEngine,
    LiveServer,
    error_of,
    say,
)

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


def json_schema(schema: Any, **fields: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, **fields}}


@pytest.mark.parametrize(
    ("fields", "said", "answer"),
    [
        ({"response_format": json_schema(PERSON)}, '{"name": "Al", "age": 7}', None),
        ({"response_format": json_schema(PERSON, strict=True)}, '{"name": "Al", "age": 7}', None),
        ({"response_format": {"type": "json_object"}}, '{"a": [1, {"b": null}]}', None),
        ({"response_format": {"type": "json_object", "schema": {"const": 5}}}, "5", None),
        ({"response_format": {"type": "text"}}, "free text", None),
        ({"structured_outputs": {"json": {"enum": ["red", "green"]}}}, '"green"', None),
        ({"structured_outputs": {"json": '{"type": "boolean"}'}}, "true", None),
        ({"structured_outputs": {"json_object": True}}, "{}", None),
        ({"structured_outputs": {"regex": "[0-9]{3}-[a-f]"}}, "123-c", None),
        ({"structured_outputs": {"regex": "[0-9]{3}-[a-f]"}}, "123-z", "123-a"),
        ({"structured_outputs": {"choice": ["yes", "no", 'say "hé"']}}, 'say "hé"', None),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "y, why not?", "yes"),
        ({"structured_outputs": {"grammar": 'root ::= "a" [0-9] "b"'}}, "a7b", None),
        ({"structured_outputs": {"grammar": 'start: "a" /[0-9]/ "b"'}}, "a7b", None),
        ({"regex": "(ab)+"}, "abab", None),
        ({"grammar": 'root ::= "x" | "y"'}, "y", None),
        ({"json_schema": {"type": "array", "items": {"type": "null"}}}, "[null, null]", None),
    ],
)
@pytest.mark.parametrize("path", [CHAT, PLAIN])
def test_forms(
    live: LiveServer, engine: FakeEngine, path: str, fields: Any, said: str, answer: str | None
) -> None:
    engine.script = say(said)
    body = {"messages": HI, "prompt": "a", "max_tokens": 60, **fields}
    (choice,) = live.http.post(path, json=body).json()["choices"]
    text = choice["message"]["content"] if path == CHAT else choice["text"]
    assert text == (said if answer is None else answer)
    assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize(
    "said", ["Sure! Here it is:", "", '{"name": 5}', '{"age": 1, "name": "B"}']
)
def test_a_model_that_will_not_is_held_to_the_schema(
    client: OpenAI, engine: FakeEngine, said: str
) -> None:
    engine.script = say(said)
    reply = client.chat.completions.create(
        model="tiny", messages=HI, max_tokens=100, response_format=json_schema(PERSON)
    )
    person = json.loads(reply.choices[0].message.content)
    assert set(person) == {"name", "age"}
    assert isinstance(person["name"], str)
    assert 0 <= person["age"] <= 99


class Person(BaseModel):
    name: str
    age: int


def test_the_clients_own_parse(client: OpenAI, engine: FakeEngine) -> None:
    engine.script = say('{"name": "Ada", "age": 36}')
    reply = client.chat.completions.parse(model="tiny", messages=HI, response_format=Person)
    assert reply.choices[0].message.parsed == Person(name="Ada", age=36)
    with client.chat.completions.stream(
        model="tiny", messages=HI, response_format=Person
    ) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.parsed == Person(name="Ada", age=36)


@pytest.mark.parametrize("stream", [False, True])
def test_with_n_logprobs_stop_and_length(client: OpenAI, engine: FakeEngine, stream: bool) -> None:
    """Each of the answers has a mask of its own; length leaves JSON that is not over."""

    def script(request: Any) -> list[int]:
        return [*f'{{"name": "{request.sampling.seed}", "age": 5}}'.encode(), EOS_ID]

    def ask(**fields: Any) -> dict[int, tuple[str, str, int]]:
        body = {
            "model": "tiny", "messages": HI, "n": 3, "seed": 7, "logprobs": True,
            "response_format": json_schema(PERSON), "stream": stream, **fields,
        }  # fmt: skip
        reply = client.chat.completions.create(**body)
        texts, reasons = dict.fromkeys(range(3), ""), dict.fromkeys(range(3), "")
        counts = dict.fromkeys(range(3), 0)
        for choice in [c.choices[0] for c in reply] if stream else reply.choices:
            texts[choice.index] += (choice.delta if stream else choice.message).content or ""
            reasons[choice.index] = choice.finish_reason or ""
            counts[choice.index] += len(choice.logprobs.content) if choice.logprobs else 0
        return {i: (texts[i], reasons[i], counts[i]) for i in range(3)}

    engine.script = script
    whole = {i: f'{{"name": "{7 + i}", "age": 5}}' for i in range(3)}
    assert ask() == {i: (text, "stop", len(text)) for i, text in whole.items()}
    assert ask(max_tokens=9) == {i: (text[:9], "length", 9) for i, text in whole.items()}
    cut = {i: (text.partition(",")[0], "stop", 12) for i, text in whole.items()}
    assert ask(stop=",") == cut


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": json_schema({"type": "objct"})}, "response_format"),
        ({"response_format": json_schema({"type": "string", "pattern": "("})}, "response_format"),
        ({"response_format": json_schema({"$ref": "http://x/y"})}, "response_format"),
        ({"response_format": json_schema({"not": {}}, strict=True)}, "response_format"),
        ({"response_format": json_schema({"properties": []})}, "response_format"),
        ({"response_format": json_schema(False)}, "response_format"),
        ({"response_format": json_schema([])}, "response_format.json_schema.schema"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}},
         "response_format.json_schema.name"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a b"}}},
         "response_format.json_schema.name"),
        ({"response_format": "json"}, "response_format"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "(?=a)b"}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "\ud800"}}, "structured_outputs.regex"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"choice": [1]}}, "structured_outputs.choice[0]"),
        ({"structured_outputs": {"grammar": "nonsense"}}, "structured_outputs"),
        ({"structured_outputs": {"grammar": "start: missing"}}, "structured_outputs"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs"),
        ({"structured_outputs": {"structural_tag": {"a": 1}}}, "structured_outputs.structural_tag"),
        ({"structured_outputs": {"regex": "a", "whitespace_pattern": " "}},
         "structured_outputs.whitespace_pattern"),
        ({"regex": ""}, "regex"),
        ({"grammar": 5}, "grammar"),
        ({"regex": "a", "grammar": 'root ::= "x"'}, "grammar"),
        ({"regex": "a", "response_format": {"type": "json_object"}}, "regex"),
        ({"json_schema": 5}, "json_schema"),
        ({"regex": "a" * (MAX_GRAMMAR_BYTES + 1)}, "regex"),
    ],
)  # fmt: skip
def test_forms_that_cannot_be_had(
    live: LiveServer, engine: FakeEngine, fields: Any, param: str
) -> None:
    text = json.dumps({"messages": HI, "max_tokens": 5, **fields})
    headers = {"content-type": "application/json"}
    reply = live.http.post(CHAT, content=text, headers=headers)
    error = error_of(reply)
    assert (reply.status_code, error["type"]) == (400, "invalid_request_error")
    assert error["param"] == param
    assert len(error["message"]) < 500
    assert not engine.requests


def test_a_schema_nested_too_deeply(live: LiveServer) -> None:
    schema = '{"items":' * 500 + "{}" + "}" * 500
    body = f'{{"prompt": "a", "json_schema": {schema}}}'
    headers = {"content-type": "application/json"}
    reply = live.http.post(PLAIN, content=body, headers=headers)
    assert reply.status_code == 400
    assert error_of(reply)["param"] == "json_schema"


def test_keywords_that_cannot_be_enforced_are_dropped_unless_strict(
    client: OpenAI, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.script = say("[1, 1]")
    schema = {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}
    with caplog.at_level(logging.WARNING, "server"):
        reply = client.chat.completions.create(
            model="tiny", messages=HI, response_format=json_schema(schema)
        )
    assert reply.choices[0].message.content == "[1, 1]"
    assert "response_format: not enforced" in caplog.text
    assert "uniqueItems" in caplog.text


@pytest.fixture(scope="module")
def backend(tokenizer: Any) -> Iterator[LLGuidance]:
    backend = LLGuidance(tokenizer.backend_tokenizer.to_str(), [EOS_ID])
    yield backend
    backend.close()


def chain(length: int) -> dict[str, Any]:
    """A schema of definitions, each a list of the next: the compiler recurses through them."""
    links = {f"d{i}": {"items": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(length)}
    return {"$defs": links | {f"d{length}": {}}, "$ref": "#/$defs/d0"}


def test_a_schema_that_crashes_the_compiler_harms_nobody(
    live: LiveServer, engine: FakeEngine
) -> None:
    engine.script = say("[[]]")
    for length, status in ((5000, 400), (2, 200), (5001, 400)):
        reply = live.http.post(PLAIN, json={"prompt": "a", "json_schema": chain(length)})
        assert reply.status_code == status
        if status == 400:
            assert "too deeply nested or too large" in error_of(reply)["message"]


def test_a_grammar_that_never_compiles_is_given_up(tokenizer: Any) -> None:
    trial = GrammarTrial(tokenizer.backend_tokenizer.to_str(), [EOS_ID], seconds=1.0)
    try:
        with pytest.raises(TrialFailed, match="too deeply nested"):
            trial.source("grammar", "start: " + "(" * 100 + '"a"' + ")" * 100, False)
    finally:
        trial.close()


def test_a_mask_keeps_to_its_own_answer(backend: LLGuidance) -> None:
    """Two answers of one compiled grammar do not share a position in it."""
    spec = GrammarSpec("regex", "ab", "regex")
    grammar = backend.compile(spec)
    assert backend.compile(spec) is grammar
    first, second = grammar.mask(), grammar.mask()
    for token in b"ab":
        first.accept(token)
    assert first.is_finished
    assert not second.is_finished
    with pytest.raises(GrammarError):
        second.accept(ord("b"))


def test_a_grammar_that_fails_in_mid_answer(live: LiveServer, engine: FakeEngine) -> None:
    """Some go over a limit only when they are followed: their request ends, no other."""
    engine.script = say("aaaaaaaa")
    too_much = "(a{1000}){1000}"
    forms: list[tuple[dict[str, Any], str]] = [
        ({"regex": too_much}, "regex"),
        ({"structured_outputs": {"regex": too_much}}, "structured_outputs"),
        ({"response_format": json_schema({"type": "string", "pattern": f"^{too_much}$"})},
         "response_format"),
    ]  # fmt: skip
    for form, param in forms:
        if "response_format" in form:
            engine.script = say('"aaaaaaaa')
        body = {"messages": HI, **form}
        reply = live.http.post(CHAT, json=body)
        error = error_of(reply)
        assert (reply.status_code, error["type"]) == (400, "invalid_request_error")
        assert (error["code"], error["param"]) == ("constraint_failed", param)
        assert "simpler" in error["message"]
        text = live.http.post(CHAT, json={**body, "stream": True}).text
        events = [line for line in text.split("\n\n") if line]
        assert json.loads(events[-2].removeprefix("data: "))["error"] == error
        assert events[-1] == "data: [DONE]"
    free = live.http.post(CHAT, json={"messages": HI})
    assert free.json()["choices"][0]["message"]["content"] == '"aaaaaaaa'


def test_a_grammar_that_takes_too_long_to_follow(
    live: LiveServer, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everybody waits for a mask: one that is slow again and again ends its own request."""
    monkeypatch.setattr("server.grammars.SOON_SECONDS", 0.0005)
    monkeypatch.setattr("server.grammars.MAX_LATE_SECONDS", 0.1)
    engine.script = say("a" * 400)
    body = {"messages": HI, "grammar": 'start: e\ne: e e | e e e | "a"\n'}
    reply = live.http.post(CHAT, json=body)
    error = error_of(reply)
    assert (reply.status_code, error["code"]) == (400, "constraint_failed")
    assert "too long to follow" in error["message"]
    fine = live.http.post(CHAT, json={"messages": HI, "regex": "a{300}"})
    assert fine.json()["choices"][0]["message"]["content"] == "a" * 300


SCHEMAS: list[Any] = [
    PERSON,
    {"enum": ["a", 1, None, {"b": [True]}]},
    {"type": "string", "pattern": "^[a-c]{2,4}$"},
    {"type": "string", "format": "date"},
    {"type": "number", "exclusiveMinimum": 1, "maximum": 2.5},
    {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 100},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
    {"type": "array", "prefixItems": [{"const": 1}, {"type": "null"}], "items": False,
     "minItems": 2},
    {"anyOf": [{"type": "null"}, {"type": "integer", "minimum": 5, "maximum": 9}]},
    {"type": "object", "patternProperties": {"^[ab]$": {"type": "boolean"}},
     "additionalProperties": False},
    {"$defs": {"node": {
        "type": "object", "required": ["v"], "additionalProperties": False,
        "properties": {"v": {"type": "null"}, "next": {"$ref": "#/$defs/node"}}}},
     "$ref": "#/$defs/node"},
]  # fmt: skip


@pytest.mark.parametrize("schema", SCHEMAS)
def test_whatever_the_mask_allows_fits_the_schema(backend: LLGuidance, schema: Any) -> None:
    """Random walks through what is allowed, checked by another implementation of JSON Schema."""
    grammar = backend.compile(GrammarSpec("json_schema", json.dumps(schema), "response_format"))
    random = Random(0)
    num_whole = 0
    for _ in range(8):
        mask, ids = grammar.mask(), []
        while len(ids) < 150 and not mask.is_finished and ids[-1:] != [EOS_ID]:
            ids.append(random.choice(allowed_tokens(mask, VOCAB_SIZE).nonzero().flatten().tolist()))
            mask.accept(ids[-1])
        if mask.is_finished or ids[-1:] == [EOS_ID]:
            num_whole += 1
            value = json.loads(bytes(i for i in ids if i != EOS_ID))
            jsonschema.Draft202012Validator(schema).validate(value)
    assert num_whole > 0
