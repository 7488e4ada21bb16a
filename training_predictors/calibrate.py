"""Stage 3: the thresholds, from documents that were not trained on.

The whole trade of a layer between recall and predicted sparsity is computed exactly and kept. The
layers' thresholds are chosen together: the most that can be skipped while the means over layers
reach the targets. With a price per target, each layer takes the point of its own curve that is
worth most, so a layer whose neurons are easy to tell apart gives what a hard one cannot; the prices
are the lowest at which the targets hold.
Dimension key: N tokens, F neurons, P points of a curve, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

CURVE_POINTS = 64
CHOICE_POINTS = 4096  # of each layer's curve, among which its threshold is chosen
WORST_LAYER = 3.0  # no layer misses more than this many times what the targets let all miss
PRICE_STEPS = 40
MAX_PRICE = 1e9
HIGHEST = 0.9999  # as a target: a layer that missed nothing may miss next to nothing
FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Targets:
    """Means over held-out tokens, then over layers, that the thresholds have to reach."""

    recall: float = 0.94
    energy_recall: float = 0.99

    def __post_init__(self) -> None:
        for name, value in (("recall", self.recall), ("energy recall", self.energy_recall)):
            if not 0 < value < 1:
                raise ValueError(f"the target {name} must lie between 0 and 1, is {value}.")


@dataclass(frozen=True)
class AnswerCost:
    """What misses cost the answers: KL of predicted to exact mode in nats, as a sum over layers."""

    nats_L: FloatArray  # per unit of missed energy share
    bound: float  # on the sum

    def of(self, energy_recall_L: Sequence[float]) -> float:
        return float(np.sum(self.nats_L * (1 - np.asarray(energy_recall_L))))


@dataclass(frozen=True)
class Choices:
    """Points of one layer's curve from which its threshold is taken, most skipped first."""

    threshold_P: FloatArray
    skipped_P: FloatArray
    recall_P: FloatArray
    energy_recall_P: FloatArray

    def at(self, threshold: float) -> Targets:
        """What one of the thresholds reaches."""
        place = int(np.argmin(np.abs(self.threshold_P - threshold)))
        return Targets(
            *(
                min(float(values[place]), HIGHEST)
                for values in (self.recall_P, self.energy_recall_P)
            )
        )


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

    def choices(self, targets: Targets) -> Choices:
        """Where this layer's threshold may lie: evenly spaced points that respect WORST_LAYER."""
        enough = (self.recall >= 1 - WORST_LAYER * (1 - targets.recall)) & (
            self.energy_recall >= 1 - WORST_LAYER * (1 - targets.energy_recall)
        )
        # Rounding can leave the last sums a hair under 1; then every active neuron is needed.
        last = len(enough) - 1
        first = int(np.argmax(enough)) if enough.any() else last
        index_P = np.unique(np.linspace(first, last, CHOICE_POINTS).round().astype(np.int64))
        # Equal scores are kept or skipped together: of each group only the last sum is true.
        score_P = self.active_score[index_P]
        index_P = np.searchsorted(-self.active_score, -score_P, side="right") - 1
        skipped_P = np.searchsorted(self.all_score, score_P, side="left") / len(self.all_score)
        # Halfway to the next lower one leaves room for the rounding of other implementations.
        next_P = self.active_score[np.minimum(index_P + 1, last)]
        below_P = np.nextafter(score_P, np.float32(-np.inf))
        return Choices(
            np.minimum((score_P + next_P) / 2, below_P).astype(np.float64),
            skipped_P.astype(np.float64),
            self.recall[index_P],
            self.energy_recall[index_P],
        )

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


