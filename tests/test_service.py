"""Start, signals, drain, crash, logs: the server as those who run it meet it."""

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from hotneuron.listener import HttpServer, bind
from hotneuron.serving import serve_until_stopped
from server import Gateway, ServerConfig, create_app, load_tokenizer
from tests.fake_engine import CHAT, HI, FakeEngine, error_of, say, wait_until
from tests.served import SLOW_SERVE, Served

STREAM = {"messages": HI, "stream": True, "max_tokens": 40, "ignore_eos": True}
SIGTERM = SimpleNamespace(received=signal.SIGTERM)
NO_SIGNAL = SimpleNamespace(received=None)


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path) -> Any:
    return load_tokenizer(tiny_model_dir)


@contextmanager
def behind_gateway(engine: FakeEngine, tokenizer: Any) -> Iterator[tuple[Gateway, httpx.Client]]:
    """The server of `serve`, with the app not open yet."""
    gateway = Gateway()
    with bind("127.0.0.1", 0) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with HttpServer(gateway, listener), httpx.Client(base_url=url, timeout=60) as http:
            yield gateway, http
            engine.stop()


def open_app(gateway: Gateway, engine: FakeEngine, tokenizer: Any) -> None:
    gateway.open(create_app(engine, tokenizer, ServerConfig("tiny")))


def in_background(work: Callable[[], Any]) -> Callable[[], Any]:
    """Starts `work`; the result is a function that waits for its result."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(work()), daemon=True)
    thread.start()

    def wait() -> Any:
        thread.join(60)
        return results[0]

    return wait


def test_while_the_model_loads(tokenizer: Any) -> None:
    engine = FakeEngine()
    with behind_gateway(engine, tokenizer) as (gateway, http):
        gateway.say("loading the weights")
        assert http.get("/health").json() == {"status": "loading"}
        for reply in (http.get("/ready"), http.post(CHAT, json={"messages": HI})):
            error = error_of(reply)
            assert (reply.status_code, error["code"]) == (503, "model_loading")
            assert "loading the weights" in error["message"]
            assert int(reply.headers["retry-after"]) >= 1
        open_app(gateway, engine, tokenizer)
        assert http.get("/ready").status_code == 200
        assert http.post(CHAT, json={"messages": HI}).status_code == 200


def test_no_answer_waits_for_more_to_send(tokenizer: Any) -> None:
    """Nagle's algorithm and late acknowledgements together would cost 40 ms each."""
    with behind_gateway(FakeEngine(), tokenizer) as (_, http):
        seconds = []
        for _ in range(10):
            start = time.perf_counter()
            http.get("/health").raise_for_status()
            seconds.append(time.perf_counter() - start)
    assert min(seconds[1:]) < 0.03


def test_an_open_dashboard_does_not_hold_up_the_end(tokenizer: Any) -> None:
    engine = FakeEngine()
    with behind_gateway(engine, tokenizer) as (gateway, http):
        open_app(gateway, engine, tokenizer)
        with http.stream("GET", "/dashboard/stream") as reply:
            lines = reply.iter_lines()
            assert next(lines) == "event: history"
            gateway.drain()
            assert len(list(lines)) > 1  # the stream ends, and ends whole


def test_draining_lets_answers_end(tokenizer: Any) -> None:
    engine = FakeEngine(say("x" * 200))
    engine.gate.clear()
    with behind_gateway(engine, tokenizer) as (gateway, http):
        open_app(gateway, engine, tokenizer)
        with http.stream("POST", CHAT, json=STREAM) as stream:
            ended = in_background(lambda: serve_until_stopped(engine, gateway, SIGTERM, 60))
            assert wait_until(lambda: http.get("/ready").status_code == 503)
            assert http.get("/health").status_code == 200
            assert http.get("/metrics").status_code == 200
            reply = http.post(CHAT, json={"messages": HI})
            assert (reply.status_code, error_of(reply)["code"]) == (503, "server_shutting_down")
            assert int(reply.headers["retry-after"]) >= 1
            assert engine.num_jobs == 1
            engine.gate.set()
            text = stream.read().decode()
        assert ended() == 0
        assert text.count('"content":"x"') == 40
        assert text.endswith("data: [DONE]\n\n")


