"""The `train-predictors` command: flags -> Plan -> pipeline."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from training_predictors.ranks import KINDS, parse_bytes

EPILOG = """\
stages: record (run texts through the model), train (one small network per layer; another --kind
needs no training), calibrate (its threshold, on documents kept out of training), report (on
documents kept out of both). Interrupt it at any time; the same command goes on where it stopped.

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
        "--from-audit",
        type=Path,
        metavar="FOLDER",
        help="improve the stored predictors on what `hotneuron serve --keep-audit` kept, instead "
        "of training anew",
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
    add(
        "--kind",
        choices=KINDS,
        default="mlp",
        help="mlp is trained, mlp-int4 is the same in half the bytes; the others are made of the "
        "gate: svd of its largest directions, gate-int8 and gate-int4 as a copy in few bits, sign "
        "of its signs (default: %(default)s)",
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--rank",
        type=int,
        help="hidden units per layer of mlp, mlp-int4 and svd (default: a fifth of D)",
    )
    size.add_argument(
        "--byte-budget", type=parse_bytes, metavar="BYTES", help="all layers together, e.g. 8MB"
    )
    add(
        "--target-recall",
        type=float,
        help="share of active neurons to find, mean over held-out tokens and layers "
        "(default: 0.94, with --from-audit what each layer reached when it was calibrated)",
    )
    add(
        "--target-energy-recall",
        type=float,
        help="the same, weighted with what a neuron adds to the output (default: 0.99, likewise)",
    )
    add(
        "--target-kl",
        type=float,
        metavar="NATS",
        help="bound on the KL of predicted to exact mode, measured on the calibration texts; what "
        "each layer's misses cost the answers then decides where to miss (default: none)",
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
        help="AdamW's, relative to the weights (default: 0.05, with --from-audit 0.02)",
    )
    add("--seed", type=int, default=0, help="order, split and batches (default: %(default)s)")
    add("--device", default="cpu", help="where to train, e.g. cuda (default: %(default)s)")
    add("--threads", type=int, help="CPU threads (default: all cores)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    from rich.console import Console

    from predictor.files import DiskFull

    console = Console()
    try:
        _run(args, console)
    except KeyboardInterrupt:
        console.print("interrupted; the same command goes on from here.", highlight=False)
        return 130
    except (ValueError, DiskFull) as error:
        print(f"train-predictors: {error}", file=sys.stderr)
        return 1
    return 0


def _run(args: argparse.Namespace, console: object) -> None:
    import torch
    from rich.console import Console

    from model_store import cache_root, resolve_model
    from predictor import fingerprint
    from training_predictors.calibrate import Targets
    from training_predictors.from_audit import LEARNING_RATE, AuditPlan, improve
    from training_predictors.pipeline import Plan, read_config, run
    from training_predictors.report import print_table
    from training_predictors.train import TrainSettings

    assert isinstance(console, Console)
    if args.threads:
        torch.set_num_threads(args.threads)
    model_dir = resolve_model(args.model)
    out = args.out or model_dir / "sparsity"
    wanted = {"recall": args.target_recall, "energy_recall": args.target_energy_recall}
    wanted = {name: value for name, value in wanted.items() if value is not None}
    if args.from_audit:
        _refuse_beside_audit(args)
        read_config(model_dir)
        audit_plan = AuditPlan(
            model_dir=model_dir,
            samples=args.from_audit,
            out=out,
            targets=wanted,
            train=TrainSettings(
                epochs=args.epochs,
                learning_rate=LEARNING_RATE if args.learning_rate is None else args.learning_rate,
                seed=args.seed,
            ),
            seed=args.seed,
            device=args.device,
        )
        improved = improve(audit_plan, console)
        if improved is None:
            console.print("the stored predictors stay: nothing better was found", highlight=False)
            return
        print_table(improved, console)
        console.print(f"written: {out}", highlight=False, soft_wrap=True)
        return
    plan = Plan(
        model_dir=model_dir,
        data=tuple(args.data),
        held_out=tuple(args.held_out),
        held_out_other=tuple(args.held_out_other),
        out=out,
        work=args.work or cache_root() / "train-predictors" / fingerprint(model_dir),
        tokens=args.tokens,
        context=args.context,
        kind=args.kind,
        rank=args.rank,
        byte_budget=args.byte_budget,
        targets=Targets(**wanted),
        target_kl=args.target_kl,
        train=TrainSettings(
            epochs=args.epochs,
            learning_rate=0.05 if args.learning_rate is None else args.learning_rate,
            seed=args.seed,
        ),
        seed=args.seed,
        device=args.device,
        keep_work=args.keep_work or args.work is not None,
        restart=args.restart,
        compare=args.compare,
    )
    report = run(plan, console)
    print_table(report, console)
    console.print(f"written: {out}", highlight=False, soft_wrap=True)


def _refuse_beside_audit(args: argparse.Namespace) -> None:
    """Options that decide how to record or how large to be mean nothing to stored predictors."""
    recording = ("data", "held_out", "held_out_other", "work", "keep_work", "restart")
    names = (*recording, "rank", "byte_budget", "target_kl", "compare")
    if given := [f"--{name.replace('_', '-')}" for name in names if getattr(args, name)]:
        raise ValueError(
            f"{', '.join(given)} cannot be given with --from-audit: it trains the stored "
            "predictors, as large as they are, on the kept samples alone. Leave one out."
        )


if __name__ == "__main__":
    sys.exit(main())