def choose_thresholds(
    layers: Sequence[Choices], targets: Targets, cost: AnswerCost | None = None
) -> list[float]:
    """One threshold per layer: the most skipped with both targets reached in the mean.

    A price in skipped neurons for each target turns the common choice into one per layer. Answers
    come first, where their cost is bounded; then the price of energy recall is the lowest that
    reaches its target; recall gets one of its own only where that does not reach its target too.
    """
    nats_L = np.zeros(len(layers)) if cost is None else cost.nats_L
    of_answers = 0.0

    def picks(prices: tuple[float, float]) -> list[int]:
        of_recall, of_energy = prices
        of_energy_L = of_energy + of_answers * nats_L
        return [
            int(np.argmax(c.skipped_P + of_recall * c.recall_P + price * c.energy_recall_P))
            for c, price in zip(layers, of_energy_L, strict=True)
        ]

    def answers_hold(price: float) -> bool:
        nonlocal of_answers
        of_answers = price
        pairs = zip(layers, picks((0.0, 0.0)), strict=True)
        return cost is None or cost.of([c.energy_recall_P[p] for c, p in pairs]) <= cost.bound

    of_answers = _lowest_price(answers_hold)

    def mean_recall(prices: tuple[float, float]) -> float:
        pairs = zip(layers, picks(prices), strict=True)
        return float(np.mean([c.recall_P[p] for c, p in pairs]))

    def mean_energy_recall(prices: tuple[float, float]) -> float:
        pairs = zip(layers, picks(prices), strict=True)
        return float(np.mean([c.energy_recall_P[p] for c, p in pairs]))

    def with_energy_priced(of_recall: float) -> tuple[float, float]:
        return of_recall, _lowest_price(
            lambda price: mean_energy_recall((of_recall, price)) >= targets.energy_recall
        )

    of_recall = _lowest_price(
        lambda price: mean_recall(with_energy_priced(price)) >= targets.recall
    )
    chosen = _spend(layers, picks(with_energy_priced(of_recall)), targets, cost)
    return [float(c.threshold_P[p]) for c, p in zip(layers, chosen, strict=True)]


def _spend(
    layers: Sequence[Choices], picks: list[int], targets: Targets, cost: AnswerCost | None
) -> list[int]:
    """Move single layers on while both means and the bound hold, the one that gains most first.

    Prices lead past the points where a curve bulges inwards, so they leave something over.
    """
    picks = list(picks)
    while True:
        pairs = list(zip(layers, picks, strict=True))
        # never below 0, so that a layer's own point is always in its reach
        spare_recall = max(0.0, sum(c.recall_P[p] - targets.recall for c, p in pairs))
        spare_energy = max(0.0, sum(c.energy_recall_P[p] - targets.energy_recall for c, p in pairs))
        spare_nats = np.inf
        if cost is not None:
            spare_nats = max(0.0, cost.bound - cost.of([c.energy_recall_P[p] for c, p in pairs]))
        best_gain, best = 0.0, (0, 0)
        for layer, (c, p) in enumerate(pairs):
            nats = 0.0 if cost is None else float(cost.nats_L[layer])
            reach = min(spare_energy, spare_nats / nats if nats > 0 else np.inf)
            in_reach_P = (c.recall_P >= c.recall_P[p] - spare_recall) & (
                c.energy_recall_P >= c.energy_recall_P[p] - reach
            )
            furthest = int(np.argmax(np.where(in_reach_P, c.skipped_P, -1.0)))
            gain = float(c.skipped_P[furthest] - c.skipped_P[p])
            if gain > best_gain:
                best_gain, best = gain, (layer, furthest)
        if best_gain == 0.0:
            return picks
        picks[best[0]] = best[1]


def _lowest_price(is_enough: Callable[[float], bool]) -> float:
    """The lowest price, to a few digits, at which a target holds; MAX_PRICE if none reaches it."""
    if is_enough(0.0):
        return 0.0
    high = 1.0
    while not is_enough(high):
        if high >= MAX_PRICE:
            return high
        high *= 8
    low = 0.0 if high == 1.0 else high / 8
    for _ in range(PRICE_STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high


def scores_of(predictor_score: Tensor) -> Tensor:
    """Scores ready for a Curve; NaN would sort anywhere, so it is refused."""
    if not bool(torch.isfinite(predictor_score).all()):
        raise ValueError("a predictor gave scores that are not finite; train it again (--restart).")
    return predictor_score
