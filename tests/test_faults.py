"""What goes wrong while a real engine serves: clients leave, steps fail, the disk is full."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from runtime import Engine, EngineConfig
from server import load_tokenizer
from tests.fake_engine import CHAT, HI, PLAIN, LiveServer, error_of, serving, wait_until

STEP_SECONDS = 0.02
ENDLESS = {"max_tokens": 400, "ignore_eos": True}


@pytest.fixture
def live(tiny_model_dir: Path) -> Iterator[LiveServer]:
    """A real engine of the tiny model, slowed down; one request runs, two may wait."""
    config = EngineConfig(
        model_dir=tiny_model_dir, mode="exact", model_name="tiny", max_batch=1, max_queue=2,
        audit_rate=0.0, dtype="float32", threads=1,
    )  # fmt: skip
    engine = Engine.from_config(config)
    step = engine.step

    def slow_step() -> bool:
        time.sleep(STEP_SECONDS)
        return step()

    engine.step = slow_step  # type: ignore[method-assign]
    engine.start()
    with serving(engine, load_tokenizer(tiny_model_dir)) as live:  # type: ignore[arg-type]
        yield live


def gauge(live: LiveServer, name: str) -> float:
    lines = live.http.get("/metrics").text.splitlines()
    (line,) = [line for line in lines if line.startswith(f"hotneuron_{name}{{")]
    return float(line.rpartition(" ")[2])


def send(live: LiveServer, path: str, body: dict[str, Any]) -> socket.socket:
    payload = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    connection = socket.create_connection(("127.0.0.1", urlsplit(live.url).port or 0))
    connection.sendall(f"{head}Content-Length: {len(payload)}\r\n\r\n".encode() + payload)
    return connection


def assert_all_is_free(live: LiveServer) -> None:
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert gauge(live, name) == 0.0
    assert live.engine.num_in_flight == 0  # type: ignore[attr-defined]


def is_decoding(live: LiveServer) -> bool:
    return gauge(live, "generation_tokens_total") >= 3


def is_reading(live: LiveServer) -> bool:
    return gauge(live, "num_requests_running") == 1


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("reached", [is_decoding, is_reading])
def test_a_client_that_leaves_frees_everything(
    live: LiveServer, stream: bool, reached: Callable[[LiveServer], bool]
) -> None:
    prompt = "hi" if reached is is_decoding else "x" * 500  # two parts, a step each
    limit = 8 if reached is is_reading else 400
    body = {"prompt": prompt, "stream": stream, **ENDLESS, "max_tokens": limit}
    caller = send(live, PLAIN, body)
    assert wait_until(lambda: reached(live))
    caller.close()
    left = time.monotonic()
    assert wait_until(lambda: live.engine.num_in_flight == 0, 5)  # type: ignore[attr-defined]
    assert time.monotonic() - left < 20 * STEP_SECONDS
    assert_all_is_free(live)
    assert live.http.post(CHAT, json={"messages": HI, "max_tokens": 2}).status_code == 200


def test_a_client_that_leaves_the_queue(live: LiveServer) -> None:
    running = send(live, PLAIN, {"prompt": "hi", **ENDLESS})
    assert wait_until(lambda: is_decoding(live))
    waiting = send(live, PLAIN, {"prompt": "hi", "stream": True, **ENDLESS})
    assert wait_until(lambda: gauge(live, "num_requests_waiting") == 1)
    waiting.close()
    assert wait_until(lambda: gauge(live, "num_requests_waiting") == 0, 5)
    assert gauge(live, "num_requests_running") == 1
    running.close()
    assert wait_until(lambda: live.engine.num_in_flight == 0, 5)  # type: ignore[attr-defined]
    assert_all_is_free(live)


def test_the_queue_time_is_measured(live: LiveServer) -> None:
    first = send(live, PLAIN, {"prompt": "hi", **ENDLESS, "max_tokens": 10})
    assert wait_until(lambda: gauge(live, "num_requests_running") == 1)
    live.http.post(PLAIN, json={"prompt": "hi", "max_tokens": 2, "ignore_eos": True})
    first.close()
    text = live.http.get("/metrics").text
    sums = dict(line.rsplit(" ", 1) for line in text.splitlines() if "_sum{" in line)
    phases = {
        phase: float(sums[f'hotneuron_request_{phase}_time_seconds_sum{{model_name="tiny"}}'])
        for phase in ("queue", "prefill", "decode", "inference")
    }
    whole = float(sums['hotneuron_e2e_request_latency_seconds_sum{model_name="tiny"}'])
    assert phases["queue"] > 3 * STEP_SECONDS
    assert phases["queue"] + phases["inference"] == pytest.approx(whole)
    assert phases["prefill"] + phases["decode"] == pytest.approx(phases["inference"])


def test_a_failed_step_is_told_to_everyone(live: LiveServer) -> None:
    """To the one that runs and the one that waits, streamed or not; /ready says no from then on."""
    replies: dict[bool, httpx.Response] = {}

    def ask(stream: bool) -> None:
        body = {"prompt": "hi", "stream": stream, **ENDLESS}
        replies[stream] = httpx.post(live.url + PLAIN, json=body, timeout=60)

    threads = [threading.Thread(target=ask, args=(stream,)) for stream in (True, False)]
    for thread in threads:
        thread.start()
        assert wait_until(lambda: gauge(live, "num_requests_running") == 1)
    assert wait_until(lambda: gauge(live, "num_requests_waiting") == 1)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("injected")

    live.engine.model.decode = fail  # type: ignore[attr-defined]
    for thread in threads:
        thread.join(30)
    *_, error, done = replies[True].text.strip().split("\n\n")
    assert done == "data: [DONE]"
    told = json.loads(error.removeprefix("data: "))["error"]
    assert (told["type"], told["code"]) == ("server_error", "engine_error")
    assert "injected" in told["message"]
    assert replies[False].status_code == 500
    assert error_of(replies[False])["code"] == "engine_error"
    for path in ("/ready", "/health"):
        reply = live.http.get(path)
        assert (reply.status_code, error_of(reply)["code"]) == (503, "engine_dead")
    reply = live.http.post(CHAT, json={"messages": HI})
    assert (reply.status_code, error_of(reply)["code"]) == (503, "engine_dead")
    assert int(reply.headers["retry-after"]) >= 1
    assert gauge(live, "num_requests_waiting") == 0
