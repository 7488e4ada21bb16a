"""Where a sparse model is sparse: by layer and kind of text, and which neurons do the work.

A kind of text is a set of documents: the short ones in `kinds_of_text/` (written for this purpose)
and the user's own files. How often each neuron fires is counted per kind; every other number comes
from these counts. Pooled numbers weigh kinds alike, however long their documents are.
Dimensions: L layers, F neurons, K kinds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import BadInput
from .modeling import BlockWeights, Llama, block

KINDS_OF_TEXT = Path(__file__).parent / "kinds_of_text"
COVERED_SHARE = 0.8  # of activations; as in PowerInfer's power law
TOP_SHARE = 0.2  # of neurons, the most frequent ones
CURVE_POINTS = 101


@dataclass(frozen=True)
class Counts:
    """How often each neuron fired on a set of documents."""

    fired_LF: Tensor  # int64
    tokens: int
    documents: int

    @property
    def frequency_LF(self) -> Tensor:
        """Share of tokens on which a neuron fired, fp64."""
        return self.fired_LF.double() / self.tokens

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.fired_LF + other.fired_LF,
            self.tokens + other.tokens,
            self.documents + other.documents,
        )


def packaged_kinds() -> dict[str, Path]:
    """Name -> file of the kinds of text that come with this package."""
    return {path.stem.replace("_", " "): path for path in sorted(KINDS_OF_TEXT.glob("*.jsonl"))}


class _Counting:
    """An edit of `block` that changes nothing: it counts which neurons fire at the positions `at`
    of one document, layer after layer."""

    def __init__(self, fired_LF: Tensor, at: slice) -> None:
        self._rows, self._at = iter(fired_LF), at

    def __call__(self, h_BSF: Tensor, w: BlockWeights) -> Tensor:
        next(self._rows).add_((h_BSF[0, self._at] != 0).sum(0).cpu())
        return h_BSF


def count(
    model: Llama,
    documents: Sequence[Sequence[int]],
    skip: int = 1,
    on_document: Callable[[], None] = lambda: None,
) -> Counts:
    """Counts over the places that predict each document's tokens after the first `skip`, the ones
    that `evaluate` scores."""
    fired_LF = torch.zeros(model.shape.num_layers, model.shape.num_neurons, dtype=torch.int64)
    tokens = scored = 0
    for document in documents:
        if len(document) <= skip:
            continue
        ids_BS = torch.tensor([list(document)], device=model.device)
        counting = _Counting(fired_LF, slice(skip - 1, len(document) - 1))
        model.hidden(ids_BS, partial(block, edit=counting))
        tokens += len(document) - skip
        scored += 1
        on_document()
    if tokens == 0:
        raise BadInput(f"no document is longer than {skip} tokens; nothing to count")
    return Counts(fired_LF, tokens, scored)


def share_that_covers(frequency_F: Tensor, share: float = COVERED_SHARE) -> float:
    """The smallest share of neurons that make up this share of all activations."""
    covered_F = frequency_F.sort(descending=True).values.cumsum(0)
    needed = int((covered_F < share * covered_F[-1] * (1 - 1e-12)).sum()) + 1
    return needed / len(frequency_F)


def coverage_curve(frequency_F: Tensor) -> list[float]:
    """Share of activations that the most frequent 0 %, 1 %, ... 100 % of neurons make up."""
    covered_F = frequency_F.sort(descending=True).values.cumsum(0)
    at = (torch.linspace(0, 1, CURVE_POINTS) * len(frequency_F)).round().long()
    whole_F = torch.cat([torch.zeros(1, dtype=covered_F.dtype), covered_F])
    return [round(float(v), 5) for v in whole_F[at] / covered_F[-1]]


def top_neurons(frequency_LF: Tensor, share: float = TOP_SHARE) -> Tensor:
    """bool mask_LF of each layer's most frequent neurons; of equals the first."""
    num_top = max(1, round(share * frequency_LF.shape[1]))
    order_LF = frequency_LF.sort(dim=1, descending=True, stable=True).indices
    return torch.zeros_like(frequency_LF, dtype=torch.bool).scatter_(1, order_LF[:, :num_top], True)


def overlap(one_LF: Tensor, other_LF: Tensor) -> dict[str, float]:
    """Jaccard index and share in common of two sets of neurons, means over layers."""
    both_L = (one_LF & other_LF).sum(1).double()
    either_L = (one_LF | other_LF).sum(1).double()
    return {
        "jaccard": float((both_L / either_L).mean()),
        "in_common": float((both_L / one_LF.sum(1)).mean()),
    }


def analyze(
    model: Llama, halves_by_kind: Mapping[str, tuple[Counts, Counts]], thresholds: Any
) -> dict[str, Any]:
    """The report. A kind comes as the counts of its even and of its odd documents: how much these
    two agree says what an overlap between kinds can be at most."""
    kinds = {name: even + odd for name, (even, odd) in halves_by_kind.items()}
    pooled_LF = torch.stack([counts.frequency_LF for counts in kinds.values()]).mean(0)
    tops = {name: top_neurons(counts.frequency_LF) for name, counts in kinds.items()}
    in_all_LF = torch.stack(list(tops.values())).all(0)
    return {
        "activation": model.shape.hidden_act,
        "thresholds": thresholds,
        "kinds": {name: _kind(counts) for name, counts in kinds.items()},
        "all": {
            "sparsity": 1 - float(pooled_LF.mean()),
            "sparsity_by_layer": (1 - pooled_LF.mean(1)).tolist(),
        },
        "neurons": {
            "covered_share": COVERED_SHARE,
            "share_of_neurons": share_that_covers(pooled_LF.flatten()),
            "share_of_neurons_by_layer": [share_that_covers(row_F) for row_F in pooled_LF],
            "never_fired": float((pooled_LF == 0).double().mean()),
            "curve": coverage_curve(pooled_LF.flatten()),
            "curve_by_layer": [coverage_curve(row_F) for row_F in pooled_LF],
        },
        "overlap": {
            "top_share": TOP_SHARE,
            "between": [
                {"kinds": [one, other], **overlap(tops[one], tops[other])}
                for one, other in combinations(kinds, 2)
            ],
            "within": {
                name: overlap(*(top_neurons(half.frequency_LF) for half in halves))
                for name, halves in halves_by_kind.items()
            },
            "in_all_kinds": float(in_all_LF.sum() / next(iter(tops.values())).sum()),
        },
    }


def _kind(counts: Counts) -> dict[str, Any]:
    frequency_LF = counts.frequency_LF
    return {
        "documents": counts.documents,
        "tokens": counts.tokens,
        "sparsity": 1 - float(frequency_LF.mean()),
        "sparsity_by_layer": (1 - frequency_LF.mean(1)).tolist(),
        "share_of_neurons": share_that_covers(frequency_LF.flatten()),
    }


def read_run(folder: Path) -> list[dict[str, Any]]:
    """The steps of a training run, in order; of a step that was run twice, the later one."""
    log = folder / "log.jsonl"
    if not log.is_file():
        raise BadInput(f"{folder} has no log.jsonl; give the --out of `prosparse train`")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    by_step = {line["step"]: line for line in lines}
    return [by_step[step] for step in sorted(by_step)]
