"""`hotneuron serve` as a process of its own, as the clients meet it."""

import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parents[2]
COMMAND = os.environ.get("HOTNEURON", str(ROOT / ".venv" / "bin" / "hotneuron"))
KEY = "key-of-the-client-tests"
MODEL = "default"
START_SECONDS = 300  # the first start downloads and prepares the model


@dataclass(frozen=True)
class RunningServer:
    """Where it listens, and how to look at it without any client library."""

    origin: str
    log: Path
    pid: int

    @property
    def url(self) -> str:
        """What clients call the base URL."""
        return f"{self.origin}/v1"

    def http(self) -> httpx.Client:
        headers = {"authorization": f"Bearer {KEY}"}
        return httpx.Client(base_url=self.origin, headers=headers, timeout=120)

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
        log = Path(folder) / "log"
        words = [COMMAND, "serve", model, "--port", "0", "--api-key", KEY, "--no-measure", *flags]
        with log.open("wb") as stream:
            process = subprocess.Popen(words, stdout=stream, stderr=stream)
        try:
            yield RunningServer(_origin(process, log), log, process.pid)
            process.send_signal(signal.SIGTERM)
            code = process.wait(timeout=60)
            assert code in (0, -signal.SIGTERM), f"ended with {code}:\n{log.read_text()}"
        finally:
            process.kill()
            process.wait()


def _origin(process: subprocess.Popen[bytes], log: Path) -> str:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if found := re.search(r"^API +(http://\S+)/v1$", log.read_text(), re.MULTILINE):
            return found[1]
        assert process.poll() is None, f"the server did not start:\n{log.read_text()}"
        time.sleep(0.1)
    raise TimeoutError(f"the server did not start:\n{log.read_text()}")
