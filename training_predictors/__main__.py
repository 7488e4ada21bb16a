"""The `train-predictors` command: flags -> Plan -> pipeline."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from training_predictors.ranks import parse_bytes

EPILOG = """\
stages: record (run texts through the model), train (one small network per layer), calibrate (its
threshold, on documents kept out of training), report (on documents kept out of both). Interrupt it
at any time; the same command goes on where it stopped.

example: train-predictors ./my-model --data chats.jsonl docs/ --byte-budget 8MB
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="train-predictors",
        usage="train-predictors MODEL [--data PATH ...] [options]",
        description="Train the predictors that tell which neurons of a sparse model will fire.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="`default`, a model folder, a GGUF file or a Hub id")
    add(
        "--data",
        nargs="+",
        type=Path,
        default=[],
        metavar="PATH",
        help="chats or texts: .jsonl (messages or text), .txt, .md files or folders of them "
        "(default: chats that the model writes itself)",
    )
    add(
        "--held-out",
        nargs="+",
        type=Path,
        default=[],
        metavar="PATH",
        help="texts that calibrate and report instead of a fifth of --data",
    )
    add(
        "--held-out-other",
        nargs="+",
        type=Path,
        default=[],
        metavar="PATH",
        help="texts of another kind, which train and calibrate nothing; the report shows what the "
        "predictors are worth on them beside the rest",
    )
    add("--out", type=Path, help="where the sparsity folder goes (default: MODEL/sparsity)")
    add("--work", type=Path, help="recordings and checkpoints (default: in the cache folder)")
    add("--keep-work", action="store_true", help="keep the work folder after success")
    add("--restart", action="store_true", help="throw away what the work folder holds")
    add("--tokens", type=int, default=48_000, help="tokens to record (default: %(default)s)")
    add("--context", type=int, default=1024, help="longest sequence (default: %(default)s)")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--rank", type=int, help="hidden units per layer (default: a fifth of D)")
    size.add_argument(
        "--byte-budget", type=parse_bytes, metavar="BYTES", help="all layers together, e.g. 8MB"
    )
    add(
        "--target-recall",
        type=float,
        default=0.94,
        help="share of active neurons to find, mean over held-out tokens and layers "
        "(default: %(default)s)",
    )
    add(
        "--target-energy-recall",
        type=float,
        default=0.99,
        help="the same, weighted with what a neuron adds to the output (default: %(default)s)",
    )
    add(
        "--compare",
        action="store_true",
        help="also measure the other kinds of predictors on the same tokens (kinds.json)",
    )
    add("--epochs", type=int, default=8, help="passes over the tokens (default: %(default)s)")
    add(
        "--learning-rate",
        type=float,
        default=0.05,
        help="AdamW's, relative to the weights (default: %(default)s)",
    )
    add("--seed", type=int, default=0, help="order, split and batches (default: %(default)s)")
    add("--device", default="cpu", help="where to train, e.g. cuda (default: %(default)s)")
    add("--threads", type=int, help="CPU threads (default: all cores)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    from rich.console import Console

    console = Console()
    try:
        _run(args, console)
    except KeyboardInterrupt:
        console.print("interrupted; the same command goes on from here.", highlight=False)
        return 130
    except ValueError as error:
        print(f"train-predictors: {error}", file=sys.stderr)
        return 1
    return 0


def _run(args: argparse.Namespace, console: object) -> None:
    import torch
    from rich.console import Console

    from model_store import cache_root, resolve_model
    from predictor import fingerprint
    from training_predictors.calibrate import Targets
    from training_predictors.pipeline import Plan, run
    from training_predictors.report import print_table
    from training_predictors.train import TrainSettings

    assert isinstance(console, Console)
    if args.threads:
        torch.set_num_threads(args.threads)
    model_dir = resolve_model(args.model)
    out = args.out or model_dir / "sparsity"
    plan = Plan(
        model_dir=model_dir,
        data=tuple(args.data),
        held_out=tuple(args.held_out),
        held_out_other=tuple(args.held_out_other),
        out=out,
        work=args.work or cache_root() / "train-predictors" / fingerprint(model_dir),
        tokens=args.tokens,
        context=args.context,
        rank=args.rank,
        byte_budget=args.byte_budget,
        targets=Targets(args.target_recall, args.target_energy_recall),
        train=TrainSettings(epochs=args.epochs, learning_rate=args.learning_rate, seed=args.seed),
        seed=args.seed,
        device=args.device,
        keep_work=args.keep_work or args.work is not None,
        restart=args.restart,
        compare=args.compare,
    )
    report = run(plan, console)
    print_table(report, console)
    console.print(f"written: {out}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
