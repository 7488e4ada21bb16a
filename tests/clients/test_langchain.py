"""langchain-openai: ChatOpenAI with nothing but a base URL."""

from typing import Any

import openai
import pytest
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI, OpenAI

from tests.clients.questions import QUESTION, WEATHER, GetWeather, Verdict
from tests.clients.running_server import KEY, MODEL


@pytest.fixture
def settings(url: str) -> dict[str, Any]:
    return {
        "base_url": url,
        "api_key": KEY,
        "model": MODEL,
        "temperature": 0,
        "max_tokens": 24,
        "max_retries": 0,
    }


def test_chat_stream_and_usage(settings: dict[str, Any]) -> None:
    chat = ChatOpenAI(**settings, stream_usage=True)
    whole = chat.invoke(QUESTION)
    assert "Paris" in whole.content
    assert whole.usage_metadata["output_tokens"] > 0
    pieces = list(chat.stream(QUESTION))
    assert len(pieces) > 3
    joined = sum(pieces[1:], pieces[0])
    assert joined.content == whole.content
    for kind in ("input_tokens", "output_tokens", "total_tokens"):
        assert joined.usage_metadata[kind] == whole.usage_metadata[kind]


def test_a_batch_of_chats(settings: dict[str, Any]) -> None:
    chat = ChatOpenAI(**settings)
    answers = chat.batch([QUESTION] * 3)
    assert len({answer.content for answer in answers}) == 1


def test_n_seed_stop_and_logprobs(settings: dict[str, Any]) -> None:
    several = ChatOpenAI(**settings | {"temperature": 1.5}, n=2, seed=3)
    asked = [[HumanMessage(QUESTION)]]
    first, again = (several.generate(asked).generations[0] for _ in range(2))
    assert len(first) == 2
    assert [answer.text for answer in first] == [answer.text for answer in again]
    chat = ChatOpenAI(**settings, logprobs=True, top_logprobs=2)
    answer = chat.invoke(QUESTION, stop=[" Paris"])
    assert "Paris" not in answer.content
    assert answer.response_metadata["finish_reason"] == "stop"
    assert len(answer.response_metadata["logprobs"]["content"][0]["top_logprobs"]) == 2


def test_plain_completion(settings: dict[str, Any]) -> None:
    assert OpenAI(**settings).invoke("The capital of France is")


@pytest.mark.parametrize(
    ("change", "prompt", "error", "code"),
    [
        ({"model": "gpt-4"}, QUESTION, openai.NotFoundError, "model_not_found"),
        ({"api_key": "wrong"}, QUESTION, openai.AuthenticationError, "invalid_api_key"),
        ({}, "word " * 20_000, openai.BadRequestError, "context_length_exceeded"),
    ],
)
def test_errors(
    settings: dict[str, Any], change: dict[str, Any], prompt: str, error: type[Exception], code: str
) -> None:
    with pytest.raises(error) as raised:
        ChatOpenAI(**settings | change).invoke(prompt)
    assert raised.value.code == code


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(settings: dict[str, Any], method: str) -> None:
    chat = ChatOpenAI(**settings | {"max_tokens": 100})
    verdict = chat.with_structured_output(Verdict, method=method).invoke(QUESTION)
    assert isinstance(verdict, Verdict)


def test_tools(settings: dict[str, Any]) -> None:
    chat = ChatOpenAI(**settings | {"max_tokens": 80}).bind_tools(
        [GetWeather], tool_choice="any", parallel_tool_calls=False
    )
    whole = chat.invoke(WEATHER)
    (call,) = whole.tool_calls
    assert call["name"] == "GetWeather"
    GetWeather.model_validate(call["args"])
    pieces = list(chat.stream(WEATHER))
    assert sum(bool(piece.tool_call_chunks) for piece in pieces) > 2
    joined = sum(pieces[1:], pieces[0])
    assert [call["args"] for call in joined.tool_calls] == [call["args"]]
    result = ToolMessage("18 degrees and sunny", tool_call_id=call["id"])
    answered = ChatOpenAI(**settings).invoke([HumanMessage(WEATHER), whole, result])
    assert answered.content


def test_responses(settings: dict[str, Any]) -> None:
    chat = ChatOpenAI(**settings, use_responses_api=True)
    assert "Paris" in chat.invoke(QUESTION).text
