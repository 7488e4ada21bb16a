"""A FATReLU threshold per layer: more sparsity for the same quality than one threshold for all.

Where a silenced neuron costs little, the threshold rises; where it costs much, it falls and pays
for the rise elsewhere. A round has two halves. First every layer alone is moved one step up and one
step down, the other layers as they are, and its KL and sparsity measured; the stream before the
layer is reused, so this costs about half a forward pass a move. Then the moves are filled in like
water: one exchange rate (sparsity per KL) for all layers, each takes the move that is best at that
rate, and the rate is the lowest whose summed KL fits what is left. Costs of layers do not quite add
up, so the joint result is measured on all documents before it is kept. What breaks a bound is
filled again with as much less KL; a round that finds nothing better halves the step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from .errors import BadInput
from .evaluate import Allowance, Quality, compare
from .modeling import Llama, block, rope_tables

FIRST_STEP = 0.05  # of a threshold; halved until MIN_STEP
MIN_STEP = 0.01
TRIES = 3  # fills per round
DECIMALS = 4


@dataclass(frozen=True)
class Move:
    """One layer's threshold, changed alone: what it does to the whole model."""

    layer: int
    threshold: float
    kl: float  # nats per token, more than before
    sparsity: float  # mean over layers, more than before


def spread(documents: Sequence[Sequence[int]], max_tokens: int) -> list[Sequence[int]]:
    """Evenly spaced documents of at most `max_tokens` in all, but at least one."""
    total = sum(map(len, documents))
    every = max(1, -(-total // max_tokens))
    return list(documents[::every])


@torch.no_grad()
def measure_moves(
    student: Llama,
    teacher: Llama,
    documents: Sequence[Sequence[int]],
    candidates: Sequence[tuple[int, float]],
    skip: int = 1,
    on_document: Callable[[], None] = lambda: None,
) -> list[Move]:
    """What each (layer, threshold) of `candidates` would change, the other layers as they are."""
    kl = torch.zeros(len(candidates) + 1, dtype=torch.float64)  # the last: nothing moved
    zeros = torch.zeros_like(kl)
    tokens = 0
    for document in documents:
        if len(document) <= skip:
            continue
        ids_BS = torch.tensor([list(document)], device=student.device)
        at = slice(skip - 1, len(document) - 1)
        tokens += len(document) - skip
        wanted_NV = teacher.logits(teacher.hidden(ids_BS)[0][-1][0, at]).log_softmax(-1)
        stream, _, zeros_LBS = student.hidden(ids_BS)
        zeros_LN = zeros_LBS[:, 0, at].double()
        kl[-1] += _kl_sum(wanted_NV, student, stream[-1][0, at])
        zeros[-1] += zeros_LN.sum().cpu()
        cos, sin = rope_tables(student.shape, len(document), student.device)
        for i, (layer, threshold) in enumerate(candidates):
            moved_L = student.threshold_L.clone()
            moved_L[layer] = threshold
            x_BSD = stream[layer - 1] if layer else student.embed_VD[ids_BS]
            zeros[i] += zeros_LN[:layer].sum().cpu()
            for l in range(layer, student.shape.num_layers):
                x_BSD, _, zeros_BS = block(
                    x_BSD,
                    student.blocks[l],
                    cos,
                    sin,
                    moved_L[l],
                    student.shape,
                    student.shape.hidden_act,
                )
                zeros[i] += zeros_BS[0, at].double().sum().cpu()
            kl[i] += _kl_sum(wanted_NV, student, x_BSD[0, at])
        on_document()
    if tokens == 0:
        raise BadInput(f"no document is longer than {skip} tokens; nothing to measure on")
    kl_more = ((kl - kl[-1]) / tokens).tolist()
    sparser = ((zeros - zeros[-1]) / (tokens * student.shape.num_layers)).tolist()
    return [Move(*candidate, kl_more[i], sparser[i]) for i, candidate in enumerate(candidates)]


def _kl_sum(teacher_NV: Tensor, student: Llama, x_ND: Tensor) -> Tensor:
    student_NV = student.logits(x_ND).log_softmax(-1)
    return (teacher_NV.exp() * (teacher_NV - student_NV)).sum().double().cpu()


def fill(moves: Sequence[Move], kl_left: float) -> list[Move]:
    """The moves to make together, one a layer at most: most sparsity for a summed KL of at most
    `kl_left`.

    At an exchange rate r a layer takes the move, or none, with the largest sparsity - r * KL. The
    rate is lowered from one breakpoint to the next while the sum still fits.
    """
    by_layer: dict[int, list[Move]] = {}
    for move in moves:
        by_layer.setdefault(move.layer, []).append(move)
    best: list[Move] = []
    for rate in sorted(_breakpoints(by_layer.values()), reverse=True):
        # just below the breakpoint, where the choice has changed
        choices = [_choice(those, rate * (1 - 1e-9)) for those in by_layer.values()]
        chosen = [move for move in choices if move is not None]
        if sum(move.kl for move in chosen) > kl_left:
            break
        best = chosen
    return best


def _choice(moves: Sequence[Move], rate: float) -> Move | None:
    """One layer's best move at this rate; None if staying is best."""
    best = max(moves, key=lambda move: move.sparsity - rate * move.kl)
    return best if best.sparsity - rate * best.kl > 0 else None


def _breakpoints(layers: Iterable[Sequence[Move]]) -> set[float]:
    """The rates at which some layer changes its mind."""
    rates: set[float] = set()
    for moves in layers:
        points = sorted([(0.0, 0.0), *((move.kl, move.sparsity) for move in moves)])
        rates.update(
            (more - sparsity) / (dearer - kl)
            for (kl, sparsity), (dearer, more) in combinations(points, 2)
            if dearer > kl and more > sparsity
        )
    # above all of them: only what saves KL
    return rates | {2 * max(rates, default=1.0)}


class LayerSearch:
    """A search for thresholds per layer, and where it stands.

    `kept` are the points it kept, the starting one first: each was measured on all documents, lies
    within the allowance (counted from `start`) and is sparser than the one before.
    """

    def __init__(
        self,
        student: Llama,
        teacher: Llama,
        documents: Sequence[Sequence[int]],
        allowance: Allowance,
        tried: Sequence[tuple[float, Quality]],
        skip: int = 1,
        probe_tokens: int = 4000,
    ) -> None:
        """`tried` is what `search_threshold` tried under the same allowance; the search begins with
        the largest of these that it permits. Moves are measured on about `probe_tokens` tokens."""
        self.student, self.teacher, self.skip = student, teacher, skip
        self.documents, self.probe = documents, spread(documents, probe_tokens)
        self.allowance, self.start = allowance, tried[0][1]
        permitted = [one for one in tried[1:] if allowance.permits(one[1], self.start)]
        threshold, quality = [tried[0], *permitted][-1]
        self.kept = [((threshold,) * student.shape.num_layers, quality)]
        self.step = FIRST_STEP

    @property
    def thresholds(self) -> tuple[float, ...]:
        return self.kept[-1][0]

    @property
    def quality(self) -> Quality:
        return self.kept[-1][1]

    def run(
        self,
        max_rounds: int = 8,
        on_round: Callable[[int], None] = lambda number: None,
        on_document: Callable[[], None] = lambda: None,
    ) -> tuple[float, ...]:
        """Rounds until steps get too small; leaves the student with the thresholds it returns."""
        for number in range(1, max_rounds + 1):
            if self.step < MIN_STEP:
                break
            on_round(number)
            if not self.round(on_document):
                self.step /= 2
        self.student.set_thresholds(self.thresholds)
        return self.thresholds

    def round(self, on_document: Callable[[], None] = lambda: None) -> bool:
        """Measure every layer's moves, fill, verify; whether a better point was found."""
        self.student.set_thresholds(self.thresholds)
        candidates = [
            (layer, moved)
            for layer, threshold in enumerate(self.thresholds)
            for moved in _neighbours(threshold, self.step)
        ]
        moves = measure_moves(
            self.student, self.teacher, self.probe, candidates, self.skip, on_document
        )
        kl_left = self.start.kl + self.allowance.kl_increase - self.quality.kl
        for _ in range(TRIES):
            chosen = fill(moves, kl_left)
            if sum(move.sparsity for move in chosen) <= 0:
                return False
            by_layer = {move.layer: move.threshold for move in chosen}
            thresholds = tuple(by_layer.get(l, t) for l, t in enumerate(self.thresholds))
            self.student.set_thresholds(thresholds)
            quality = compare(self.student, self.teacher, self.documents, self.skip)
            if self.allowance.permits(quality, self.start):
                if quality.sparsity > self.quality.sparsity:
                    self.kept.append((thresholds, quality))
                    return True
                return False
            kl_left = sum(move.kl for move in chosen) - self._excess(quality)
        return False

    def _excess(self, quality: Quality) -> float:
        """By how many nats a point breaks the allowance; the costs of layers do not add up."""
        excess = quality.kl - self.start.kl - self.allowance.kl_increase
        if self.allowance.ppl_increase is not None:
            dearer = math.log(quality.perplexity / self.start.perplexity)
            excess = max(excess, dearer - math.log1p(self.allowance.ppl_increase))
        return 1.1 * excess


def _neighbours(threshold: float, step: float) -> list[float]:
    """One step down, as far as there is one, and one up."""
    down = [round(max(0.0, threshold - step), DECIMALS)] if threshold > 0 else []
    return [*down, round(threshold + step, DECIMALS)]
