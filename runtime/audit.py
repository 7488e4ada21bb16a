"""Checks, while serving, what the predictors miss: on a sampled share of decode steps it computes
every layer's true activations and compares.

Works in every mode. Without predictors only the natural sparsity is measured. Owns the recall
meter; the definition of recall is predictor/metrics.py. Its time is counted apart from decoding.
What it computed goes on to the drift guard, and to a sink that may keep it, if there are any.
Dimension key: N tokens, D model width, F neurons, L layers.
"""

import random
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
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


class RequestAudit:
    """What was measured of the tokens of one request, which asked for it."""

    def __init__(self, num_layers: int, has_predictors: bool) -> None:
        self.meter = RecallMeter(num_layers)
        self._has_predictors = has_predictors

    def figures(self) -> dict[str, Any]:
        """Means over its tokens and the layers; what was not measured is None."""
        mean = self.meter.report()["mean"]
        figures = {"tokens": mean["tokens"], **{key: mean[key] for key in KEYS}}
        if not self._has_predictors:
            figures |= {key: None for key in KEYS if key in NEED_PREDICTORS}
        return figures


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
        self.fired_LF = torch.zeros(shape, dtype=torch.int64)  # audited tokens it fired for
        self._lock = threading.Lock()  # the report is read from other threads
        self.sink: AuditSink | None = None
        self.count: Callable[[int, Tensor], None] | None = None  # is shown each layer's h_NF

    def new_request_audit(self) -> RequestAudit:
        return RequestAudit(self._model.config.num_layers, self._model.has_predictors)

    def tap(
        self, request_ids: Sequence[str], own: Sequence[RequestAudit | None] = ()
    ) -> DecodeTap | None:
        """What the next decode step should call; None if it is not among the sampled ones and no
        token of it belongs to a request with an audit of its `own`.

        A step that is not sampled counts for those requests only: what clients ask for moves
        neither the report nor the guard.
        """
        is_sampled = self._random.random() < self._rate
        asked = {n: audit.meter for n, audit in enumerate(own) if audit is not None}
        if is_sampled:
            return self._sampled_tap(request_ids, asked)
        return self._own_tap(asked) if asked else None

    def _sampled_tap(
        self, request_ids: Sequence[str], asked: Mapping[int, RecallMeter]
    ) -> DecodeTap:
        samples: list[tuple[Tensor, Tensor]] = []

        def observe(layer: int, x_ND: Tensor) -> None:
            h_NF, selected_NF = self._measure(layer, x_ND)
            for n, meter in asked.items():
                meter.add(layer, h_NF[[n]], selected_NF[[n]], self._down_norm_LF[layer])
            if self.sink is not None:
                samples.append((x_ND.cpu(), self._magnitude(layer, h_NF)))
                is_last = len(samples) == self._model.config.num_layers
                if is_last and all(bool(torch.isfinite(m).all()) for _, m in samples):
                    self.sink(request_ids, samples)
            self._learn(layer, x_ND, h_NF, selected_NF)

        return observe

    def _learn(self, layer: int, x_ND: Tensor, h_NF: Tensor, selected_NF: Tensor) -> None:
        """A token with values that are not finite tells nothing of which neurons fire: the meter
        counts it apart."""
        finite_N = torch.isfinite(h_NF).all(1)
        with self._lock:
            self._meter.add(layer, h_NF, selected_NF, self._down_norm_LF[layer])
            self.fired_LF[layer] += (h_NF[finite_N] != 0).sum(0)
        if not bool(finite_N.any()):
            return
        h_NF, selected_NF = h_NF[finite_N], selected_NF[finite_N]
        if self.count is not None:
            self.count(layer, h_NF)
        if self._guard is not None:
            self._guard.observe(layer, x_ND[finite_N.to(x_ND.device)], h_NF, selected_NF)

    def _own_tap(self, asked: Mapping[int, RecallMeter]) -> DecodeTap:
        rows = list(asked)

        def observe(layer: int, x_ND: Tensor) -> None:
            h_NF, selected_NF = self._measure(layer, x_ND[rows])
            for n, meter in enumerate(asked.values()):
                meter.add(layer, h_NF[[n]], selected_NF[[n]], self._down_norm_LF[layer])

        return observe

    def _measure(self, layer: int, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's true h_NF and the mask of what is selected."""
        ffn = self._model.layers[layer].ffn
        h_NF = ffn.activations(x_ND).cpu()
        uses_predictor = self._guard is None or self._guard.states[layer] != "exact"
        if self._model.has_predictors and uses_predictor:
            return h_NF, ffn.select(x_ND).cpu()
        return h_NF, torch.ones_like(h_NF, dtype=torch.bool)

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
        num_neurons = self.fired_LF.shape[1]
        size = -(-num_neurons // most_groups)
        with self._lock:
            tokens = self._meter.tokens(self._meter.num_layers - 1)
            fired_LF = self.fired_LF.numpy().copy()
        starts = np.arange(0, num_neurons, size)
        group_size_G = np.diff(starts, append=num_neurons)
        fired_LG = np.add.reduceat(fired_LF, starts, axis=1)
        share_LG = np.round(fired_LG / (group_size_G * max(1, tokens)), 4)
        return {
            "tokens": tokens,
            "group_size": size,
            "share_LG": share_LG.tolist(),
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
        counts = {"audited_tokens": row["tokens"], "nonfinite_tokens": row["nonfinite_tokens"]}
        return {**result, **counts}
