"""`hotneuron serve` as a process of its own, as the clients meet it."""

import os
import re
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.checked_http import checked_client
from tests.served import Served

ROOT = Path(__file__).resolve().parents[2]
COMMAND = os.environ.get("HOTNEURON", str(ROOT / ".venv" / "bin" / "hotneuron"))
KEY = "key-of-the-client-tests"
MODEL = "default"


@dataclass(frozen=True)
class RunningServer:
    """Where it listens, and how to look at it without any client library: every reply is held to
    OpenAI's schemas."""

    origin: str

    @property
    def url(self) -> str:
        """What clients call the base URL."""
        return f"{self.origin}/v1"

    def http(self) -> httpx.Client:
        headers = {"authorization": f"Bearer {KEY}"}
        return checked_client(base_url=self.origin, headers=headers, timeout=120)

    def gauges(self) -> tuple[float, float]:
        """Requests that run and that wait, as /metrics has them."""
        with self.http() as http:
            text = http.get("/metrics").text
        running, waiting = (
            re.search(rf"^hotneuron_num_requests_{name}\{{.*\}} (\S+)$", text, re.MULTILINE)
            for name in ("running", "waiting")
        )
        assert running
        assert waiting
        return float(running[1]), float(waiting[1])

    def wait_for_gauges(self, running: float, waiting: float, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while (gauges := self.gauges()) != (running, waiting):
            assert time.monotonic() < end, f"(running, waiting) stays at {gauges}"
            time.sleep(0.02)


@contextmanager
def serving(*flags: str, model: str = MODEL) -> Iterator[RunningServer]:
    """A server on a free port for the time of the block; it must end in order at SIGTERM."""
    with tempfile.TemporaryDirectory() as folder:
        words = (model, "--api-key", KEY, "--no-measure", *flags)
        served = Served(Path(folder) / "log", *words, command=(COMMAND, "serve"))
        try:
            served.wait_until_ready()
            yield RunningServer(served.url)
            assert served.stop(signal.SIGTERM) == 0, served.log.read_text()
        finally:
            served.process.kill()
            served.process.wait()
