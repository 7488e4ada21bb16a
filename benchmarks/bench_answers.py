"""What the modes answer: ten plain questions side by side, and greedy agreement token by token.

Run from the checkout: `.venv/bin/python benchmarks/bench_answers.py default --name my-machine`.
Exact mode must give dense mode's tokens (the run fails otherwise); predicted mode's agreement is
counted up to the first difference, after which two texts no longer answer the same prefix.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from results_file import write_result

QUESTIONS = (
    "What is the capital of France?",
    "How many days are there in a week?",
    "What color is the sky on a clear day?",
    "Who wrote Romeo and Juliet?",
    "What is water made of?",
    "Name three fruits.",
    "What do bees make?",
    "Which planet do we live on?",
    "What is the opposite of hot?",
    "Why do people sleep?",
)
MORE_PROMPTS = (
    "Explain how rain forms.",
    "Write a short poem about the sea.",
    "Give me a recipe for pancakes.",
    "What is a computer?",
    "Tell me about dogs.",
    "How do I learn a new language?",
    "Describe the city of London.",
    "What is photosynthesis?",
    "Write a friendly email to a colleague.",
    "What are the benefits of exercise?",
)
NEW_TOKENS = 64


class Answerer:
    """One model folder in one mode, greedy."""

    def __init__(self, folder: Path, mode: Any) -> None:
        from runtime import Engine, EngineConfig
        from server import load_tokenizer
        from server.text import TextCodec

        self.codec = TextCodec(load_tokenizer(folder))
        self.engine = Engine.from_config(
            EngineConfig(model_dir=folder, mode=mode, audit_rate=0.0, max_context=1024)
        )

    def ids(self, question: str, new_tokens: int) -> list[int]:
        from runtime import SamplingParams

        prompt = self.codec.render_chat([{"role": "user", "content": question}])
        events = self.engine.generate(
            self.codec.encode(prompt, add_special_tokens=False),
            SamplingParams(temperature=0.0, max_tokens=new_tokens),
        )
        return [event.token_id for event in events if event.token_id is not None]

    def text(self, question: str, new_tokens: int) -> str:
        return self.codec.decode(self.ids(question, new_tokens)).strip()


def agreement(mine: list[int], reference: list[int]) -> int:
    """Tokens before the first difference."""
    same = 0
    for a, b in zip(mine, reference, strict=False):
        if a != b:
            break
        same += 1
    return same


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="default")
    parser.add_argument("--name", required=True, help="of the result file: results/NAME.json")
    args = parser.parse_args()
    from model_store import resolve_model

    folder, original = resolve_model(args.model), resolve_model(args.model, dense=True)
    dense_model = Answerer(original, "dense")
    modes = {mode: Answerer(folder, mode) for mode in ("dense", "exact", "predicted")}

    side_by_side = []
    for question in QUESTIONS:
        row = {
            "question": question,
            "dense model": dense_model.text(question, 48),
            "sparse model, predicted": modes["predicted"].text(question, 48),
        }
        side_by_side.append(row)
        print(*(f"{key}: {value}" for key, value in row.items()), sep="\n", end="\n\n")

    tokens = exact_equal = predicted_prefix = predicted_same_text = 0
    prompts = QUESTIONS + MORE_PROMPTS
    for question in prompts:
        dense = modes["dense"].ids(question, NEW_TOKENS)
        exact = modes["exact"].ids(question, NEW_TOKENS)
        predicted = modes["predicted"].ids(question, NEW_TOKENS)
        tokens += len(dense)
        exact_equal += exact == dense
        predicted_prefix += agreement(predicted, dense)
        predicted_same_text += predicted == dense
    greedy = {
        "prompts": len(prompts),
        "tokens": tokens,
        "exact_equal_prompts": exact_equal,
        "predicted_equal_prompts": predicted_same_text,
        "predicted_tokens_before_first_difference": predicted_prefix,
    }
    print(json.dumps(greedy, indent=2))
    result = {"model": args.model, "side_by_side": side_by_side, "greedy": greedy}
    write_result(args.name, result)
    return 0 if exact_equal == len(prompts) else 1


if __name__ == "__main__":
    sys.exit(main())
