"""Thresholds that keep the answers: a bound on the KL of predicted to exact mode.

Equal shares of missed energy do not cost equally: what the first layer loses, all later ones read.
So each layer is predicted alone on calibration documents and its KL divided by the energy it
missed; the thresholds are then chosen with these prices. Costs of layers do not quite add up, so
the joint KL is measured, the prices are scaled to it, and the choice is made again.
Dimension key: N tokens, V vocabulary, L layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from rich.console import Console

from runtime.model import Model
from training_predictors.calibrate import AnswerCost, Choices, Targets, choose_thresholds
from training_predictors.documents import Piece
from training_predictors.fidelity import FidelityMeter
from training_predictors.progress import progress_bar
from training_predictors.record import LayerMode, scored_logits

PROBE_TOKENS = 1024  # on which every layer is predicted alone
PROBE_CONTEXT = 192  # short pieces of many texts
ROUNDS = 4
MARGIN = 0.85  # of the bound is aimed at: other texts cost more or less than these
LEAST_MISS = 1e-5  # a layer that misses next to nothing has no price of its own


class AnswerMeter:
    """KL of predicted mode, or of single predicted layers, on the same few pieces each time."""

    def __init__(self, model: Model, pieces: Iterable[Piece]) -> None:
        """`model` has predictors; their thresholds are changed here."""
        self.model = model
        self.exact = []
        tokens = 0
        for piece in pieces:
            if tokens >= PROBE_TOKENS:
                break
            self.exact.append((piece, scored_logits(model, piece, "exact")))
            tokens += piece.num_scored

    def set_thresholds(self, thresholds: Sequence[float]) -> None:
        for layer, threshold in zip(self.model.layers, thresholds, strict=True):
            layer.ffn.set_threshold(threshold)

    def kl(self, only: int | None = None) -> float:
        """In nats per token, with all layers predicted or one of them."""
        layer_mode: LayerMode | None = None
        if only is not None:

            def layer_mode(layer: int, mode: str) -> str:  # type: ignore[misc]
                return mode if layer == only else "exact"

        meter = FidelityMeter()
        for piece, exact_NV in self.exact:
            meter.add(exact_NV, scored_logits(self.model, piece, "predicted", layer_mode))
        kl: float = meter.report()["kl"]
        return kl


def thresholds_within(
    bound: float,
    model: Model,
    pieces: Iterable[Piece],
    layers: Sequence[Choices],
    targets: Targets,
    console: Console,
) -> list[float]:
    """Thresholds that reach the targets and, as measured on `pieces`, keep KL within `bound`.

    ValueError where even the dearest choice does not.
    """
    meter = AnswerMeter(model, pieces)
    thresholds = choose_thresholds(layers, targets)
    meter.set_thresholds(thresholds)
    joint = meter.kl()
    if joint <= MARGIN * bound:
        return thresholds
    nats_L = _prices(meter, layers, thresholds, console)
    for _ in range(ROUNDS):
        cost = AnswerCost(nats_L, MARGIN * bound)
        estimate = cost.of(_energy_recalls(layers, thresholds))
        cost = AnswerCost(nats_L * (joint / max(estimate, LEAST_MISS)), MARGIN * bound)
        thresholds = choose_thresholds(layers, targets, cost)
        meter.set_thresholds(thresholds)
        joint = meter.kl()
        if joint <= bound:
            return thresholds
    raise ValueError(
        f"no thresholds keep the KL of predicted to exact mode within {bound:g} nats: the nearest "
        f"gave {joint:.4f} on the calibration documents. Give a larger --target-kl, or a predictor "
        "that knows the gate better (a higher --rank, --kind gate-int4)."
    )


def _energy_recalls(layers: Sequence[Choices], thresholds: Sequence[float]) -> list[float]:
    return [
        layer.at(threshold).energy_recall
        for layer, threshold in zip(layers, thresholds, strict=True)
    ]


def _prices(
    meter: AnswerMeter, layers: Sequence[Choices], thresholds: Sequence[float], console: Console
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """nats_L: each layer's KL alone over the energy share that it missed."""
    nats = []
    with progress_bar(console, "weigh", len(layers)) as advance:
        for layer, energy_recall in enumerate(_energy_recalls(layers, thresholds)):
            nats.append(max(0.0, meter.kl(only=layer)) / max(1 - energy_recall, LEAST_MISS))
            advance(1)
    return np.array(nats)
