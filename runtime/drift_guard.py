"""Watches each layer's recall while serving and steps in when the predictor no longer fits.

The audit shows it the sampled tokens. Where the lower end of the recall's 95 % interval over the
last tokens falls below the floor, the layer's threshold is lowered to what those tokens needed; if
that does not help, or selects nearly everything, the layer computes all gates (exact). There is no
way back: a predictor that drifted once is to be trained again, and a layer that went to and
fro would give a request other answers each time.
Dimension key: N tokens, F neurons.
"""

import logging
from collections import deque
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from predictor import RecallMeter

from .config import Mode
from .layers import Layer

log = logging.getLogger(__name__)
GuardState = Literal["ok", "lowered", "exact"]
WINDOW_TOKENS = 512  # recall is judged on the last 256 to 512 audited tokens
MIN_TOKENS = 128
# Of the thresholds that single tokens need, the one that this share of them is content with.
CONTENT_SHARE = 0.75
# Above it the predictor's own weights cost more than the gates it still saves.
MAX_SELECTED = 0.85


class DriftGuard:
    """Owns each layer's state. It is deterministic: the same tokens in the same order decide."""

    def __init__(self, layers: Sequence[Layer], floor: float) -> None:
        self.floor = floor
        self._target = (1 + floor) / 2  # recall that a lowered threshold aims at
        self._layers = layers
        self.states: list[GuardState] = ["ok"] * len(layers)
        self.recent_recall: list[float | None] = [None] * len(layers)
        self._windows = [_Window() for _ in layers]
        self._thresholds = [deque[float](maxlen=WINDOW_TOKENS) for _ in layers]

    def mode(self, layer: int, mode: Mode) -> Mode:
        """What the layer's next step runs in when the model runs in `mode`."""
        return "exact" if mode == "predicted" and self.states[layer] == "exact" else mode

    def observe(self, layer: int, x_ND: Tensor, h_NF: Tensor, selected_NF: Tensor) -> None:
        """Audited tokens of a layer: FFN input, true activations and what was selected."""
        row = self._windows[layer].add(h_NF, selected_NF)
        self.recent_recall[layer] = row["recall"]
        if self.states[layer] == "exact":
            return
        if self.states[layer] == "ok":
            score_NF = self._layers[layer].ffn.scores(x_ND).cpu()
            self._thresholds[layer].extend(needed_thresholds(score_NF, h_NF, self._target))
        if row["tokens"] >= MIN_TOKENS and row["recall_ci95"] is not None:
            self._judge(layer, row)

    def _judge(self, layer: int, row: dict[str, Any]) -> None:
        """Take the layer's next step if its recall, or what that recall costs, asks for it."""
        low, selected = row["recall_ci95"][0], 1 - row["predicted_sparsity"]
        is_too_dear = self.states[layer] == "lowered" and selected > MAX_SELECTED
        if low >= self.floor and not is_too_dear:
            return
        what = self._lower(layer) if self.states[layer] == "ok" else None
        if what is None:
            self.states[layer] = "exact"
            what = "all its gates are computed from now on"
        log.warning(
            "drift guard, layer %d: recall is %.3f (at least %.3f; the floor is %.3f) with %.0f %% "
            "of the neurons selected, on the last %d audited tokens: %s",
            layer, row["recall"], low, self.floor, 100 * selected, row["tokens"], what,
        )  # fmt: skip
        self._windows[layer] = _Window()

    def _lower(self, layer: int) -> str | None:
        """Give the layer the threshold that most of the last tokens needed; None if that is no
        lower than the one it has: then it is not the threshold that is wrong."""
        ffn = self._layers[layer].ffn
        needed = sorted(self._thresholds[layer], reverse=True)
        before, threshold = ffn.threshold, needed[int(CONTENT_SHARE * (len(needed) - 1))]
        if threshold >= before:
            return None
        ffn.set_threshold(threshold)
        self.states[layer] = "lowered"
        return f"its threshold was lowered from {before:.4g} to {threshold:.4g}"


class _Window:
    """Recall over the last tokens, in two halves: the older one is dropped when the newer is full.

    Recall itself is predictor/metrics.py's.
    """

    def __init__(self) -> None:
        self._older, self._newer = RecallMeter(1), RecallMeter(1)

    def add(self, h_NF: Tensor, selected_NF: Tensor) -> dict[str, Any]:
        """The layer's figures (RecallMeter.report) with these tokens."""
        if self._newer.tokens(0) >= WINDOW_TOKENS // 2:
            self._older, self._newer = self._newer, RecallMeter(1)
        self._newer.add(0, h_NF, selected_NF, torch.ones(h_NF.shape[1]))
        both = RecallMeter(1)
        both.merge(self._older)
        both.merge(self._newer)
        row: dict[str, Any] = both.report()["layers"][0]
        return row


def needed_thresholds(score_NF: Tensor, h_NF: Tensor, target: float) -> list[float]:
    """For each token with active neurons the highest threshold that finds `target` of them."""
    needed = []
    for score_F, h_F in zip(score_NF, h_NF, strict=True):
        active_score = score_F[h_F != 0].sort().values
        if len(active_score):
            lowest = active_score[int((1 - target) * len(active_score))]
            needed.append(float(torch.nextafter(lowest, torch.tensor(-torch.inf))))
    return needed
