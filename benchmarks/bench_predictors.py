"""What each kind of predictor costs: bytes and microseconds per token, for the same recall.

    python benchmarks/bench_predictors.py default --name predictors-my-machine

Every kind is made for the model's own gates, `mlp` read from its sparsity folder; inputs and
activity are recorded from chats. A layer's threshold is the one at which the kind selects
`--recall` of the active neurons (of all recorded tokens together), so that each pays for its false
alarms. Times are of one decode step of one token through the FFNs of all layers: `select` is the
predictor alone, `predicted` the whole FFN; medians over rounds that visit every kind in turn.
Scores must match their definition, or nothing is timed.
Dimension key: N tokens, D model width, F neurons, L layers, A active neurons of all tokens.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from results_file import write_result
from torch import Tensor

from hotneuron import machine
from model_store import resolve_model
from predictor import Predictor, fingerprint, load_predictors
from predictor.fingerprint import read_gate
from predictor.mlp import Int4MlpPredictor
from runtime.config import ModelConfig
from runtime.kernels import cpu
from runtime.loader import FfnWeights
from runtime.model import Model
from training_predictors.documents import load_documents, pieces_of
from training_predictors.pipeline import load_tokenizer
from training_predictors.ranks import KINDS, RANKED_KINDS, TRAINED_KINDS, choose_ranks
from training_predictors.record import tapped_forward
from training_predictors.training_free import build_layer

CHATS = Path(__file__).parent / "data" / "validation-chats.jsonl"
CONTEXT = 1024
SCORE_TOLERANCE = 1e-3  # of their standard deviation; svd takes differences of large sums


@dataclass
class LayerRecording:
    """Inputs and activity of one layer's FFN."""

    x_ND: Tensor
    active_NF: Tensor


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("model", nargs="?", default="default")
    add("--name", required=True, help="of the result file: results/NAME.json")
    add("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    add("--data", type=Path, nargs="+", default=[CHATS], help="chats or texts to record")
    add("--tokens", type=int, default=2048, help="to record")
    add("--recall", type=float, default=0.96, help="share of the active neurons to select")
    add("--rank", type=int, default=None, help="of svd; by default that of train-predictors")
    add("--rounds", type=int, default=21)
    add("--tokens-per-round", type=int, default=8)
    add("--threads", type=int, default=None)
    return parser.parse_args()


def record(model: Model, arguments: argparse.Namespace, folder: Path) -> list[LayerRecording]:
    """Answers of the chats until there are `--tokens` tokens, layer by layer."""
    tokenizer = load_tokenizer(folder)
    xs: list[list[Tensor]] = [[] for _ in model.layers]
    actives: list[list[Tensor]] = [[] for _ in model.layers]

    def keep(layer: int, x_ND: Tensor, h_NF: Tensor) -> None:
        xs[layer].append(x_ND.clone())
        actives[layer].append(h_NF != 0)

    for document in load_documents(arguments.data, 0):
        for piece in pieces_of(document, tokenizer, CONTEXT):
            tapped_forward(model, piece, keep)
        if sum(map(len, xs[0])) >= arguments.tokens:
            break
    return [LayerRecording(torch.cat(x), torch.cat(a)) for x, a in zip(xs, actives, strict=True)]


def threshold_for(predictor: Predictor, data: LayerRecording, recall: float) -> float:
    """Just below the score that the given share of active neurons reaches."""
    score_A = predictor.score(data.x_ND)[data.active_NF].sort(descending=True).values
    lowest = score_A[max(0, round(recall * len(score_A)) - 1)]
    return float(torch.nextafter(lowest, torch.tensor(-torch.inf)))


def predictors_of(
    kind: str, folder: Path, recording: list[LayerRecording], arguments: argparse.Namespace
) -> list[Predictor]:
    config = ModelConfig.from_folder(folder)
    if kind in TRAINED_KINDS:
        stored = load_predictors(folder / "sparsity", fingerprint=fingerprint(folder))
        if stored.manifest["kind"] != "mlp":
            raise SystemExit(f"{folder}/sparsity holds no mlp: leave it out of --kinds")
        layers = stored.layers
        if kind == "mlp-int4":
            layers = [Int4MlpPredictor.of(layer) for layer in layers]
    else:
        ranks = choose_ranks(
            config.num_layers, config.d_model, config.num_neurons, rank=arguments.rank
        )
        rank = ranks[0] if kind in RANKED_KINDS else None
        layers = [
            build_layer(
                kind,
                read_gate(folder, l),
                lambda data=data: data.x_ND,
                rank,
                config.thresholds[l],
            ).predictor
            for l, data in enumerate(recording)
        ]
    pairs = zip(layers, recording, strict=True)
    return [
        layer.with_threshold(threshold_for(layer, data, arguments.recall)) for layer, data in pairs
    ]


def check(predictor: Predictor, ffn: cpu.CpuFfn, x_ND: Tensor) -> None:
    """Stops unless the kernel's scores are the definition's and `forward` reads what it selects."""
    score_NF = predictor.score(x_ND)
    error, spread = float((ffn.scores(x_ND) - score_NF).abs().max()), float(score_NF.std())
    if not error <= SCORE_TOLERANCE * spread:
        raise SystemExit(f"parity: scores of {predictor.kind} are off by {error:.2e}")
    ffn.forward(x_ND, "predicted")
    if not torch.equal(ffn.last_counts[0], ffn.select(x_ND).sum(1)):
        raise SystemExit(f"parity: {predictor.kind} reads other rows than it selects")


def measure(
    calls: dict[str, Callable[[int, Tensor], object]],
    recording: list[LayerRecording],
    rounds: int,
    num_tokens: int,
) -> dict[str, float]:
    """Median microseconds per token of each call(layer, x_1D) over all layers."""
    tokens = torch.linspace(0, len(recording[0].x_ND) - 1, num_tokens).round().int().tolist()
    inputs = [[data.x_ND[n : n + 1].contiguous() for data in recording] for n in tokens]
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_index in range(rounds + 1):
        for name, call in calls.items():
            begin = time.perf_counter()
            for x_L1D in inputs:
                for layer, x_1D in enumerate(x_L1D):
                    call(layer, x_1D)
            if round_index > 0:  # the first warms up
                times[name].append((time.perf_counter() - begin) / num_tokens)
    return {name: 1e6 * statistics.median(seconds) for name, seconds in times.items()}


def main() -> int:
    arguments = parse_arguments()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    cpu.set_num_threads(arguments.threads)
    torch.set_num_threads(cpu.num_threads())
    folder = resolve_model(arguments.model)
    config = ModelConfig.from_folder(folder)
    model = Model.from_folder(folder)
    weights: list[FfnWeights] = [layer.ffn.weights for layer in model.layers]
    recording = record(model, arguments, folder)
    out_1D = torch.empty(1, config.d_model)

    calls: dict[str, Callable[[int, Tensor], object]] = {}
    rows: dict[str, dict[str, Any]] = {}
    unit = config.num_neurons * config.d_model * weights[0].gate_FD.element_size()
    active = statistics.mean(float(data.active_NF.float().mean()) for data in recording)

    def ffns_of(predictors: list[Predictor | None]) -> list[cpu.CpuFfn]:
        return [
            cpu.CpuFfn(w.gate_FD, w.up_FD, w.down_FD, threshold, predictor)
            for w, threshold, predictor in zip(weights, config.thresholds, predictors, strict=True)
        ]

    plain = ffns_of([None] * len(weights))
    calls["dense"] = lambda l, x_1D: plain[l].forward(x_1D, "dense", out_1D)
    calls["exact"] = lambda l, x_1D: plain[l].forward(x_1D, "exact", out_1D)
    for kind in arguments.kinds:
        predictors = predictors_of(kind, folder, recording, arguments)
        ffns = ffns_of([*predictors])
        for predictor, ffn, data in zip(predictors, ffns, recording, strict=True):
            check(predictor, ffn, data.x_ND[:4].contiguous())
        selected = statistics.mean(
            float(predictor.select(data.x_ND).float().mean())
            for predictor, data in zip(predictors, recording, strict=True)
        )
        num_bytes = sum(predictor.num_bytes for predictor in predictors)
        rows[kind] = {
            "predictor_bytes": num_bytes,
            "selected_share": selected,
            "ffn_bytes": num_bytes + round(len(weights) * unit * (selected + 2 * active)),
        }
        calls[f"select {kind}"] = lambda l, x_1D, ffns=ffns: ffns[l].select(x_1D)
        calls[f"predicted {kind}"] = lambda l, x_1D, ffns=ffns: ffns[l].forward(
            x_1D, "predicted", out_1D
        )

    times = measure(calls, recording, arguments.rounds, arguments.tokens_per_round)
    for kind, row in rows.items():
        row["select_us"] = times[f"select {kind}"]
        row["predicted_us"] = times[f"predicted {kind}"]
    result = {
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": machine.commit(),
        "versions": machine.versions(),
        "hardware": machine.hardware(),
        "kernels": cpu.isa(),
        "threads": cpu.num_threads(),
        "model": {"name": arguments.model, "fingerprint": fingerprint(folder)},
        "settings": {
            key: getattr(arguments, key)
            for key in ("tokens", "recall", "rank", "rounds", "tokens_per_round")
        },
        "active_share": active,
        "dense": {"ffn_bytes": 3 * unit * len(weights), "us": times["dense"]},
        "exact": {
            "ffn_bytes": round(unit * len(weights) * (1 + 2 * active)),
            "us": times["exact"],
        },
        "kinds": rows,
    }
    print(f"{'kind':<10} {'MB':>6} {'selects':>8} {'select us':>10} {'FFN MB':>7} {'FFN us':>8}")
    for mode in ("dense", "exact"):
        size, us = result[mode]["ffn_bytes"] / 1e6, times[mode]
        print(f"{mode:<10} {'':>6} {1:>8.1%} {'':>10} {size:>7.1f} {us:>8.0f}")
    for kind, row in rows.items():
        print(
            f"{kind:<10} {row['predictor_bytes'] / 1e6:>6.1f} {row['selected_share']:>8.1%} "
            f"{row['select_us']:>10.0f} {row['ffn_bytes'] / 1e6:>7.1f} {row['predicted_us']:>8.0f}"
        )
    write_result(arguments.name, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
