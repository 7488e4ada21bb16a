"""Moves neurons between accelerator and host while serving: the ones that fire now become hot.

Counts what the audit sees. Between two steps, when enough tokens have been counted, each split
layer exchanges the hot neurons that fire least for the cold ones that fire more: rows of the three
matrices, outputs of the predictor and the placement's order change places, and nothing else moves.
How many neurons are hot, and so what memory is taken, stays. Dimensions: L layers, F neurons.
"""

import logging
from collections.abc import Iterator

import torch
from torch import Tensor

from .audit import Audit
from .hybrid import HybridFFN, swap_rows
from .model import Model

log = logging.getLogger(__name__)
EVERY_TOKENS = 4096  # counted between two exchanges
GAIN = 1.25  # by how much more often the cold neuron must fire: rows that would come back stay


class Replacement:
    """Owns the counts, in the model's current order of neurons."""

    def __init__(self, model: Model, audit: Audit, every_tokens: int = EVERY_TOKENS) -> None:
        self._model, self._audit, self._every = model, audit, every_tokens
        audit.count = self.count
        layers = enumerate(model.layers)
        self._split = {l: layer.ffn for l, layer in layers if isinstance(layer.ffn, HybridFFN)}
        F = model.config.num_neurons
        self._counts = {l: torch.zeros(F, dtype=torch.int64) for l in self._split}
        self._tokens = dict.fromkeys(self._split, 0)

    def count(self, layer: int, h_NF: Tensor) -> None:
        """True activations of some tokens, on the host."""
        if layer in self._split:
            self._counts[layer] += (h_NF != 0).sum(0)
            self._tokens[layer] += len(h_NF)

    def apply_if_due(self) -> int:
        """Between two steps: how many neurons changed places."""
        if not self._split or min(self._tokens.values()) < self._every:
            return 0
        moved = sum(self._exchange(l, ffn) for l, ffn in self._split.items())
        for l in self._split:
            self._counts[l].zero_()
            self._tokens[l] = 0
        if moved:
            log.info("placement: %d neurons that fire more often are hot now", moved)
        return moved

    def _exchange(self, layer: int, ffn: HybridFFN) -> int:
        pairs = exchanges(self._counts[layer], ffn.num_hot)
        if not pairs:
            return 0
        hot, cold = (torch.tensor(side) for side in zip(*pairs, strict=True))
        for kept_F in self._in_order(layer):
            swap_rows(kept_F, hot, kept_F, cold)
        ffn.exchange_neurons(hot, cold)
        return len(pairs)

    def _in_order(self, layer: int) -> Iterator[Tensor]:
        """What else stands in the layer's order of neurons."""
        yield self._counts[layer]
        yield self._audit.fired_LF[layer]
        yield self._model.down_norm_LF[layer]
        if self._model.placement is not None:
            yield self._model.placement.order_LF[layer]


def exchanges(counts_F: Tensor, num_hot: int) -> list[tuple[int, int]]:
    """(hot, cold) neurons that should change places: the rarest hot one with the commonest cold
    one, and so on while it pays."""
    hot = counts_F[:num_hot].argsort(stable=True).tolist()
    cold = (num_hot + counts_F[num_hot:].argsort(descending=True, stable=True)).tolist()
    pairs: list[tuple[int, int]] = []
    for h, c in zip(hot, cold, strict=False):
        if counts_F[c] <= GAIN * counts_F[h]:
            break
        pairs.append((h, c))
    return pairs
