"""`serve --replicas 2`: one answer whoever gives it, one text of metrics, a replica that is killed.

Needs the extra `ray`: `make test-replicas`.
"""

import os
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.fake_engine import PLAIN, error_of, wait_until
from tests.served import Served

pytest.importorskip("ray", reason="Ray Serve is not installed: make test-replicas")

KEY = {"authorization": "Bearer secret"}
BODY = {"prompt": "hello", "max_tokens": 30, "temperature": 0, "ignore_eos": True}
NUM_ASKED = 40
START_SECONDS = 180
REPLICA = "x-hotneuron-replica"


@pytest.fixture(scope="module")
def served(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    log = tmp_path_factory.mktemp("replicas") / "log"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOTNEURON_OFFLINE", "1")
        server = Served(
            log, tiny_model_dir, "--replicas", "2", "--no-measure", "--api-key", "secret",
            "--model-name", "tiny", "--dtype", "float32", "--threads", "1",
        )  # fmt: skip
    # The first replica answers while the second is still being made.
    assert wait_until(lambda: "2 replicas serve" in log.read_text(), START_SECONDS), log.read_text()
    server.wait_until_ready()
    yield server
    server.process.send_signal(signal.SIGTERM)
    try:
        assert server.process.wait(90) == 0, log.read_text()
    finally:
        server.process.kill()


@pytest.fixture
def http(served: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served.url, headers=KEY, timeout=60) as client:
        yield client


def replica_processes(ancestor: int) -> list[int]:
    """Processes of replicas that descend from the command, and so were started by the test."""
    parents, names = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            status = (folder / "status").read_text()
            names[int(folder.name)] = (folder / "cmdline").read_text()
        except OSError:
            continue
        parents[int(folder.name)] = int(re.search(r"PPid:\s+(\d+)", status)[1])  # type: ignore[index]

    def descends(process: int) -> bool:
        while process > 1 and process != ancestor:
            process = parents.get(process, 0)
        return process == ancestor

    return [
        process for process, name in names.items()
        if "ServeReplica:hotneuron" in name and descends(process)
    ]  # fmt: skip


def test_both_answer_alike_and_are_counted_together(http: httpx.Client) -> None:
    with ThreadPoolExecutor(8) as callers:
        answers = list(callers.map(lambda _: http.post(PLAIN, json=BODY), range(NUM_ASKED)))
    assert {reply.json()["choices"][0]["text"] for reply in answers} == {
        answers[0].json()["choices"][0]["text"]
    }
    replicas = Counter(reply.headers[REPLICA] for reply in answers)
    assert len(replicas) == 2
    assert wait_until(lambda: len(generated(http)) == 2)
    time.sleep(2.5)  # each tells its numbers every second
    assert sum(generated(http).values()) == NUM_ASKED * BODY["max_tokens"]
    for _ in range(4):  # whoever answers
        report = http.get("/dashboard/report.json").json()
        assert report["totals"]["generated_tokens"] == NUM_ASKED * BODY["max_tokens"]
        assert report["activity"]["ttft_s"]["count"] == NUM_ASKED
        assert {row["name"] for row in report["replicas"]["rows"]} == set(replicas)
        assert report["replicas"]["up"] == report["replicas"]["configured"] == 2
        assert sum(rate or 0 for rate in report["history"]["generated_per_s"]) > 0
    assert http.get("/ready").json() == {"status": "ok", "replicas_up": 2, "replicas": 2}
    reply = httpx.get(http.base_url.join("/v1/models"))
    assert (reply.status_code, error_of(reply)["code"]) == (401, "invalid_api_key")


def generated(http: httpx.Client) -> dict[str, float]:
    """Tokens by replica, as /metrics has them."""
    pattern = r'^hotneuron_generation_tokens_total\{.*replica="(\w+)".*\} (\S+)$'
    found = re.findall(pattern, metrics(http), flags=re.M)
    return {replica: float(tokens) for replica, tokens in found}


def metrics(http: httpx.Client) -> str:
    return http.get("/metrics").text


def up_gauges(http: httpx.Client) -> list[str]:
    pattern = r'^hotneuron_replica_up\{replica="\w+"\} (\S+)$'
    return re.findall(pattern, metrics(http), flags=re.M)


def states(http: httpx.Client) -> list[str]:
    """Of each replica that is or was, as the report has them."""
    reply = http.get("/dashboard/report.json")
    if reply.status_code >= 500:  # it was asked of the one that was killed
        return []
    return ["up" if row["is_up"] else "down" for row in reply.json()["replicas"]["rows"]]


def test_a_killed_replica_loses_no_request_silently(served: Served, http: httpx.Client) -> None:
    """Each request under way gets its whole answer or can tell that it did not."""
    right = http.post(PLAIN, json=BODY).json()["choices"][0]["text"]
    outcomes: Counter[str] = Counter()
    is_over = threading.Event()

    def ask(stream: bool) -> None:
        while not is_over.is_set():
            outcomes[outcome(served.url, right, stream)] += 1

    callers = [threading.Thread(target=ask, args=(i % 2 == 0,)) for i in range(8)]
    for caller in callers:
        caller.start()
    assert wait_until(lambda: outcomes["answered"] > 20)
    victim = replica_processes(served.process.pid)[0]
    os.kill(victim, signal.SIGKILL)
    before = outcomes["answered"]
    assert wait_until(lambda: "down" in states(http), 30)
    page = "/dashboard/report.html"
    assert wait_until(lambda: ">down, last heard of" in http.get(page).text)
    assert wait_until(lambda: outcomes["answered"] > before + 20, 60)
    assert wait_until(lambda: len(set(replica_processes(served.process.pid)) - {victim}) == 2, 90)
    is_over.set()
    for caller in callers:
        caller.join(60)
    # The new one is up, and the one that is gone is not forgotten. Each hears of the others once a
    # second, so one may know what another does not know yet.
    assert wait_until(lambda: sorted(states(http)) == ["down", "up", "up"], 90), states(http)
    assert wait_until(lambda: sorted(up_gauges(http)) == ["0.0", "1.0", "1.0"])
    assert outcomes["wrong"] == 0
    assert set(outcomes) <= {"answered", "told"}


def outcome(url: str, right: str, stream: bool) -> str:
    """'answered', 'told' that it failed, or 'wrong': an answer that is not whole, but looks so."""
    try:
        reply = httpx.post(url + PLAIN, json=BODY | {"stream": stream}, headers=KEY, timeout=60)
    except httpx.TransportError:
        return "told"
    if reply.status_code != 200:
        return "told" if reply.status_code >= 500 else "wrong"
    if not stream:
        return "answered" if reply.json()["choices"][0]["text"] == right else "wrong"
    if not reply.text.endswith("data: [DONE]\n\n") or '"error"' in reply.text:
        return "told"
    return "answered" if reply.text.count("data: {") >= 2 else "wrong"
