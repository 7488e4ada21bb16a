"""The one definition of recall: training, calibration, reports, audit and dashboard all use it.

Per token: recall = selected and active / active, energy recall = the same shares weighted with
(h_i * norm(down_i))^2. Both are averaged over tokens, then over layers. A token with no active
neuron has no recall: it counts for the sparsities only. Precision is pooled over tokens. A token
whose activations are not finite has none of these and is only counted. A value that was not
measured is None.
Dimension key: N tokens, F neurons, L layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

# Two-sided 95 % of the normal distribution; the sample is thousands of tokens.
Z_95 = 1.959963984540054


@dataclass
class _LayerSums:
    """Sums from which every figure of one layer follows; adding two of them merges two samples."""

    tokens: int = 0
    neurons: int = 0
    active: int = 0
    selected: int = 0
    hits: int = 0
    recall_tokens: int = 0
    recall: float = 0.0
    recall_squared: float = 0.0
    energy_tokens: int = 0
    energy_recall: float = 0.0
    energy_recall_squared: float = 0.0
    nonfinite_tokens: int = 0

    def merge(self, other: _LayerSums) -> None:
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


def mean_ci95(total: float, total_squared: float, count: int) -> list[float] | None:
    """95 % interval of a mean of values in [0, 1]; None below two values."""
    if count < 2:
        return None
    mean = total / count
    variance = max(0.0, (total_squared - count * mean * mean) / (count - 1))
    half = Z_95 * math.sqrt(variance / count)
    return [max(0.0, mean - half), min(1.0, mean + half)]


class RecallMeter:
    """Streaming sums per layer. Add tokens in any order and any grouping; meters can be merged."""

    def __init__(self, num_layers: int) -> None:
        self._layers = [_LayerSums() for _ in range(num_layers)]

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    def tokens(self, layer: int) -> int:
        return self._layers[layer].tokens

    def add(self, layer: int, h_NF: Tensor, selected_NF: Tensor, down_norm_F: Tensor) -> None:
        """Count N tokens of a layer: true activations h = act(gate) * up against a selection."""
        if h_NF.ndim != 2 or selected_NF.shape != h_NF.shape or selected_NF.dtype != torch.bool:
            raise ValueError(
                f"h_NF {tuple(h_NF.shape)} and the bool mask selected_NF must have one shape; "
                f"the mask is {selected_NF.dtype} {tuple(selected_NF.shape)}."
            )
        active_NF = h_NF != 0
        hit_NF = active_NF & selected_NF
        energy_NF = (h_NF.to(torch.float64) * down_norm_F.to(torch.float64)).square()
        stats_4N = torch.stack(
            [
                active_NF.sum(1, dtype=torch.float64),
                hit_NF.sum(1, dtype=torch.float64),
                energy_NF.sum(1, dtype=torch.float64),
                torch.where(hit_NF, energy_NF, 0.0).sum(1, dtype=torch.float64),
            ]
        ).cpu()
        is_finite_N = torch.isfinite(stats_4N).all(0)
        active_N, hits_N, energy_N, kept_N = stats_4N[:, is_finite_N]
        selected_N = selected_NF.sum(1).cpu()[is_finite_N]
        has_active_N = active_N > 0
        has_energy_N = energy_N > 0
        recall_N = hits_N[has_active_N] / active_N[has_active_N]
        energy_recall_N = kept_N[has_energy_N] / energy_N[has_energy_N]
        self._layers[layer].merge(
            _LayerSums(
                tokens=len(active_N),
                neurons=len(active_N) * h_NF.shape[1],
                active=int(active_N.sum()),
                selected=int(selected_N.sum()),
                hits=int(hits_N.sum()),
                recall_tokens=recall_N.numel(),
                recall=float(recall_N.sum()),
                recall_squared=float(recall_N.square().sum()),
                energy_tokens=energy_recall_N.numel(),
                energy_recall=float(energy_recall_N.sum()),
                energy_recall_squared=float(energy_recall_N.square().sum()),
                nonfinite_tokens=int((~is_finite_N).sum()),
            )
        )

    def merge(self, other: RecallMeter) -> None:
        """Take over another meter's tokens."""
        if other.num_layers != self.num_layers:
            raise ValueError(f"cannot merge {other.num_layers} layers into {self.num_layers}.")
        for mine, theirs in zip(self._layers, other._layers, strict=True):
            mine.merge(theirs)

    def report(self) -> dict[str, Any]:
        """{"layers": [one dict per layer], "mean": the same keys averaged over measured layers}."""
        layers = [_layer_report(layer, sums) for layer, sums in enumerate(self._layers)]
        return {"layers": layers, "mean": _mean_report(layers)}


def _layer_report(layer: int, sums: _LayerSums) -> dict[str, Any]:
    return {
        "layer": layer,
        "tokens": sums.tokens,
        "nonfinite_tokens": sums.nonfinite_tokens,
        "natural_sparsity": 1 - sums.active / sums.neurons if sums.neurons else None,
        "predicted_sparsity": 1 - sums.selected / sums.neurons if sums.neurons else None,
        "recall": sums.recall / sums.recall_tokens if sums.recall_tokens else None,
        "energy_recall": sums.energy_recall / sums.energy_tokens if sums.energy_tokens else None,
        "precision": sums.hits / sums.selected if sums.selected else None,
        "recall_ci95": mean_ci95(sums.recall, sums.recall_squared, sums.recall_tokens),
        "energy_recall_ci95": mean_ci95(
            sums.energy_recall, sums.energy_recall_squared, sums.energy_tokens
        ),
    }


def _mean_report(layers: list[dict[str, Any]]) -> dict[str, Any]:
    mean: dict[str, Any] = {
        key: max((row[key] for row in layers), default=0) for key in ("tokens", "nonfinite_tokens")
    }
    for key in ("natural_sparsity", "predicted_sparsity", "recall", "energy_recall", "precision"):
        values = [row[key] for row in layers if row[key] is not None]
        mean[key] = sum(values) / len(values) if values else None
    for key in ("recall_ci95", "energy_recall_ci95"):
        # The layers see the same tokens, so their errors may be fully correlated; the mean of the
        # intervals holds even then.
        pairs = [row[key] for row in layers if row[key] is not None]
        mean[key] = (
            [sum(pair[side] for pair in pairs) / len(pairs) for side in (0, 1)] if pairs else None
        )
    return mean
