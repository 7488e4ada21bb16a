"""The JavaScript clients: each *.test.mjs here under Node's own test runner."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.clients.running_server import KEY, MODEL

HERE = Path(__file__).parent
NODE = Path(sys.executable).with_name("node")


@pytest.mark.parametrize("script", sorted(path.name for path in HERE.glob("*.test.mjs")))
def test_script(script: str, url: str) -> None:
    environment = os.environ | {
        "HOTNEURON_URL": url,
        "HOTNEURON_KEY": KEY,
        "HOTNEURON_MODEL": MODEL,
    }
    done = subprocess.run(
        [NODE, "--test", "--test-reporter=spec", script],
        cwd=HERE,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
