"""Decode speed with its gate: parity first, then time, then a JSON file with all that matters.

Run from the checkout: `.venv/bin/python benchmarks/bench_decode.py default --name my-machine`.
"""

import argparse
import json
import os
import subprocess
import sys

from results_file import write_result

QUESTIONS = (
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "Explain why the sky is blue.",
)
PARITY_TOKENS = 64
QUIET_LOAD = 0.5  # per logical CPU


def check_parity(model: str) -> None:
    """`exact` must give the greedy tokens of `dense`: a speed of wrong answers is no speed."""
    from model_store import resolve_model
    from runtime import Engine, EngineConfig, SamplingParams
    from server import load_tokenizer
    from server.text import TextCodec

    folder = resolve_model(model)
    codec = TextCodec(load_tokenizer(folder))
    sampling = SamplingParams(temperature=0.0, max_tokens=PARITY_TOKENS)
    answers = {}
    for mode in ("dense", "exact"):
        engine = Engine.from_config(EngineConfig(model_dir=folder, mode=mode, audit_rate=0.0))
        answers[mode] = [
            [
                event.token_id
                for event in engine.generate(
                    codec.encode(
                        codec.render_chat([{"role": "user", "content": question}]),
                        add_special_tokens=False,
                    ),
                    sampling,
                )
            ]
            for question in QUESTIONS
        ]
    if answers["dense"] != answers["exact"]:
        raise SystemExit("exact and dense give different tokens: no speed is reported")
    print(f"parity: exact gives dense's tokens on {len(QUESTIONS)} prompts", file=sys.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="default")
    parser.add_argument("--name", required=True, help="of the result file: results/NAME.json")
    parser.add_argument("--batch", default="1,2,4,8")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-transformers", action="store_true", help="leave generate out")
    args = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    load = os.getloadavg()[0] / (os.cpu_count() or 1)
    if load > QUIET_LOAD:
        print(f"warning: load is {load:.1f} per CPU; numbers will be low", file=sys.stderr)
    check_parity(args.model)
    command = [sys.executable, "-m", "hotneuron", "bench", args.model, "--json"]
    command += ["--batch", args.batch, "--new-tokens", str(args.new_tokens)]
    command += ["--repeats", str(args.repeats)]
    if not args.no_transformers:
        command.append("--transformers")
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        return done.returncode
    write_result(args.name, json.loads(done.stdout))
    return 0


if __name__ == "__main__":
    sys.exit(main())
