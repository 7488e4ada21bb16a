"""`hotneuron serve` in a process of its own, for tests of the command and of the service."""

import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import httpx

START_SECONDS = 300  # the default model's first start downloads and prepares it
SERVE = (sys.executable, "-m", "hotneuron", "serve")
# A step of the tiny model takes no time; this one leaves some for what is tested.
SLOW_SERVE = (
    sys.executable,
    "-c",
    "import sys, time; from runtime import Engine; step = Engine.step\n"
    "def slow_step(self):\n    time.sleep(0.03)\n    return step(self)\n"
    "Engine.step = slow_step\n"
    "from hotneuron.cli import main; sys.exit(main(['serve', *sys.argv[1:]]))",
)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


class Served:
    """The process, its URL and the file that has its output."""

    def __init__(self, log: Path, *words: object, command: Sequence[str] = SERVE) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [*command, *map(str, words), "--port", str(self.port)],
                stdout=output,
                stderr=output,
            )

    def wait_until_ready(self) -> list[httpx.Response]:
        """What /ready answered until it said yes."""
        answers: list[httpx.Response] = []
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()
            try:
                answers.append(httpx.get(f"{self.url}/ready", timeout=60))
                if answers[-1].status_code == 200:
                    return answers
            except httpx.TransportError:
                pass
            time.sleep(0.05)
        raise AssertionError(self.log.read_text())

    def stop(self, signal_number: int) -> int:
        self.process.send_signal(signal_number)
        return self.process.wait(60)
