"""What predicted mode does to the model's answers: its next-token odds against exact mode's.

The pieces are forwarded twice, as the server would run them: the prompt dense, then each scored
token in the mode. Compared are the logits after each scored token.
Dimension key: N tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from training_predictors.documents import Piece
from training_predictors.record import TapModel, scored_logits

MAX_TOKENS = 4096  # measured at most, up to the end of a piece
CHUNK_TOKENS = 256  # whose two log-softmax tables are in memory at once


class FidelityMeter:
    """Streaming sums over tokens; add them in any grouping."""

    def __init__(self) -> None:
        self.tokens = 0
        self._kl = 0.0
        self._same_top1 = 0

    def add(self, exact_NV: Tensor, predicted_NV: Tensor) -> None:
        """Count N tokens: logits of exact mode against those of predicted mode."""
        both = (torch.split(logits_NV, CHUNK_TOKENS) for logits_NV in (exact_NV, predicted_NV))
        for exact, predicted in zip(*both, strict=True):
            log_p_NV = torch.log_softmax(exact.float(), -1)
            log_q_NV = torch.log_softmax(predicted.float(), -1)
            self._kl += float((log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(dtype=torch.float64))
            self._same_top1 += int((exact.argmax(-1) == predicted.argmax(-1)).sum())
            self.tokens += len(exact)

    def report(self) -> dict[str, Any]:
        """Mean KL(exact || predicted) in nats and the share of tokens with the same greedy next."""
        count = max(1, self.tokens)
        return {
            "tokens": self.tokens,
            "kl": self._kl / count if self.tokens else None,
            "top1_agreement": self._same_top1 / count if self.tokens else None,
        }


def measure_fidelity(model: TapModel, pieces: Iterable[Piece]) -> dict[str, Any]:
    """FidelityMeter.report over scored tokens, MAX_TOKENS or so; the model needs its predictors."""
    meter = FidelityMeter()
    for piece in pieces:
        if meter.tokens >= MAX_TOKENS:
            break
        exact_NV = scored_logits(model, piece, "exact")
        meter.add(exact_NV, scored_logits(model, piece, "predicted"))
    return meter.report()
