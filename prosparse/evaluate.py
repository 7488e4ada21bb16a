"""How sparse a student is, and how far from its dense teacher, on held-out documents.

Documents stand alone, from position 0, as in serving. `skip` leaves out a fixed opening (a chat
template's header, which every model knows by heart): what is said of the rest is the stricter
number, and the command prints both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import BadInput
from .modeling import Llama, block


@dataclass(frozen=True)
class Quality:
    """Means over the scored tokens of a set of documents."""

    documents: int
    tokens: int
    sparsity: float
    sparsity_by_layer: list[float]
    kl: float
    top1_agreement: float
    perplexity: float
    teacher_perplexity: float

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


@torch.no_grad()
def score(
    model: Llama, document: Sequence[int], skip: int, run_block: Any = block
) -> tuple[Tensor, Tensor]:
    """Log-probabilities [N,V] at the places that predict a document's tokens after the first
    `skip`, and the share of zeros of x1 there by layer, [L,N]."""
    ids_BS = torch.tensor([list(document)], device=model.device)
    at = slice(skip - 1, len(document) - 1)
    stream, _, zeros_LBS = model.hidden(ids_BS, run_block)
    return model.logits(stream[-1][0, at]).log_softmax(-1), zeros_LBS[:, 0, at]


@torch.no_grad()
def compare(
    student: Llama,
    teacher: Llama,
    documents: Sequence[Sequence[int]],
    skip: int = 1,
    on_document: Callable[[], None] = lambda: None,
) -> Quality:
    """Run both models over each document; the first `skip` tokens are context only.

    KL is KL(teacher || student) in nats per token, agreement compares the greedy tokens,
    sparsity is the share of zeros of x1 = act(gate) * up (ProSparse, section 3.1).
    """
    layers = student.shape.num_layers
    zeros_L = torch.zeros(layers, dtype=torch.float64)
    kl = agreed = student_nll = teacher_nll = 0.0
    tokens = scored_documents = 0
    for document in documents:
        if len(document) <= skip:
            continue
        target_N = torch.tensor(list(document[skip:]), device=student.device)
        student_NV, zeros_LN = score(student, document, skip)
        teacher_NV, _ = score(teacher, document, skip)
        kl += float((teacher_NV.exp() * (teacher_NV - student_NV)).sum())
        agreed += float((student_NV.argmax(-1) == teacher_NV.argmax(-1)).sum())
        student_nll -= float(student_NV.gather(1, target_N[:, None]).sum())
        teacher_nll -= float(teacher_NV.gather(1, target_N[:, None]).sum())
        zeros_L += zeros_LN.double().sum(-1).cpu()
        tokens += len(target_N)
        scored_documents += 1
        on_document()
    if tokens == 0:
        raise BadInput(f"no document is longer than {skip} tokens; nothing to score")
    by_layer = (zeros_L / tokens).tolist()
    return Quality(
        documents=scored_documents,
        tokens=tokens,
        sparsity=sum(by_layer) / layers,
        sparsity_by_layer=by_layer,
        kl=kl / tokens,
        top1_agreement=agreed / tokens,
        perplexity=math.exp(student_nll / tokens),
        teacher_perplexity=math.exp(teacher_nll / tokens),
    )


def common_prefix(documents: Sequence[Sequence[int]]) -> int:
    """Length of the opening that all documents share (the template's header), at least 1."""
    if len(documents) < 2:
        return 1
    shortest = min(len(document) for document in documents)
    for i in range(shortest):
        if len({document[i] for document in documents}) > 1:
            return max(1, i)
    return max(1, shortest)


def named_sets(
    chats: Sequence[Sequence[int]], texts: Sequence[Sequence[int]]
) -> list[tuple[str, Sequence[Sequence[int]], int]]:
    """What is reported apart: its name, its documents, how many tokens open each as context."""
    sets = [
        ("chats", chats, 1),
        ("chats, after the opening", chats, common_prefix(chats)),
        ("texts", texts, 1),
    ]
    return [(name, documents, skip) for name, documents, skip in sets if documents]


@dataclass(frozen=True)
class Allowance:
    """What thresholds may cost, measured from the smallest one that is tried."""

    kl_increase: float  # nats per token
    ppl_increase: float | None = None  # a share: 0.01 is one percent

    def permits(self, quality: Quality, start: Quality) -> bool:
        dearer = quality.perplexity / start.perplexity - 1
        return quality.kl <= start.kl + self.kl_increase and (
            self.ppl_increase is None or dearer <= self.ppl_increase
        )


def search_threshold(
    student: Llama,
    teacher: Llama,
    documents: Sequence[Sequence[int]],
    allowance: Allowance,
    candidates: Sequence[float],
    skip: int = 1,
    on_candidate: Callable[[float, Quality], None] = lambda t, q: None,
) -> tuple[float, list[tuple[float, Quality]]]:
    """Largest FATReLU threshold, the same for all layers, that costs no more than is allowed.

    Step 3 of ProSparse: thresholds are tried in rising order until one breaks the bound. The
    documents must be neither trained on nor reported on.
    """
    ordered = sorted(candidates)
    tried: list[tuple[float, Quality]] = []
    best = ordered[0]
    for threshold in ordered:
        student.set_thresholds([threshold] * student.shape.num_layers)
        quality = compare(student, teacher, documents, skip)
        tried.append((threshold, quality))
        on_candidate(threshold, quality)
        if not allowance.permits(quality, tried[0][1]):
            break
        best = threshold
    student.set_thresholds([best] * student.shape.num_layers)
    return best, tried
