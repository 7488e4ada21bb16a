"""lm-eval through local-completions: the log-likelihoods that the model has without a server.

Leaves lm-eval.md beside the environment of the clients: what each mode does to them.
"""

import json
import os
import statistics
import subprocess
from pathlib import Path
from typing import Any

import pytest
from lm_eval import simple_evaluate
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.tasks import TaskManager

from tests.clients.running_server import KEY, MODEL, ROOT, serving

TASK = Path(__file__).parent / "lm_eval_task"
REPORT = ROOT / ".cache" / "clients" / "lm-eval.md"
MODES = ("dense", "exact", "predicted")
Scores = list[tuple[float, bool]]


class Recording(LocalCompletionsAPI):  # type: ignore[misc]
    """Keeps the token ids that were asked for, and what came back."""

    def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> Any:
        scores = super()._loglikelihood_tokens(requests, **kwargs)
        self.asked = [(context, continuation) for _, context, continuation in requests]
        self.scores: Scores = scores
        return scores


def evaluate(mode: str) -> tuple[Recording, float]:
    """The recorded requests and the task's accuracy, from a server in this mode."""
    with serving("--sparsity", mode) as server:
        model = Recording(
            base_url=f"{server.url}/completions",
            auth_token=KEY,
            model=MODEL,
            tokenizer_backend="auto",
            num_concurrent=4,
        )
        assert model.tokenizer_backend == "remote", "the server's tokenizer was not found"
        tasks = TaskManager(include_path=str(TASK), include_defaults=False)
        results = simple_evaluate(model, tasks=["common_things"], task_manager=tasks)
    return model, results["results"]["common_things"]["acc,none"]


def in_process(mode: str, asked: Any) -> Scores:
    done = subprocess.run(
        [ROOT / ".venv" / "bin" / "python", Path(__file__).with_name("in_process.py"), mode],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        input=json.dumps(asked),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return [(score, is_greedy) for score, is_greedy in json.loads(done.stdout)]


@pytest.mark.timeout(1200)
def test_log_likelihoods(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(TASK)  # the task names its items from here
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    runs = {mode: evaluate(mode) for mode in MODES}
    dense, _ = runs["dense"]
    assert len(dense.scores) == 36
    alone = in_process("dense", dense.asked)
    worst = max(abs(a[0] - b[0]) for a, b in zip(dense.scores, alone, strict=True))
    assert worst < 1e-3
    rows = []
    for mode, (model, accuracy) in runs.items():
        assert model.asked == dense.asked
        gaps = [abs(a[0] - b[0]) for a, b in zip(model.scores, dense.scores, strict=True)]
        assert max(gaps) < 1e-3, "prompts are read dense in every mode"
        assert accuracy > 0.5, "no better than chance"
        rows.append(f"| {mode} | {accuracy:.3f} | {statistics.mean(gaps):.1e} | {max(gaps):.1e} |")
    REPORT.write_text(
        "lm-eval through local-completions: 12 questions of three choices, the default model.\n"
        f"Dense through the API and in process differ by at most {worst:.1e} nats. Prompts are\n"
        "read dense in every mode, so likelihoods are the same in all of them: predicted mode\n"
        "changes what is written (`hotneuron report --data` measures that).\n\n"
        "| mode | accuracy | mean difference to dense, nats | largest |\n|---|---|---|---|\n"
        + "\n".join(rows)
        + "\n"
    )
