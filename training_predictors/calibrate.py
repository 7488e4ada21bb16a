"""Stage 3: the threshold of each layer, from documents that were not trained on.

The whole trade between recall and predicted sparsity is computed exactly and kept; the threshold is
the point on it where the layer skips most while both targets hold.
Dimension key: N tokens, F neurons.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

CURVE_POINTS = 64
FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Targets:
    """Means over held-out tokens that every layer has to reach."""

    recall: float = 0.96
    energy_recall: float = 0.985

    def __post_init__(self) -> None:
        for name, value in (("recall", self.recall), ("energy recall", self.energy_recall)):
            if not 0 < value < 1:
                raise ValueError(f"the target {name} must lie between 0 and 1, is {value}.")


@dataclass(frozen=True)
class Curve:
    """Recall and energy recall as the threshold falls from one active neuron's score to the next.

    The same means over tokens as predictor.RecallMeter's: a token's active neurons share a weight
    of 1 (by count, and by energy), so a cumulative sum over scores gives every point at once.
    """

    active_score: NDArray[np.float32]  # scores of active neurons, highest first
    recall: FloatArray  # with a threshold just below that score
    energy_recall: FloatArray
    all_score: NDArray[np.float32]  # scores of all neurons, lowest first

    @classmethod
    def of(cls, score_NF: Tensor, magnitude_NF: Tensor) -> Curve:
        active_NF = magnitude_NF > 0
        energy_NF = magnitude_NF.double().square()
        has_active_N = active_NF.any(1)
        num_tokens = int(has_active_N.sum())
        if num_tokens == 0:
            raise ValueError(
                "no neuron of this layer fires on the calibration documents; "
                "record more (--tokens)."
            )
        share_NF = active_NF.double() / active_NF.sum(1, keepdim=True).clamp(min=1)
        energy_share_NF = energy_NF / energy_NF.sum(1, keepdim=True).clamp(min=1e-300)
        active_score = score_NF[active_NF].numpy()
        order = np.argsort(-active_score, kind="stable")
        return cls(
            active_score[order],
            np.cumsum(share_NF[active_NF].numpy()[order]) / num_tokens,
            np.cumsum(energy_share_NF[active_NF].numpy()[order]) / num_tokens,
            np.sort(score_NF.numpy(), axis=None),
        )

    def threshold_for(self, targets: Targets) -> float:
        """The highest threshold at which both targets hold."""
        enough = (self.recall >= targets.recall) & (self.energy_recall >= targets.energy_recall)
        # Rounding can leave the last sums a hair under 1; then every active neuron is needed.
        index = int(np.argmax(enough)) if enough.any() else len(enough) - 1
        score = self.active_score[index]
        lower = self.active_score[index:][self.active_score[index:] < score]
        # Halfway to the next lower one leaves room for the rounding of other implementations.
        below = np.float32((score + lower[0]) / 2) if len(lower) else score
        return float(min(below, np.nextafter(score, np.float32(-np.inf))))

    def at(self, thresholds: Sequence[float]) -> list[dict[str, float]]:
        """What each threshold gives."""
        points = []
        for threshold in thresholds:
            kept = int(np.searchsorted(-self.active_score, -np.float32(threshold), side="left"))
            skipped = int(np.searchsorted(self.all_score, np.float32(threshold), side="right"))
            points.append(
                {
                    "threshold": round(float(threshold), 5),
                    "predicted_sparsity": round(skipped / len(self.all_score), 5),
                    "recall": round(float(self.recall[kept - 1]) if kept else 0.0, 5),
                    "energy_recall": round(float(self.energy_recall[kept - 1]) if kept else 0.0, 5),
                }
            )
        return points

    def columns(self) -> dict[str, list[float]]:
        """The curve at evenly spaced predicted sparsities, for curves.json."""
        places = np.linspace(0, len(self.all_score) - 1, CURVE_POINTS).round().astype(np.int64)
        points = self.at([float(self.all_score[place]) for place in places])
        return {key: [point[key] for point in points] for key in points[0]}


def scores_of(predictor_score: Tensor) -> Tensor:
    """Scores ready for a Curve; NaN would sort anywhere, so it is refused."""
    if not bool(torch.isfinite(predictor_score).all()):
        raise ValueError("a predictor gave scores that are not finite; train it again (--restart).")
    return predictor_score
