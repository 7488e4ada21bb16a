"""CETT: how sparse a model is at a given error, whatever its activation (arXiv 2411.02335).

Counting zeros says nothing of SiLU, and overstates what ReLU needs: many neurons fire and hardly
matter. The cumulative error of tail truncation (CETT) asks instead. Of each token and layer the
neurons with the smallest outputs |h_i| * norm(down_i) are dropped, as many as can be while

    norm(sum of the dropped outputs) / norm(sum of all outputs) <= CETT

and all layers are truncated at once, so each reads what the truncated ones before it wrote. The
PPL-1 % sparsity is the one at the CETT where perplexity has risen by one percent: a number that a
dense model and its sparse version share.

A document's first position stays whole and is not scored. Attention of all later tokens rests on
it, and a few of its neurons are so large that a tenth of its output outweighs what other tokens
have in all: cut alone at 0.1, it costs the default model more perplexity than all others together.
The paper has one cutoff per layer for all tokens, which hardly touches it. Dimensions: N tokens,
D model width, F neurons, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor

from .errors import BadInput
from .evaluate import score
from .modeling import BlockWeights, Llama, block

LAST_STEP = 0.005  # of CETT: a bisection ends when its bracket is this narrow


def tail(h_NF: Tensor, down_DF: Tensor, cett: float) -> tuple[Tensor, Tensor]:
    """(kept mask_NF, cutoff_N): each token's neurons that stay when the tail is cut at `cett`.

    A dropped neuron's output is at most cutoff_N long. The error is that of the dropped sum itself,
    in fp32, not a bound on it. It need not rise with every neuron, so the bisection ends at one of
    the places where it crosses `cett`; the error there is within it.
    """
    h_NF, down_DF = h_NF.float(), down_DF.float()
    magnitude_NF = h_NF.abs() * down_DF.norm(dim=0)
    ordered_NF, order_NF = magnitude_NF.sort(dim=1)
    place_F = torch.arange(h_NF.shape[1], device=h_NF.device)
    rank_NF = torch.empty_like(order_NF).scatter_(1, order_NF, place_F.expand_as(order_NF))
    allowed_N = cett * (h_NF @ down_DF.T).norm(dim=1)
    # silent neurons go without a question; with `full_N` dropped there is nothing left
    fits_N = (magnitude_NF == 0).sum(dim=1)
    full_N = torch.full_like(fits_N, h_NF.shape[1])
    while bool((full_N - fits_N > 1).any()):
        middle_N = (fits_N + full_N) // 2
        dropped_NF = torch.where(rank_NF < middle_N[:, None], h_NF, 0.0)
        is_within_N = (dropped_NF @ down_DF.T).norm(dim=1) <= allowed_N
        fits_N = torch.where(is_within_N, middle_N, fits_N)
        full_N = torch.where(is_within_N, full_N, middle_N)
    cutoff_N = ordered_NF.gather(1, (fits_N - 1).clamp(min=0)[:, None])[:, 0]
    return rank_NF >= fits_N[:, None], cutoff_N


class Truncated:
    """An edit of `block` that drops the tail of each token's neurons but the first position's.

    Collects, call by call, the cutoff of every token.
    """

    def __init__(self, cett: float) -> None:
        if not 0 <= cett < 1:
            raise BadInput(f"a CETT is a relative error, at least 0 and below 1; got {cett}")
        self.cett = cett
        self.cutoffs: list[Tensor] = []

    def __call__(self, h_BSF: Tensor, w: BlockWeights) -> Tensor:
        assert isinstance(w.down_DF, Tensor), "frozen models hold plain matrices"
        kept_NF, cutoff_N = tail(h_BSF.flatten(0, 1), w.down_DF, self.cett)
        self.cutoffs.append(cutoff_N)
        kept_BSF = kept_NF.view(h_BSF.shape)
        kept_BSF[:, 0] = True
        return h_BSF.masked_fill(~kept_BSF, 0)


@dataclass(frozen=True)
class Point:
    """A model truncated at one CETT, on a set of documents.

    `cutoff_by_layer` is the median over tokens of the largest output that was dropped. Divided by
    norm(down_i) it is a threshold on |h_i| of neuron i.
    """

    cett: float
    tokens: int
    sparsity: float
    sparsity_by_layer: list[float]
    perplexity: float
    cutoff_by_layer: list[float]

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


@torch.no_grad()
def truncate(
    model: Llama,
    documents: Sequence[Sequence[int]],
    cett: float,
    skip: int = 2,
    on_document: Callable[[], None] = lambda: None,
) -> Point:
    """Sparsity and perplexity at this CETT; the first `skip` tokens of a document are context.

    At least two are: the first position is not truncated, so it says nothing.
    """
    if skip < 2:
        raise BadInput(f"skip must be at least 2, got {skip}")
    layers = model.shape.num_layers
    zeros_L = torch.zeros(layers, dtype=torch.float64)
    cutoffs: list[list[Tensor]] = [[] for _ in range(layers)]
    nll, tokens = 0.0, 0
    for document in documents:
        if len(document) <= skip:
            continue
        truncated = Truncated(cett)
        logp_NV, zeros_LN = score(model, document, skip, partial(block, edit=truncated))
        target_N = torch.tensor(list(document[skip:]), device=model.device)
        nll -= float(logp_NV.gather(1, target_N[:, None]).sum())
        zeros_L += zeros_LN.double().sum(-1).cpu()
        tokens += len(target_N)
        for layer, cutoff_N in enumerate(truncated.cutoffs):
            cutoffs[layer].append(cutoff_N[skip - 1 : len(document) - 1].cpu())
        on_document()
    if tokens == 0:
        raise BadInput(f"no document is longer than {skip} tokens; nothing to score")
    by_layer = (zeros_L / tokens).tolist()
    return Point(
        cett=cett,
        tokens=tokens,
        sparsity=sum(by_layer) / layers,
        sparsity_by_layer=by_layer,
        perplexity=math.exp(nll / tokens),
        cutoff_by_layer=[float(torch.cat(parts).median()) for parts in cutoffs],
    )


def ppl_point(curve: Sequence[Point], measure: Callable[[float], Point], increase: float) -> Point:
    """The largest CETT, to LAST_STEP, whose perplexity is within `increase` (a share) of CETT 0's.

    `curve` holds what was measured already, CETT 0 among it; `measure` gives further points.
    """
    points = sorted(curve, key=lambda point: point.cett)
    if points[0].cett != 0:
        raise BadInput("the curve must hold CETT 0, the model as it is")
    limit = points[0].perplexity * (1 + increase)
    beyond = next((i for i, point in enumerate(points) if point.perplexity > limit), len(points))
    best = points[beyond - 1]
    end = points[beyond].cett if beyond < len(points) else 1.0
    while end - best.cett > LAST_STEP:
        point = measure((best.cett + end) / 2)
        if point.perplexity <= limit:
            best = point
        else:
            end = point.cett
    return best


def neuron_thresholds(model: Llama, point: Point) -> list[dict[str, float]]:
    """By layer, the spread over neurons of the threshold on |h_i| that the cutoff stands for."""
    rows = []
    for weights, cutoff in zip(model.blocks, point.cutoff_by_layer, strict=True):
        assert isinstance(weights.down_DF, Tensor), "frozen models hold plain matrices"
        threshold_F = cutoff / weights.down_DF.float().norm(dim=0)
        levels = torch.tensor([0.05, 0.5, 0.95], device=threshold_F.device)
        low, middle, high = threshold_F.quantile(levels).tolist()
        rows.append({"p5": low, "median": middle, "p95": high})
    return rows
