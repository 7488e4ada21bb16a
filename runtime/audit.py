"""Checks, while serving, what the predictors miss: on a sampled share of decode steps it computes
every layer's true activations and compares.

Works in every mode. Without predictors only the natural sparsity is measured. Owns the recall
meter; the definition of recall is predictor/metrics.py. Its time is counted apart from decoding.
What it computed goes on to the drift guard, and to a sink that may keep it, if there are any.
Dimension key: N tokens, D model width, F neurons, L layers.
"""

import random
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from predictor import RecallMeter

from .drift_guard import DriftGuard
from .model import DecodeTap, Model

KEYS = ("natural_sparsity", "predicted_sparsity", "recall", "energy_recall", "precision")
INTERVALS = ("recall_ci95", "energy_recall_ci95")
NEED_PREDICTORS = ("predicted_sparsity", "recall", "energy_recall", "precision", *INTERVALS)

# The request of each of a step's tokens, and for every layer the FFN's input x_ND and
# |h| * norm(down) as magnitude_NF, neurons in the checkpoint's order.
AuditSink = Callable[[Sequence[str], Sequence[tuple[Tensor, Tensor]]], None]


class Audit:
    """Sampling is seeded: the same run audits the same steps."""

    def __init__(
        self, model: Model, rate: float, seed: int = 0, guard: DriftGuard | None = None
    ) -> None:
        self._model = model
        self._rate = rate if model.config.is_sparse else 0.0
        self._random = random.Random(seed)
        self._meter = RecallMeter(model.config.num_layers)
        self._down_norm_LF = model.down_norm_LF.cpu()
        self._guard = guard
        shape = (model.config.num_layers, model.config.num_neurons)
        self._fired_LF = torch.zeros(shape, dtype=torch.int64)  # audited tokens it fired for
        self._lock = threading.Lock()  # the report is read from other threads
        self.sink: AuditSink | None = None

    def tap(self, request_ids: Sequence[str]) -> DecodeTap | None:
        """What the next decode step should call, or None if it is not among the sampled ones."""
        if self._random.random() >= self._rate:
            return None
        samples: list[tuple[Tensor, Tensor]] = []

        def observe(layer: int, x_ND: Tensor) -> None:
            h_NF = self._observe(layer, x_ND)
            if self.sink is not None:
                samples.append((x_ND.cpu(), self._magnitude(layer, h_NF)))
                if len(samples) == self._model.config.num_layers:
                    self.sink(request_ids, samples)

        return observe

    def _observe(self, layer: int, x_ND: Tensor) -> Tensor:
        """Measure one layer; returns its true h_NF."""
        ffn = self._model.layers[layer].ffn
        h_NF = ffn.activations(x_ND).cpu()
        guard = self._guard
        uses_predictor = guard is None or guard.states[layer] != "exact"
        selected_NF = (
            ffn.select(x_ND).cpu()
            if self._model.has_predictors and uses_predictor
            else torch.ones_like(h_NF, dtype=torch.bool)
        )
        with self._lock:
            self._meter.add(layer, h_NF, selected_NF, self._down_norm_LF[layer])
            self._fired_LF[layer] += (h_NF != 0).sum(0)
        if guard is not None:
            guard.observe(layer, x_ND, h_NF, selected_NF)
        return h_NF

    def _magnitude(self, layer: int, h_NF: Tensor) -> Tensor:
        magnitude_NF = h_NF.abs() * self._down_norm_LF[layer]
        placement = self._model.placement
        if placement is None:
            return magnitude_NF
        in_order_NF = torch.empty_like(magnitude_NF)
        in_order_NF[:, placement.order_LF[layer]] = magnitude_NF
        return in_order_NF

    def activation(self, most_groups: int = 64) -> dict[str, Any]:
        """How often neurons fire, as means of groups of neighbours: share_LG, by layer and group.

        Neurons stand as in memory: in the checkpoint's order, or hot ones first.
        """
        num_neurons = self._fired_LF.shape[1]
        size = -(-num_neurons // most_groups)
        with self._lock:
            tokens = self._meter.tokens(self._meter.num_layers - 1)
            counts_LF = self._fired_LF.double()
        starts = range(0, num_neurons, size)
        means = [counts_LF[:, start : start + size].mean(1) for start in starts]
        share_LG = torch.stack(means, dim=1) / max(1, tokens)
        return {
            "tokens": tokens,
            "group_size": size,
            "share_LG": [[round(x, 4) for x in row] for row in share_LG.tolist()],
        }

    def report(self) -> dict[str, Any]:
        """{"layers": [...], "mean": {...}}; what was not measured is None."""
        with self._lock:
            raw = self._meter.report()
        return {
            "layers": [{"layer": row["layer"], **self._row(row)} for row in raw["layers"]],
            "mean": self._row(raw["mean"]),
        }

    def _row(self, row: dict[str, Any]) -> dict[str, Any]:
        result = {key: row[key] for key in (*KEYS, *INTERVALS)}
        if not self._model.has_predictors:
            result |= dict.fromkeys(NEED_PREDICTORS)
        return {**result, "audited_tokens": row["tokens"]}
