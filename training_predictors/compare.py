"""All kinds of predictors on one recording: what each keeps when it skips as much as the others.

Every kind scores the same held-out tokens; a threshold per layer makes it skip a given share of the
neurons, and recall and energy recall there are means over tokens, then over layers. `mlp` is the
predictor that was just trained, `svd` has its bytes. `powerinfer` is PowerInfer's recipe with the
bytes of ours: the same rank in int8, which is twice the rank that their fp16 would leave it;
`powerinfer-own-size` has the rank they would give it, in fp16. The last three look at no input.
Dimension key: N tokens, D model width, R rank, F neurons.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

from predictor import MlpPredictor, fingerprint
from predictor.fingerprint import read_ffn_norm, read_gate
from predictor.kinds import GateCopy, Scorer, SignGate, svd_predictor
from predictor.mlp import Int4MlpPredictor
from runtime.config import ModelConfig
from training_predictors.baselines import (
    POWERINFER_WIDTH_SHARE,
    PowerInferPredictor,
    blind_scores,
    train_powerinfer,
)
from training_predictors.calibrate import Curve, scores_of
from training_predictors.progress import progress_bar
from training_predictors.recording import LayerData, Recording

SHARES = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
PRINTED_SHARES = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)
RECALL_TARGETS = (0.95, 0.99)
COVARIANCE_TOKENS = 8192
POWERINFER_THRESHOLD = 0.0


def compare_kinds(
    model_dir: Path,
    recording: Recording,
    predictors: Sequence[MlpPredictor],
    seed: int,
    *,
    console: Console,
) -> dict[str, Any]:
    """{"kinds": {name: {"bytes", "predicted_sparsity", "recall", "energy_recall", ...}}}."""
    thresholds = ModelConfig.from_folder(model_dir).thresholds
    rows: dict[str, list[dict[str, Any]]] = {}
    with progress_bar(console, "compare", len(predictors)) as advance:
        for layer, ours in enumerate(predictors):
            train, test = recording.layer(layer, "train"), recording.layer(layer, "test")
            gate_FD, threshold = read_gate(model_dir, layer), thresholds[layer]
            scorers: dict[str, Scorer] = {
                "mlp": ours,
                "mlp-int4": Int4MlpPredictor.of(ours),
                "svd": svd_predictor(gate_FD, train.x_ND[:COVARIANCE_TOKENS], ours.rank, threshold),
                "gate-int8": GateCopy.of(gate_FD, 8, threshold),
                "gate-int4": GateCopy.of(gate_FD, 4, threshold),
                "sign": SignGate.of(gate_FD),
            }
            of_layer = {name: measure(scorer, test) for name, scorer in scorers.items()}
            norm_D = read_ffn_norm(model_dir, layer)
            of_layer |= _powerinfer_rows(recording, layer, norm_D, ours.rank, seed)
            frequency_F = train.active_NF.float().mean(0)
            for name, score_NF in blind_scores(test, frequency_F, seed).items():
                of_layer[name] = measure_scores(score_NF, test) | {"bytes": 0}
            for name, row in of_layer.items():
                rows.setdefault(name, []).append(row)
            advance(1)
    kinds = {name: _mean(of_kind) for name, of_kind in rows.items()}
    return {"fingerprint": fingerprint(model_dir), "kinds": kinds}


def _powerinfer_rows(
    recording: Recording, layer: int, norm_D: Tensor, rank: int, seed: int
) -> dict[str, dict[str, Any]]:
    """Both sizes of PowerInfer's predictor, each also at the one point where it would be served."""
    train, held_out, test = (
        replace(data, x_ND=data.residual_ND(norm_D))
        for data in (recording.layer(layer, split) for split in ("train", "calibrate", "test"))
    )

    def row(scorer: Scorer) -> dict[str, Any]:
        score_NF = scores_of(scorer.score(test.x_ND))
        (point,) = Curve.of(score_NF, test.magnitude_NF).at([POWERINFER_THRESHOLD])
        served = {
            f"served_{key}": point[key] for key in ("predicted_sparsity", "recall", "energy_recall")
        }
        return {"bytes": scorer.num_bytes, **measure_scores(score_NF, test), **served}

    same_bytes = train_powerinfer(train, held_out, rank, seed)
    own_rank = round(POWERINFER_WIDTH_SHARE * len(norm_D))
    own_size = train_powerinfer(train, held_out, own_rank, seed)
    return {"powerinfer": row(in_int8(same_bytes)), "powerinfer-own-size": row(own_size)}


def in_int8(predictor: PowerInferPredictor) -> MlpPredictor:
    """The same network in the bytes of ours: int8 rows and zeros for the biases it lacks."""
    nothing_R, nothing_F = (torch.zeros(size) for size in predictor.fc2_FR.shape[::-1])
    return MlpPredictor.from_float(predictor.fc1_RD, nothing_R, predictor.fc2_FR, nothing_F)


def measure(scorer: Scorer, data: LayerData) -> dict[str, Any]:
    """One layer's measure_scores and the bytes it takes."""
    score_NF = scores_of(scorer.score(data.x_ND.float()))
    return {"bytes": scorer.num_bytes, **measure_scores(score_NF, data)}


def measure_scores(score_NF: Tensor, data: LayerData) -> dict[str, Any]:
    """Recall at each share of SHARES, and how much may be skipped at RECALL_TARGETS."""
    curve = Curve.of(score_NF, data.magnitude_NF)
    last = len(curve.all_score) - 1
    points = curve.at([float(curve.all_score[round(share * last)]) for share in SHARES])
    row: dict[str, Any] = {}
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
    for name, kind in comparison["kinds"].items():
        if "served_energy_recall" in kind:
            sparsity, recall, energy_recall = (
                f"{kind[f'served_{key}']:.1%}"
                for key in ("predicted_sparsity", "recall", "energy_recall")
            )
            console.print(
                f"{name} as it is served, at logit 0: predicted sparsity {sparsity}, "
                f"recall {recall}, energy recall {energy_recall}",
                highlight=False,
                soft_wrap=True,
            )
