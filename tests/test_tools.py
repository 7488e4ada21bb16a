"""Function tools: what the model reads, what it may write, and how calls reach the client."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from openai import OpenAI

from server.chat_schemas import ChatMessage
from server.tool_calls import ToolCallReader, whole_calls
from tests.fake_engine import CHAT, HI, FakeEngine, LiveServer, error_of, say, serving

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 8}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
TOOLS = [WEATHER, CLOCK]
IN_BERN = '<tool_call>{"name": "get_weather", "arguments": {"city": "Bern"}}</tool_call>'
NOW = '<tool_call>{"name": "clock", "arguments": {}}</tool_call>'


@pytest.fixture(scope="module")
def live(tokenizer: Any) -> Iterator[LiveServer]:
    """With room for the description of tools in bytes."""
    engine = FakeEngine()
    engine.max_context = 4096
    with serving(engine, tokenizer) as server:
        yield server


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def ask(client: OpenAI, stream: bool, **fields: Any) -> tuple[str | None, list[Any], str]:
    """(content, calls as (id, name, arguments), finish reason), streamed or not."""
    body = {"model": "tiny", "messages": HI, "tools": TOOLS, "max_tokens": 200, **fields}
    if not stream:
        choice = client.chat.completions.create(**body).choices[0]
        calls = choice.message.tool_calls or []
        found = [(call.id, call.function.name, call.function.arguments) for call in calls]
        return choice.message.content, found, choice.finish_reason
    content, parts, reason = "", {}, ""
    for chunk in client.chat.completions.create(**body, stream=True):
        (choice,) = chunk.choices
        content += choice.delta.content or ""
        reason = choice.finish_reason or reason
        for delta in choice.delta.tool_calls or []:
            is_first = delta.index not in parts
            given = (delta.id, delta.type, delta.function.name)
            assert all(given) if is_first else not any(given)
            part = parts.setdefault(delta.index, [delta.id, delta.function.name, ""])
            part[2] += delta.function.arguments
    return content or None, [tuple(parts[i]) for i in sorted(parts)], reason


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("said", "fields", "content", "calls"),
    [
        ("Hello.", {}, "Hello.", []),
        ("a <tool_box> b", {}, "a <tool_box> b", []),
        ("so <tool_ca", {}, "so <tool_ca", []),
        (IN_BERN, {}, None, [("get_weather", {"city": "Bern"})]),
        (f"Let me see. {IN_BERN}", {}, "Let me see. ", [("get_weather", {"city": "Bern"})]),
        (f"{IN_BERN}\n{NOW}", {}, None, [("get_weather", {"city": "Bern"}), ("clock", {})]),
        (f"{IN_BERN}{NOW}", {"parallel_tool_calls": False}, None,
         [("get_weather", {"city": "Bern"})]),
        (IN_BERN.replace("Bern", 'a\\"}{'), {}, None, [("get_weather", {"city": 'a"}{'})]),
        (NOW, {"tool_choice": "required"}, None, [("clock", {})]),
        (NOW, {"tool_choice": named("clock")}, None, [("clock", {})]),
        (NOW, {"tool_choice": {"type": "allowed_tools", "allowed_tools": {
            "mode": "required", "tools": [named("clock")]}}}, None, [("clock", {})]),
        (IN_BERN, {"tool_choice": "none"}, IN_BERN, []),
        (NOW, {"response_format": {"type": "json_object"}}, None, [("clock", {})]),
        ('{"a": 1}', {"response_format": {"type": "json_object"}}, '{"a": 1}', []),
    ],
)  # fmt: skip
def test_calls(
    client: OpenAI, engine: FakeEngine, stream: bool, said: str, fields: Any, content: Any,
    calls: list[Any],
) -> None:  # fmt: skip
    engine.script = say(said)
    got, found, reason = ask(client, stream, **fields)
    assert got == content
    assert [(name, json.loads(arguments)) for _, name, arguments in found] == calls
    assert reason == ("tool_calls" if calls else "stop")
    assert len({call_id for call_id, _, _ in found}) == len(calls)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", named("get_weather")])
def test_a_model_that_will_not_call_is_made_to(
    client: OpenAI, engine: FakeEngine, stream: bool, choice: Any
) -> None:
    engine.script = say("I would rather not.")
    content, calls, reason = ask(client, stream, tool_choice=choice, max_tokens=400)
    assert content is None
    assert reason in ("tool_calls", "length")
    assert calls[0][1] == ("clock" if choice == "required" else "get_weather")
    if choice != "required":  # one call, and that is the answer's end
        assert set(json.loads(calls[0][2])) == {"city"}
        assert (reason, len(calls)) == ("tool_calls", 1)


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_is_cut(client: OpenAI, engine: FakeEngine, stream: bool) -> None:
    engine.script = say(IN_BERN)
    size = len(IN_BERN.partition("Be")[0])
    content, calls, reason = ask(client, stream, max_tokens=size)
    assert (content, reason) == (None, "length")
    assert calls[0][1:] == ("get_weather", '{"city": "')
    content, calls, reason = ask(client, stream, max_tokens=20)
    assert (content or None, calls, reason) == (None, [], "length")


def test_several_answers_with_logprobs(client: OpenAI, engine: FakeEngine) -> None:
    engine.script = say(f"Hm. {NOW}")
    body = {"model": "tiny", "messages": HI, "tools": TOOLS, "n": 2, "logprobs": True}
    reply = client.chat.completions.create(**body)
    for choice in reply.choices:
        assert choice.message.content == "Hm. "
        assert [call.function.name for call in choice.message.tool_calls] == ["clock"]
        assert len(choice.logprobs.content) == len(f"Hm. {NOW}")
    chunks = client.chat.completions.create(**body, stream=True)
    counts = dict.fromkeys(range(2), 0)
    for chunk in chunks:
        (choice,) = chunk.choices
        counts[choice.index] += len(choice.logprobs.content) if choice.logprobs else 0
    assert counts == dict.fromkeys(range(2), len(f"Hm. {NOW}"))


def test_the_clients_own_stream_helper(client: OpenAI, engine: FakeEngine) -> None:
    engine.script = say(IN_BERN)
    with client.chat.completions.stream(model="tiny", messages=HI, tools=TOOLS) as stream:
        kinds = [event.type for event in stream]
        message = stream.get_final_completion().choices[0].message
    assert "tool_calls.function.arguments.delta" in kinds
    assert kinds[-1] == "tool_calls.function.arguments.done"
    assert message.tool_calls[0].function.arguments == '{"city": "Bern"}'


CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    *HI,
    {"role": "assistant", "content": None, "tool_calls": [
        {"id": "call_1", "type": "function",
         "function": {"name": "get_weather", "arguments": '{"city":"Bern"}'}}]},
    {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
]  # fmt: skip


def test_a_template_without_tools_reads_them_as_text(
    client: OpenAI, engine: FakeEngine, tokenizer: Any
) -> None:
    client.chat.completions.create(model="tiny", messages=CONVERSATION, tools=[CLOCK])
    text = tokenizer.decode(engine.requests[0].prompt_ids)
    system, rest = text.split("<|im_end|>\n", 1)
    assert system.startswith("<|im_start|>system\nBe brief.\n\nYou can call functions.")
    assert system.endswith('\n{"name": "clock"}')
    assert rest == (
        f"<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n{IN_BERN}<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\nrain\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    client.chat.completions.create(model="tiny", messages=HI, tools=[CLOCK], tool_choice="none")
    assert "clock" not in tokenizer.decode(engine.requests[1].prompt_ids)


def test_a_template_with_tools_gets_them(tiny_model_dir: Any) -> None:
    from server import load_tokenizer

    tokenizer = load_tokenizer(tiny_model_dir)
    tokenizer.chat_template = (
        "{% for t in tools %}{{ t.function.name }};{% endfor %}<tool_call>{% for m in messages %}"
        "{{ m.role }}:{{ m.content }}{% for c in m.tool_calls %}{{ c.function.arguments.city }}"
        "{% endfor %}|{% endfor %}"
    )
    with serving(FakeEngine(), tokenizer) as live:
        reply = live.http.post(CHAT, json={"messages": CONVERSATION, "tools": TOOLS})
        assert reply.status_code == 200
        text = tokenizer.decode(live.engine.requests[0].prompt_ids)
    assert text == "get_weather;clock;<tool_call>system:Be brief.|user:hi|assistant:Bern|tool:rain|"


def function(**fields: Any) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": "f", **fields}}]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": "f"}, "tools"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0].type"),
        ({"tools": function(name="")}, "tools[0].function.name"),
        ({"tools": function(name="a b")}, "tools[0].function.name"),
        ({"tools": function(name="x" * 65)}, "tools[0].function.name"),
        ({"tools": function(parameters=[])}, "tools[0].function.parameters"),
        ({"tools": function(parameters={"type": "string"})}, "tools[0].function.parameters"),
        ({"tools": function(parameters={"properties": 5})}, "tools"),
        ({"tools": function(parameters={"not": {}}, strict=True)}, "tools"),
        ({"tools": function() * 2}, "tools"),
        ({"tools": [named(f"f{i}") for i in range(129)]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": named("f")}, "tool_choice"),
        ({"tools": function(), "tool_choice": "must"}, "tool_choice"),
        ({"tools": function(), "tool_choice": named("g")}, "tool_choice"),
        ({"tools": function(), "tool_choice": {"type": "function"}}, "tool_choice.function"),
        ({"tools": function(), "regex": "a"}, "regex"),
        ({"tools": function(), "structured_outputs": {"json": "{"}}, "structured_outputs"),
        ({"tools": function(), "json_schema": {"type": "objct"}}, "json_schema"),
        ({"tools": function(), "json_schema": False}, "json_schema"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]},
         "messages[0].tool_calls[0].function"),
    ],
)  # fmt: skip
def test_bad_tools(live: LiveServer, fields: Any, param: str) -> None:
    reply = live.http.post(CHAT, json={"messages": HI, **fields})
    assert reply.status_code == 400
    assert error_of(reply)["param"] == param


@pytest.mark.parametrize("size", [1, 2, 3, 7, 11, 1000])
def test_calls_are_read_whatever_the_pieces(size: int) -> None:
    reader = ToolCallReader()
    text, calls = "", []
    whole = f"One <b> two.{IN_BERN}\n{NOW}"
    for i in range(0, len(whole), size):
        shown, news = reader.feed(whole[i : i + size])
        text, calls = text + shown, calls + news
    assert text + reader.finish() == "One <b> two."
    assert [(c.name, c.arguments) for c in whole_calls(calls)] == [
        ("get_weather", '{"city": "Bern"}'),
        ("clock", "{}"),
    ]


def test_arguments_that_are_no_json_are_passed_on() -> None:
    call = {"id": "1", "function": {"name": "f", "arguments": "{oops"}}
    message = ChatMessage(role="assistant", tool_calls=[call])
    assert message.tool_calls[0].function.arguments == "{oops"
