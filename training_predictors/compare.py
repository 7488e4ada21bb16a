"""All kinds of predictors on one recording: what each keeps when it skips as much as the others.

Every kind scores the same held-out tokens; a threshold per layer makes it skip a given share of the
neurons, and recall and energy recall there are means over tokens, then over layers. `mlp` is the
predictor that was just trained, `svd` has its bytes; `plain` is the network of Deja Vu and
PowerInfer at the same rank (two matrices, no biases, random start), all misses costing the same.
Dimension key: N tokens, D model width, R rank, F neurons.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional

from predictor import MlpPredictor, fingerprint
from predictor.fingerprint import read_gate
from predictor.kinds import GateCopy, Scorer, SignGate, svd_predictor
from runtime.config import ModelConfig
from training_predictors.calibrate import Curve, scores_of
from training_predictors.progress import progress_bar
from training_predictors.recording import LayerData, Recording
from training_predictors.train import TrainedLayer

SHARES = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
PRINTED_SHARES = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)
RECALL_TARGETS = (0.95, 0.99)
COVARIANCE_TOKENS = 8192
PLAIN_LEARNING_RATE = 1e-3


def compare_kinds(
    model_dir: Path,
    recording: Recording,
    trained: Sequence[TrainedLayer],
    *,
    epochs: int,
    seed: int,
    console: Console,
) -> dict[str, Any]:
    """{"kinds": {name: {"bytes", "predicted_sparsity", "recall", "energy_recall", ...}}}."""
    thresholds = ModelConfig.from_folder(model_dir).thresholds
    rows: dict[str, list[dict[str, Any]]] = {}
    with progress_bar(console, "compare", len(trained)) as advance:
        for layer, ours in enumerate(trained):
            train, test = recording.layer(layer, "train"), recording.layer(layer, "test")
            gate_FD, threshold = read_gate(model_dir, layer), thresholds[layer]
            scorers: dict[str, Scorer] = {
                "mlp": ours.predictor,
                "svd": svd_predictor(
                    gate_FD, train.x_ND[:COVARIANCE_TOKENS], ours.predictor.rank, threshold
                ),
                "plain": train_plain(train, ours.predictor.rank, epochs, seed),
                "gate-int8": GateCopy.of(gate_FD, 8, threshold),
                "gate-int4": GateCopy.of(gate_FD, 4, threshold),
                "sign": SignGate.of(gate_FD),
            }
            for name, scorer in scorers.items():
                rows.setdefault(name, []).append(measure(scorer, test))
            advance(1)
    kinds = {name: _mean(of_kind) for name, of_kind in rows.items()}
    return {"fingerprint": fingerprint(model_dir), "kinds": kinds}


def measure(scorer: Scorer, data: LayerData) -> dict[str, Any]:
    """One layer: recall at each share of SHARES, and how much may be skipped at RECALL_TARGETS."""
    score_NF = scores_of(scorer.score(data.x_ND.float()))
    curve = Curve.of(score_NF, data.magnitude_NF)
    last = len(curve.all_score) - 1
    points = curve.at([float(curve.all_score[round(share * last)]) for share in SHARES])
    row: dict[str, Any] = {"bytes": scorer.num_bytes}
    for key in ("predicted_sparsity", "recall", "energy_recall"):
        row[key] = [point[key] for point in points]
    for target in RECALL_TARGETS:
        enough = int(np.argmax(curve.energy_recall >= target))
        skipped = np.searchsorted(curve.all_score, curve.active_score[enough], side="left")
        row[f"predicted_sparsity_at_energy_recall_{target}"] = float(skipped) / (last + 1)
    return row


def _mean(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Bytes of all layers; everything else as means over layers."""
    mean: dict[str, Any] = {"bytes": sum(row["bytes"] for row in rows)}
    for key in rows[0].keys() - {"bytes"}:
        mean[key] = np.mean([row[key] for row in rows], axis=0).round(5).tolist()
    return mean


def train_plain(data: LayerData, rank: int, epochs: int, seed: int) -> MlpPredictor:
    """Two linear maps and a ReLU, binary cross-entropy, AdamW at 1e-3.

    DejaVu_predictor's trainer differs in its loss: it also weights silent neurons by the batch's
    share of active ones.
    """
    generator = torch.Generator().manual_seed(seed)
    x_ND, active_NF = data.x_ND.float(), data.active_NF.float()

    def matrix(rows: int, columns: int) -> Tensor:
        bound = columns**-0.5
        start = torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)
        return start.requires_grad_()

    fc1_RD, fc2_FR = matrix(rank, x_ND.shape[1]), matrix(active_NF.shape[1], rank)
    optimizer = torch.optim.AdamW([fc1_RD, fc2_FR], lr=PLAIN_LEARNING_RATE, weight_decay=0.01)
    for _ in range(epochs):
        for rows in torch.split(torch.randperm(len(x_ND), generator=generator), 256):
            score_NF = torch.relu(x_ND[rows] @ fc1_RD.T) @ fc2_FR.T
            loss = functional.binary_cross_entropy_with_logits(score_NF, active_NF[rows])
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            optimizer.step()
    nothing_R, nothing_F = torch.zeros(rank), torch.zeros(len(fc2_FR))
    return MlpPredictor.from_float(fc1_RD, nothing_R, fc2_FR, nothing_F)


def print_comparison(comparison: dict[str, Any], console: Console) -> None:
    """Energy recall by predicted sparsity, a row per kind."""
    table = Table(title="energy recall (%) at a predicted sparsity of ...", box=SIMPLE_HEAD)
    table.add_column("kind")
    table.add_column("MB", justify="right")
    shown = [SHARES.index(share) for share in PRINTED_SHARES]
    for share in PRINTED_SHARES:
        table.add_column(f"{share:.0%}", justify="right")
    for name, kind in comparison["kinds"].items():
        values = [f"{100 * kind['energy_recall'][at]:.1f}" for at in shown]
        table.add_row(name, f"{kind['bytes'] / 1e6:.1f}", *values)
    console.print(table)