def test_the_time_to_drain_is_bounded(tokenizer: Any) -> None:
    engine = FakeEngine(say("x" * 200))
    engine.gate.clear()
    with behind_gateway(engine, tokenizer) as (gateway, http):
        open_app(gateway, engine, tokenizer)
        with http.stream("POST", CHAT, json=STREAM) as stream:
            assert wait_until(lambda: gateway.num_open == 1)
            assert serve_until_stopped(engine, gateway, SIGTERM, 0.2) == 0
            engine.stop()
            assert '"code": "aborted"' in stream.read().decode()
        assert wait_until(lambda: gateway.num_open == 0)


def test_a_dead_engine_ends_the_process(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hotneuron.serving.CRASH_SECONDS", 0.0)
    engine = FakeEngine()
    with behind_gateway(engine, tokenizer) as (gateway, http):
        open_app(gateway, engine, tokenizer)
        engine.die()
        assert serve_until_stopped(engine, gateway, NO_SIGNAL, 60) == 1
        for path in ("/health", "/ready"):
            assert http.get(path).status_code == 503


# --- the process itself ---------------------------------------------------------------------------


@pytest.fixture
def slow_server(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Served]:
    monkeypatch.setenv("HOTNEURON_OFFLINE", "1")
    server = Served(
        tmp_path / "log", tiny_model_dir, "--no-measure", "--log-format", "json",
        "--threads", "1", "--api-key", "hush-hush", command=SLOW_SERVE,
    )  # fmt: skip
    yield server
    server.process.kill()
    server.process.wait(60)


KEY = {"authorization": "Bearer hush-hush", "x-request-id": "of-the-test"}


def test_sigterm_under_load(slow_server: Served) -> None:
    """Started, seen loading, loaded with streams, stopped: everyone gets a whole answer."""
    *loading, ready = slow_server.wait_until_ready()
    assert ready.status_code == 200
    assert {error_of(reply)["code"] for reply in loading} == {"model_loading"}

    def stream() -> str:
        with httpx.stream("POST", slow_server.url + CHAT, json=STREAM, headers=KEY) as reply:
            reply.read()
            return reply.text

    answers = [in_background(stream) for _ in range(4)]
    client = httpx.Client(base_url=slow_server.url, headers=KEY)
    running = "hotneuron_num_requests_running"
    assert wait_until(lambda: _value(client.get("/metrics").text, running) == 4)
    slow_server.process.send_signal(signal.SIGTERM)
    assert wait_until(lambda: client.get("/ready").status_code == 503)
    reply = client.post(CHAT, json={"messages": HI, "max_tokens": 1})
    assert (reply.status_code, error_of(reply)["code"]) == (503, "server_shutting_down")
    client.close()
    for answer in answers:
        text = answer()
        assert '"finish_reason":"length"' in text
        assert text.endswith("data: [DONE]\n\n")
    assert slow_server.process.wait(60) == 0
    log = slow_server.log.read_text()
    assert "hush-hush" not in log
    records = [json.loads(line) for line in log.splitlines()]
    for record in records:
        assert {"time", "level", "logger", "message", "request_id"} <= set(record)
    accesses = [record for record in records if record.get("path") == CHAT]
    assert [record["status"] for record in accesses].count(200) == 4
    assert {record["request_id"] for record in accesses} == {"of-the-test"}
    assert accesses[-1]["client"].startswith("key-")


def test_a_second_signal_ends_it_at_once(slow_server: Served) -> None:
    slow_server.wait_until_ready()
    with httpx.stream("POST", slow_server.url + CHAT, json=STREAM, headers=KEY) as reply:
        chunks = reply.iter_bytes()
        next(chunks)
        slow_server.process.send_signal(signal.SIGTERM)
        assert wait_until(lambda: "SIGTERM" in slow_server.log.read_text())
        start = time.monotonic()
        assert slow_server.stop(signal.SIGTERM) == 128 + signal.SIGTERM
        assert time.monotonic() - start < 1
        with pytest.raises(httpx.RemoteProtocolError):
            list(chunks)


def test_a_signal_while_loading_ends_it_at_once(slow_server: Served) -> None:
    assert wait_until(lambda: "loading" in slow_server.log.read_text(), 60)
    assert slow_server.stop(signal.SIGTERM) == 128 + signal.SIGTERM
    assert "Traceback" not in slow_server.log.read_text()


def _value(text: str, name: str) -> float:
    (line,) = [line for line in text.splitlines() if line.startswith(name + "{")]
    return float(line.rpartition(" ")[2])
