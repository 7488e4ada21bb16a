"""llama.cpp through `llama-cpp-python`, in a process and, if need be, a Python of its own.

As a program: the first line of standard input is a job, each later one a request; each answer is a
line of JSON. Knows nothing of this project, so that any Python that has the package can run it.
"""

import json
import sys
from time import perf_counter
from typing import Any

WARM_UP_STEPS = 3


def load(job: dict[str, Any]) -> Any:
    from llama_cpp import Llama

    threads = job["threads"]
    return Llama(
        job["gguf"],
        n_ctx=job["context"],
        n_batch=job["context"],
        n_ubatch=job["context"],
        n_threads=threads,
        n_threads_batch=threads,
        verbose=False,
    )


def answer(model: Any, request: dict[str, Any]) -> Any:
    prompt, count = request["prompt"], request.get("new_tokens", 0)
    model.reset()
    start = perf_counter()
    model.eval(prompt)
    prefill_s = perf_counter() - start
    if request["op"] == "prefill":
        return len(prompt) / prefill_s
    if request["op"] == "greedy":
        tokens = []
        for _ in range(count):
            tokens.append(int(model.sample(temp=0.0)))
            model.eval(tokens[-1:])
        return tokens
    # the tokens are given, so that nothing but the model is timed
    for token in prompt[:WARM_UP_STEPS]:
        model.eval([token])
    start = perf_counter()
    for n in range(count):
        model.eval([prompt[n % len(prompt)]])
    return count / (perf_counter() - start)


def main() -> None:
    model = load(json.loads(sys.stdin.readline()))
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(model, json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
