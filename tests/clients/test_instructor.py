"""instructor: answers in the form of a pydantic model, in each of its ways to ask for one."""

from collections.abc import Iterator
from typing import Any

import instructor
import pytest
from openai import OpenAI

from tests.clients.questions import ASKED, Verdict
from tests.clients.running_server import KEY, MODEL

ASK: dict[str, Any] = {
    "model": MODEL,
    "messages": ASKED,
    "temperature": 0,
    "max_tokens": 100,
    "max_retries": 0,
}


@pytest.fixture(scope="module")
def openai_client(url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=url, api_key=KEY, max_retries=0) as client:
        yield client


@pytest.mark.parametrize("mode", [instructor.Mode.JSON_SCHEMA, instructor.Mode.TOOLS])
def test_an_answer_has_the_form(openai_client: OpenAI, mode: instructor.Mode) -> None:
    client = instructor.from_openai(openai_client, mode=mode)
    verdict, reply = client.chat.completions.create_with_completion(**ASK, response_model=Verdict)
    assert isinstance(verdict, Verdict)
    assert reply.usage.completion_tokens > 0


@pytest.mark.parametrize("mode", [instructor.Mode.JSON_SCHEMA, instructor.Mode.TOOLS])
def test_a_form_grows_in_a_stream(openai_client: OpenAI, mode: instructor.Mode) -> None:
    client = instructor.from_openai(openai_client, mode=mode)
    parts = list(client.chat.completions.create_partial(**ASK, response_model=Verdict))
    assert len(parts) > 1
    assert Verdict.model_validate(parts[-1].model_dump())
