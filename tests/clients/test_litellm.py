"""litellm parses replies and sorts errors by itself."""

from typing import Any

import litellm
import pytest

from tests.clients.questions import ASKED, QUESTION, WEATHER, WEATHER_TOOL, GetWeather, Verdict
from tests.clients.running_server import KEY, MODEL


@pytest.fixture
def arguments(url: str) -> dict[str, Any]:
    return {
        "model": f"openai/{MODEL}",
        "api_base": url,
        "api_key": KEY,
        "messages": ASKED,
        "temperature": 0,
        "max_tokens": 24,
        "max_retries": 0,
    }


def test_chat_stream_and_usage(arguments: dict[str, Any]) -> None:
    whole = litellm.completion(**arguments)
    text = whole.choices[0].message.content
    assert "Paris" in text
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    chunks = list(
        litellm.completion(**arguments, stream=True, stream_options={"include_usage": True})
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
    built = litellm.stream_chunk_builder(chunks, messages=ASKED)
    assert built.choices[0].message.content == text
    assert built.choices[0].finish_reason == whole.choices[0].finish_reason
    assert built.usage.completion_tokens == whole.usage.completion_tokens


def test_n_seed_stop_and_logprobs(arguments: dict[str, Any]) -> None:
    asked = arguments | {"temperature": 1.5, "n": 2, "seed": 5}
    first, again = (litellm.completion(**asked) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert len(texts) == 2
    assert texts == [choice.message.content for choice in again.choices]
    stopped = litellm.completion(**arguments, stop=[" Paris"], logprobs=True, top_logprobs=2)
    (choice,) = stopped.choices
    assert "Paris" not in choice.message.content
    assert choice.finish_reason == "stop"
    assert len(choice.logprobs.content[0].top_logprobs) == 2


def test_plain_completion(arguments: dict[str, Any]) -> None:
    del arguments["messages"]
    model = f"text-completion-openai/{MODEL}"
    reply = litellm.text_completion(
        **arguments | {"model": model, "prompt": "The capital of France is"}
    )
    assert reply.choices[0].text


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"model": "openai/gpt-4"}, litellm.NotFoundError),
        ({"api_key": "wrong"}, litellm.AuthenticationError),
        ({"temperature": 3}, litellm.BadRequestError),
        (
            {"messages": [{"role": "user", "content": "word " * 20_000}]},
            litellm.ContextWindowExceededError,
        ),
    ],
)
def test_errors(arguments: dict[str, Any], change: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error) as raised:
        litellm.completion(**arguments | change)
    assert type(raised.value) is error, "a more general error would hide what happened"


def test_structured_output(arguments: dict[str, Any]) -> None:
    reply = litellm.completion(**arguments | {"max_tokens": 60}, response_format=Verdict)
    Verdict.model_validate_json(reply.choices[0].message.content)


def test_tools(arguments: dict[str, Any]) -> None:
    asked = arguments | {
        "messages": [{"role": "user", "content": WEATHER}],
        "tools": [WEATHER_TOOL],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "max_tokens": 80,
    }
    whole = litellm.completion(**asked)
    (call,) = whole.choices[0].message.tool_calls
    assert call.function.name == "GetWeather"
    GetWeather.model_validate_json(call.function.arguments)
    assert whole.choices[0].finish_reason == "tool_calls"
    chunks = list(litellm.completion(**asked, stream=True))
    built = litellm.stream_chunk_builder(chunks)
    (streamed,) = built.choices[0].message.tool_calls
    assert streamed.function.name == "GetWeather"
    assert streamed.function.arguments == call.function.arguments


def test_responses(arguments: dict[str, Any]) -> None:
    del arguments["messages"], arguments["max_tokens"]
    reply = litellm.responses(**arguments, input=QUESTION, max_output_tokens=24)
    (message,) = reply.output
    assert "Paris" in message.content[0].text
