"""Checks, while serving, what the predictors miss: on a sampled share of decode steps it computes
every layer's true activations and compares.

Works in every mode. Without predictors only the natural sparsity is measured. Owns the recall
meter; the definition of recall is predictor/metrics.py. Its time is counted apart from decoding.
"""

import random
import threading
from typing import Any

import torch
from torch import Tensor

from predictor import RecallMeter

from .model import DecodeTap, Model

KEYS = ("natural_sparsity", "predicted_sparsity", "recall", "energy_recall", "precision")
NEED_PREDICTORS = ("predicted_sparsity", "recall", "energy_recall", "precision", "recall_ci95")


class Audit:
    """Sampling is seeded: the same run audits the same steps."""

    def __init__(self, model: Model, rate: float, seed: int = 0) -> None:
        self._model = model
        self._rate = rate if model.config.is_sparse else 0.0
        self._random = random.Random(seed)
        self._meter = RecallMeter(model.config.num_layers)
        self._down_norm_LF = model.down_norm_LF
        self._lock = threading.Lock()  # the report is read from other threads

    def tap(self) -> DecodeTap | None:
        """What the next decode step should call, or None if it is not among the sampled ones."""
        return self._observe if self._random.random() < self._rate else None

    def _observe(self, layer: int, x_ND: Tensor) -> None:
        ffn = self._model.layers[layer].ffn
        h_NF = ffn.activations(x_ND).cpu()
        selected_NF = (
            ffn.select(x_ND).cpu()
            if self._model.has_predictors
            else torch.ones_like(h_NF, dtype=torch.bool)
        )
        with self._lock:
            self._meter.add(layer, h_NF, selected_NF, self._down_norm_LF[layer])

    def report(self) -> dict[str, Any]:
        """{"layers": [...], "mean": {...}}; what was not measured is None."""
        with self._lock:
            raw = self._meter.report()
        return {
            "layers": [{"layer": row["layer"], **self._row(row)} for row in raw["layers"]],
            "mean": self._row(raw["mean"]),
        }

    def _row(self, row: dict[str, Any]) -> dict[str, Any]:
        result = {key: row[key] for key in (*KEYS, "recall_ci95")}
        if not self._model.has_predictors:
            result |= dict.fromkeys(NEED_PREDICTORS)
        return {**result, "audited_tokens": row["tokens"]}
