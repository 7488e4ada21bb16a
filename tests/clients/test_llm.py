"""The `llm` command, as someone at a shell uses it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.clients.questions import QUESTION, Verdict
from tests.clients.running_server import KEY, MODEL

COMMAND = Path(sys.executable).with_name("llm")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path


def llm(home: Path, *words: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"LLM_USER_PATH": str(home)}
    return subprocess.run(
        [COMMAND, *words],
        env=environment,
        input=text,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def endpoint(
    home: Path, url: str, *words: str, text: str | None = None
) -> subprocess.CompletedProcess[str]:
    return llm(home, "openai", "endpoint", url, "--key", KEY, *words, text=text)


GREEDY = ("-m", MODEL, "-o", "temperature", "0", "-o", "max_tokens", "24")


def test_models(home: Path, url: str) -> None:
    done = endpoint(home, url, "--models")
    assert done.returncode == 0, done.stderr
    assert MODEL in done.stdout


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer(home: Path, url: str, stream: bool) -> None:
    words = () if stream else ("--no-stream",)
    done = endpoint(home, url, *GREEDY, *words, QUESTION)
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout


def test_a_refusal_is_told(home: Path, url: str) -> None:
    done = llm(home, "openai", "endpoint", url, "--key", "wrong", *GREEDY, QUESTION)
    assert done.returncode != 0
    assert "Incorrect API key" in done.stderr
    done = endpoint(home, url, "-m", "gpt-4", QUESTION)
    assert done.returncode != 0
    assert "does not exist" in done.stderr


def test_the_responses_api(home: Path, url: str) -> None:
    done = endpoint(home, url, "--responses", "-m", MODEL, "-o", "temperature", "0", QUESTION)
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout


def test_a_schema(home: Path, url: str) -> None:
    schema = json.dumps(Verdict.model_json_schema())
    done = endpoint(home, url, *GREEDY[:-1], "60", "--schema", schema, QUESTION)
    assert done.returncode == 0, done.stderr
    Verdict.model_validate_json(done.stdout)


def test_a_function_that_is_offered(home: Path, url: str) -> None:
    """The command leaves it to the model whether to call it; both ways must end well."""
    functions = "def weather(city: str) -> str:\n    'The weather of a city.'\n    return 'sunny'\n"
    words = ("--functions", functions, "--chain-limit", "2")
    done = endpoint(home, url, *GREEDY, *words, "What is the weather in Paris?")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
