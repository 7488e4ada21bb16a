"""The server's side of `grammar_process.py`: asks whether a grammar compiles, and waits so long."""

import json
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).with_name("grammar_process.py")
SECONDS = 5.0


class TrialFailed(ValueError):
    """The grammar does not compile, or not in time."""


class GrammarTrial:
    """Owns the process: started when first asked, anew after each that ended. Safe across threads.

    `close` ends it; the next question would start another.
    """

    def __init__(
        self, tokenizer_json: str, eos_token_ids: Sequence[int], seconds: float = SECONDS
    ) -> None:
        self._seconds = seconds
        self._first = {"tokenizer": tokenizer_json, "eos": list(eos_token_ids)}
        self._asking = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def source(self, kind: str, text: str, is_lenient: bool) -> str:
        """The grammar in llguidance's own terms, known to compile. Raises TrialFailed."""
        with self._asking:
            if self._process is None:
                self._process = self._start()
            question = {"kind": kind, "text": text, "is_lenient": is_lenient}
            answer = self._ask(self._process, question)
            if answer is None:
                self._end()
                raise TrialFailed("it is too deeply nested or too large")
        if "error" in answer:
            raise TrialFailed(answer["error"])
        return str(answer["source"])

    def close(self) -> None:
        with self._asking:
            self._end()

    def _start(self) -> "subprocess.Popen[str]":
        command = [sys.executable, "-I", str(SCRIPT)]
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, encoding="utf-8"
        )
        self._write(process, self._first)
        return process

    def _ask(self, process: "subprocess.Popen[str]", question: Any) -> dict[str, str] | None:
        """None if the process died of it, or was ended because it took too long."""
        timer = threading.Timer(self._seconds, process.kill)
        timer.start()
        try:
            self._write(process, question)
            assert process.stdout is not None
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        return json.loads(line) if line else None

    @staticmethod
    def _write(process: "subprocess.Popen[str]", value: Any) -> None:
        assert process.stdin is not None
        process.stdin.write(json.dumps(value) + "\n")
        process.stdin.flush()

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()
