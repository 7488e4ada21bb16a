"""The official Python package, strict: a reply that does not match its types raises."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.checked_http import checked_client
from tests.clients.questions import ASKED, QUESTION, WEATHER, WEATHER_TOOL, Verdict
from tests.clients.running_server import KEY, MODEL, RunningServer


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[OpenAI]:
    with OpenAI(
        base_url=url, api_key=KEY, max_retries=0, http_client=checked_client(),
        _strict_response_validation=True,
    ) as client:  # fmt: skip
        yield client


@pytest.fixture(scope="module")
def loose(url: str) -> Iterator[OpenAI]:
    """For plain completions: the strict types lack the null of a first token's log probability,
    and the null `finish_reason` before the end of a stream."""
    with OpenAI(base_url=url, api_key=KEY, max_retries=0, http_client=checked_client()) as client:
        yield client


GREEDY: dict[str, Any] = {"model": MODEL, "messages": ASKED, "temperature": 0, "max_tokens": 24}
WEATHER_ASKED: dict[str, Any] = GREEDY | {
    "messages": [{"role": "user", "content": WEATHER}],
    "max_tokens": 80,
}


def test_models(client: OpenAI) -> None:
    (model,) = client.models.list()
    assert model.id == MODEL
    assert client.models.retrieve(MODEL) == model
    with pytest.raises(openai.NotFoundError) as refusal:
        client.models.retrieve("gpt-4")
    assert refusal.value.code == "model_not_found"


def test_chat_and_usage(client: OpenAI) -> None:
    reply = client.chat.completions.create(**GREEDY)
    (choice,) = reply.choices
    assert "Paris" in (choice.message.content or "")
    assert choice.finish_reason in ("stop", "length")
    assert reply.usage is not None
    assert reply.usage.prompt_tokens > 0
    assert 0 < reply.usage.completion_tokens <= 24
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert reply._request_id


def test_a_stream_says_the_same(client: OpenAI) -> None:
    whole = client.chat.completions.create(**GREEDY)
    with client.chat.completions.stream(**GREEDY, stream_options={"include_usage": True}) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert final.choices[0].message.content == whole.choices[0].message.content
    assert final.choices[0].finish_reason == whole.choices[0].finish_reason
    assert final.usage is not None
    assert whole.usage is not None
    assert final.usage.total_tokens == whole.usage.total_tokens


def test_several_answers_and_seed(client: OpenAI) -> None:
    def ask(seed: int) -> list[str | None]:
        reply = client.chat.completions.create(
            model=MODEL, messages=ASKED, n=3, seed=seed, temperature=1.5, max_tokens=12
        )
        assert [choice.index for choice in reply.choices] == [0, 1, 2]
        return [choice.message.content for choice in reply.choices]

    first = ask(1)
    assert len(set(first)) > 1
    assert ask(1) == first
    assert ask(2) != first


def test_logprobs(client: OpenAI) -> None:
    reply = client.chat.completions.create(**GREEDY, logprobs=True, top_logprobs=3)
    (choice,) = reply.choices
    assert choice.logprobs is not None
    tokens = choice.logprobs.content
    assert tokens
    for token in tokens:
        assert token.logprob <= 0
        assert [top.logprob for top in token.top_logprobs] == sorted(
            (top.logprob for top in token.top_logprobs), reverse=True
        )
        assert token.top_logprobs[0].token == token.token, "greedy takes the likeliest"
    spelled = b"".join(bytes(token.bytes or ()) for token in tokens)
    assert spelled.decode() == choice.message.content


def test_stop(client: OpenAI) -> None:
    reply = client.chat.completions.create(**GREEDY, stop=[" is", "nowhere"])
    (choice,) = reply.choices
    assert choice.message.content == "The capital of France"
    assert choice.finish_reason == "stop"
    with client.chat.completions.stream(**GREEDY, stop="of Fra") as stream:
        text = "".join(event.delta for event in stream if event.type == "content.delta")
    assert text == "The capital "


def test_logit_bias_and_penalties(client: OpenAI, server: RunningServer) -> None:
    with server.http() as http:
        (paris,) = http.post(
            "/tokenize", json={"prompt": " Paris", "add_special_tokens": False}
        ).json()["tokens"]
    reply = client.chat.completions.create(**GREEDY, logit_bias={str(paris): -100})
    assert "Paris" not in (reply.choices[0].message.content or "")
    client.chat.completions.create(**GREEDY, presence_penalty=1.5, frequency_penalty=0.5)


def test_completions(loose: OpenAI, client: OpenAI) -> None:
    greedy = {"model": MODEL, "temperature": 0, "max_tokens": 4}
    prompts = ["The capital of France is", "One, two, three,"]
    both = client.completions.create(prompt=prompts, **greedy)
    alone = [client.completions.create(prompt=prompt, **greedy) for prompt in prompts]
    assert [c.text for c in both.choices] == [one.choices[0].text for one in alone]
    echoed = loose.completions.create(prompt=prompts[0], echo=True, logprobs=1, **greedy)
    (choice,) = echoed.choices
    assert choice.text == prompts[0] + alone[0].choices[0].text
    assert choice.logprobs is not None
    assert choice.logprobs.token_logprobs
    assert choice.logprobs.token_logprobs[0] is None
    assert "".join(choice.logprobs.tokens or ()) == choice.text
    chunks = list(loose.completions.create(prompt=prompts[0], stream=True, **greedy))
    assert "".join(chunk.choices[0].text for chunk in chunks) == alone[0].choices[0].text


def test_errors_are_told_apart(client: OpenAI, url: str) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="gpt-4", messages=ASKED)
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "word " * 20_000}]
        )
    assert long.value.code == "context_length_exceeded"
    assert "maximum context length" in long.value.message
    with pytest.raises(openai.BadRequestError) as hot:
        client.chat.completions.create(model=MODEL, messages=ASKED, temperature=3)
    assert hot.value.param == "temperature"
    with (
        OpenAI(base_url=url, api_key="wrong", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError) as stranger_refused,
    ):
        stranger.models.list()
    assert stranger_refused.value.code == "invalid_api_key"


def test_async_clients_side_by_side_and_one_that_leaves(url: str, server: RunningServer) -> None:
    async def run() -> None:
        async with AsyncOpenAI(base_url=url, api_key=KEY, max_retries=0) as client:
            long = await client.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": "Tell me a long story."}],
                stream=True,
                max_tokens=1000,
                extra_body={"ignore_eos": True},
            )
            await anext(aiter(long))
            replies = await asyncio.gather(
                *(client.chat.completions.create(**GREEDY) for _ in range(4))
            )
            assert len({reply.choices[0].message.content for reply in replies}) == 1
            await long.close()

    asyncio.run(run())
    server.wait_for_gauges(0, 0, seconds=10)


def test_structured_output(client: OpenAI) -> None:
    asked = GREEDY | {"max_tokens": 60}
    parsed = client.chat.completions.parse(**asked, response_format=Verdict)
    verdict = parsed.choices[0].message.parsed
    assert isinstance(verdict, Verdict)
    with client.chat.completions.stream(**asked, response_format=Verdict) as stream:
        partly = [event.parsed for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert final.choices[0].message.parsed == verdict
    assert any(part and "city" in part for part in partly)


def test_json_object_and_schemas_that_cannot_be(client: OpenAI) -> None:
    reply = client.chat.completions.create(
        **GREEDY | {"max_tokens": 60},
        response_format={"type": "json_object"},
    )
    text = reply.choices[0].message.content or ""
    assert text.startswith("{")
    if reply.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(text), dict)
    broken: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "no"}}}
    with pytest.raises(openai.BadRequestError) as refusal:
        client.chat.completions.create(**GREEDY, response_format=broken)
    assert refusal.value.param is not None
    assert refusal.value.param.startswith("response_format")


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "GetWeather"}}]
)
def test_tools(client: OpenAI, choice: Any) -> None:
    asked = WEATHER_ASKED | {"tools": [WEATHER_TOOL], "tool_choice": choice}
    asked["parallel_tool_calls"] = False
    reply = client.chat.completions.create(**asked)
    (call,) = reply.choices[0].message.tool_calls or ()
    assert call.type == "function"
    assert call.function.name == "GetWeather"
    arguments = json.loads(call.function.arguments)
    assert set(arguments) == {"city", "unit"}
    with client.chat.completions.stream(**asked) as stream:
        events = list(stream)
        final = stream.get_final_completion()
    (streamed,) = final.choices[0].message.tool_calls or ()
    assert streamed.function.name == "GetWeather"
    assert streamed.function.arguments == call.function.arguments
    pieces = [e for e in events if e.type == "tool_calls.function.arguments.delta"]
    assert len(pieces) > 1, "the arguments came in one piece"
    done = [e for e in events if e.type == "tool_calls.function.arguments.done"]
    assert [e.parsed_arguments for e in done] == [arguments]


def test_a_tool_s_result_is_answered(client: OpenAI) -> None:
    asked = WEATHER_ASKED | {"tools": [WEATHER_TOOL]}
    first = client.chat.completions.create(
        **asked, tool_choice="required", parallel_tool_calls=False
    )
    message = first.choices[0].message
    (call,) = message.tool_calls or ()
    asked["messages"] = [
        *WEATHER_ASKED["messages"],
        message,
        {"role": "tool", "tool_call_id": call.id, "content": "18 degrees and sunny"},
    ]
    second = client.chat.completions.create(**asked, tool_choice="none")
    assert second.choices[0].message.content
    assert second.choices[0].message.tool_calls is None
    auto = client.chat.completions.create(**asked)  # text or calls, both are fine
    assert auto.choices[0].finish_reason in ("stop", "length", "tool_calls")


def test_responses(client: OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "temperature": 0, "input": QUESTION}
    whole = client.responses.create(**asked, max_output_tokens=24)
    assert "Paris" in whole.output_text
    assert whole.usage is not None
    assert whole.usage.output_tokens <= 24
    with client.responses.stream(**asked, max_output_tokens=24) as stream:
        text = "".join(e.delta for e in stream if e.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert text == whole.output_text == final.output_text
    parsed = client.responses.parse(**asked, text_format=Verdict, max_output_tokens=60)
    assert isinstance(parsed.output_parsed, Verdict)
    function = {"type": "function", **WEATHER_TOOL["function"]}
    called = client.responses.create(
        **asked | {"input": WEATHER_ASKED["messages"]}, tools=[function], tool_choice="required"
    )
    assert called.output[0].type == "function_call"
    with pytest.raises(openai.BadRequestError) as refusal:
        client.responses.create(**asked, previous_response_id="resp_1")
    assert refusal.value.param == "previous_response_id"
