"""schemathesis over /openapi.json: `make test-fuzz`.

Against the real engine with a tiny random model, so that thousands of answers take minutes. Every
reply must have a documented status, media type and form, and none may be a server error.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.clients.running_server import KEY, ROOT, serving

LEAST_CASES = 2000
EXAMPLES = os.environ.get("FUZZ_EXAMPLES", "60")  # of each route, beside those for coverage
SEED = os.environ.get("FUZZ_SEED", "1")
CHECKS = (
    "not_a_server_error", "status_code_conformance", "content_type_conformance",
    "response_headers_conformance", "response_schema_conformance",
)  # fmt: skip
HOOKS = "tests.clients.fuzz_hooks"


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made by the project's own Python: its packages are not in the clients' environment."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    code = (
        "import sys; from pathlib import Path; from tests.conftest import write_tiny_model; "
        "write_tiny_model(Path(sys.argv[1]))"
    )
    python = ROOT / ".venv" / "bin" / "python"
    subprocess.run([python, "-c", code, folder], cwd=ROOT, check=True)
    return folder


@pytest.mark.timeout(1200)
def test_no_case_is_a_server_error(tiny_model: Path, tmp_path: Path) -> None:
    report = tmp_path / "events.ndjson"
    with serving("--max-context", "256", model=str(tiny_model)) as server:
        done = subprocess.run(
            [
                Path(sys.executable).with_name("st"),
                "run",
                f"{server.origin}/openapi.json",
                *("--header", f"Authorization: Bearer {KEY}"),
                *("--checks", ",".join(CHECKS)),
                *("--phases", "examples,coverage,fuzzing"),
                *("--max-examples", EXAMPLES, "--max-time", "150", "--seed", SEED),
                *("--report", "ndjson", "--report-ndjson-path", str(report)),
                *("--request-timeout", "60", "--no-shrink", "--workers", "1"),
            ],
            cwd=tmp_path,
            env=os.environ | {"SCHEMATHESIS_HOOKS": HOOKS, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        server.wait_for_gauges(0, 0)
    statuses = statuses_in(report)
    print(done.stdout[-20_000:], statuses, sep="\n")
    assert done.returncode == 0, done.stderr[-2000:]
    assert statuses.total() >= LEAST_CASES
    assert statuses[200] > 100, "next to nothing got past the checks of the bodies"


def statuses_in(report: Path) -> Counter[int]:
    """How often each status came, of all cases that were sent."""
    events = [json.loads(line) for line in report.read_text().splitlines()]
    scenarios = [event["ScenarioFinished"] for event in events if "ScenarioFinished" in event]
    return Counter(
        interaction["response"]["status_code"]
        for scenario in scenarios
        for interaction in scenario["recorder"].get("interactions", {}).values()
    )
