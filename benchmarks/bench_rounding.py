"""What weights in 16, 8 and 4 bits cost: KL to the same model in fp32, while it decodes.

    python benchmarks/bench_rounding.py default --name my-machine

Each answer of the chats is fed token by token behind its question, in `dense` for the dense
original and in `exact` for the sparse model. The reference reads the same text in fp32 by torch.
"""

import argparse
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from results_file import write_result
from torch import Tensor

CHATS = Path(__file__).parent / "data" / "heldout-chats.jsonl"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="default")
    parser.add_argument("--name", required=True, help="of the result file: results/NAME.json")
    parser.add_argument("--chats", type=Path, default=CHATS)
    parser.add_argument("--num-chats", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=40, help="of each answer, at most")
    return parser.parse_args()


def read_answers(folder: Path, args: argparse.Namespace) -> list[tuple[list[int], list[int]]]:
    """(question with the template around it, answer) of each chat, as token ids."""
    from server import load_tokenizer

    tokenizer = load_tokenizer(folder)
    pairs = []
    for line in args.chats.read_text(encoding="utf-8").splitlines()[: args.num_chats]:
        *before, answer = json.loads(line)["messages"]
        text = tokenizer.apply_chat_template(before, add_generation_prompt=True, tokenize=False)
        prompt, ids = (
            tokenizer(part, add_special_tokens=False).input_ids
            for part in (text, answer["content"])
        )
        pairs.append((prompt, ids[: args.tokens]))
    return pairs


@torch.inference_mode()
def decoded(model: Any, mode: Any, prompt: list[int], answer: list[int]) -> Tensor:
    """logits_NV that each token of the answer was drawn from."""
    cache = model.new_cache(len(prompt) + len(answer))
    model.prefill(prompt[:-1], cache)
    fed = [prompt[-1], *answer[:-1]]
    return torch.cat([model.decode([token], [cache], mode) for token in fed])


def compare(expected_NV: Tensor, logits_NV: Tensor) -> tuple[list[float], list[bool]]:
    """KL divergence in nats and whether the greedy token is the same, token by token."""
    expected_NV, logits_NV = expected_NV.float(), logits_NV.float()
    logp_NV, logq_NV = expected_NV.log_softmax(-1), logits_NV.log_softmax(-1)
    kl_N = (logp_NV.exp() * (logp_NV - logq_NV)).sum(-1)
    return kl_N.tolist(), (expected_NV.argmax(-1) == logits_NV.argmax(-1)).tolist()


def measure(folder: Path, mode: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    from runtime.config import WEIGHT_BITS
    from runtime.model import Model

    answers = read_answers(folder, args)
    reference = Model.from_folder(folder, dtype="float32", kernels="torch")
    expected = [reference.forward(p + a)[len(p) - 1 : -1] for p, a in answers]
    del reference
    rows = []
    for weights in ("bf16", "int8", "int4"):
        model = Model.from_folder(folder, kernels="cpu", weight_bits=WEIGHT_BITS[weights])
        kls: list[float] = []
        same: list[bool] = []
        for (prompt, answer), expected_NV in zip(answers, expected, strict=True):
            kl, is_same = compare(expected_NV, decoded(model, mode, prompt, answer))
            kls += kl
            same += is_same
        row = {"mode": mode, "weights": weights, "tokens": len(kls), "kl": statistics.fmean(kls),
               "same_greedy_token": statistics.fmean(same)}  # fmt: skip
        print(f"{mode:6} {weights:5} KL {row['kl']:.4f} nats, the same greedy token "
              f"{row['same_greedy_token']:.1%} of {row['tokens']}")  # fmt: skip
        rows.append(row)
    return rows


def main() -> int:
    args = parse_arguments()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from hotneuron import machine
    from model_store import resolve_model

    rows = measure(resolve_model(args.model, dense=True), "dense", args)
    rows += measure(resolve_model(args.model), "exact", args)
    settings = {"model": args.model, "chats": args.chats.name, "num_chats": args.num_chats}
    result = {**machine.facts(), "settings": settings, "results": rows}
    write_result(args.name, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
