"""Decode speed of `transformers`, in a process of its own: as its users would run it.

Our process lets torch's threads sleep between operations, because the kernels have a pool of their
own; inside it the peer would run at little more than half its speed.

As a program: the first line of standard input is a `Job`, each later one a batch size; each answer
is a line with tokens/s.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

WARM_UP_STEPS = 3


@dataclass(frozen=True)
class Job:
    """What to load and what to time."""

    folder: str
    prompt: list[int]
    new_tokens: int
    dtype: str
    device: str
    threads: int


@contextmanager
def transformers_process(job: Job) -> Iterator["TransformersProcess"]:
    """The peer, loaded and ready; it ends with the block."""
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    process = subprocess.Popen(
        [sys.executable, "-m", "hotneuron.peer"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        yield TransformersProcess(process, job)
    finally:
        process.kill()
        process.communicate()


class TransformersProcess:
    """Call it with a batch size for tokens/s."""

    def __init__(self, process: subprocess.Popen[str], job: Job) -> None:
        self._process = process
        self._ask(json.dumps(asdict(job)))

    def __call__(self, batch: int) -> float:
        return float(self._ask(str(batch)))

    def _ask(self, line: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # its end shows in what it answers: nothing
        answer = self._process.stdout.readline().strip()
        if not answer:
            raise RuntimeError("transformers did not run to its end; its error stands above")
        return answer


def decode_speed(model: Any, job: Job, batch: int) -> float:
    """tokens/s of greedy `generate`, without prefill (which gives the first token) and warm-up."""
    import torch

    times: list[float] = []

    def note_time(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        times.append(perf_counter())
        return torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)

    ids = torch.tensor([job.prompt] * batch, device=model.device)
    count = 1 + WARM_UP_STEPS + job.new_tokens
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        min_new_tokens=count,
        max_new_tokens=count,
        do_sample=False,
        stopping_criteria=[note_time],
    )
    if len(times) != count:
        raise RuntimeError(f"generate took {len(times)} steps, not {count}")
    return batch * job.new_tokens / (times[-1] - times[WARM_UP_STEPS])


def main() -> None:
    import torch
    from transformers import AutoModelForCausalLM

    job = Job(**json.loads(sys.stdin.readline()))
    torch.set_num_threads(job.threads)
    model = AutoModelForCausalLM.from_pretrained(job.folder, dtype=getattr(torch, job.dtype))
    model = model.to(job.device).eval()
    print("ready", flush=True)
    for line in sys.stdin:
        print(decode_speed(model, job, int(line)), flush=True)


if __name__ == "__main__":
    main()
