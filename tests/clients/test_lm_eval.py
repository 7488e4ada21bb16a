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

from tests.clients.running_server import KEY, MODEL, ROOT, RunningServer, serving

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


Answer = list[tuple[str, float]]


def decoded(server: RunningServer, mode: str) -> list[Answer]:
    """Tokens and log-probabilities of greedy answers to the task's questions."""
    answers = []
    with server.http() as http:
        for line in (TASK / "items.jsonl").read_text().splitlines():
            body = {
                "model": MODEL,
                "messages": [{"role": "user", "content": json.loads(line)["question"]}],
                "temperature": 0,
                "max_tokens": 24,
                "logprobs": True,
                "sparsity": {"mode": mode},
            }
            (choice,) = http.post("/v1/chat/completions", json=body).json()["choices"]
            tokens = choice["logprobs"]["content"]
            answers.append([(token["token"], token["logprob"]) for token in tokens])
    return answers


def compare(answers: list[Answer], dense: list[Answer]) -> tuple[float, float]:
    """The share of dense's tokens that come before the first other one, and on these the mean
    difference of log-probabilities in nats."""
    gaps: list[float] = []
    for answer, reference in zip(answers, dense, strict=True):
        for (token, logprob), (expected, expected_logprob) in zip(answer, reference, strict=False):
            if token != expected:
                break
            gaps.append(abs(logprob - expected_logprob))
    return len(gaps) / sum(map(len, dense)), statistics.mean(gaps)


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
    with serving("--sparsity", "predicted") as server:
        written = {mode: decoded(server, mode) for mode in MODES}
    rows = []
    for mode, (model, accuracy) in runs.items():
        assert model.asked == dense.asked
        gaps = [abs(a[0] - b[0]) for a, b in zip(model.scores, dense.scores, strict=True)]
        assert max(gaps) < 1e-3, "prompts are read dense in every mode"
        assert accuracy > 0.5, "no better than chance"
        same, difference = compare(written[mode], written["dense"])
        rows.append(
            f"| {mode} | {accuracy:.3f} | {max(gaps):.1e} | {same:.1%} | {difference:.1e} |"
        )
        if mode == "exact":
            assert (same, difference) == (1.0, 0.0)
        if mode == "predicted":
            assert difference > 0, "these tokens were not decoded by the predictors"
    REPORT.write_text(
        "lm-eval through local-completions: 12 questions of three choices, the default model.\n"
        f"Dense through the API and in process differ by at most {worst:.1e} nats. Prompts are\n"
        "read dense in every mode, so the likelihoods of given texts are the same in all of them.\n"
        "The last two columns are of greedy answers of up to 24 tokens to the same questions: how\n"
        "many of dense's tokens come before the first other one, and by how much the log\n"
        "probabilities of these differ.\n\n"
        "| mode | accuracy | likelihoods: difference | decoded: same tokens | difference |\n"
        "|---|---|---|---|---|\n" + "\n".join(rows) + "\n"
    )
