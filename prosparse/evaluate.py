"""How sparse a student is, and how far from its dense teacher, on held-out documents.

Documents stand alone, from position 0, as in serving. `skip` leaves out a fixed opening (a chat
template's header, which every model knows by heart): what is said of the rest is the stricter
number, and the command prints both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch

from .modeling import Llama


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
        ids_BS = torch.tensor([list(document)], device=student.device)
        at = slice(skip - 1, len(document) - 1)
        target_N = ids_BS[0, skip:]
        student_stream, _, zeros_LBS = student.hidden(ids_BS)
        teacher_stream, _, _ = teacher.hidden(ids_BS)
        student_NV = student.logits(student_stream[-1][0, at]).log_softmax(-1)
        teacher_NV = teacher.logits(teacher_stream[-1][0, at]).log_softmax(-1)
        kl += float((teacher_NV.exp() * (teacher_NV - student_NV)).sum())
        agreed += float((student_NV.argmax(-1) == teacher_NV.argmax(-1)).sum())
        student_nll -= float(student_NV.gather(1, target_N[:, None]).sum())
        teacher_nll -= float(teacher_NV.gather(1, target_N[:, None]).sum())
        zeros_L += zeros_LBS[:, 0, at].double().sum(-1).cpu()
        tokens += len(target_N)
        scored_documents += 1
        on_document()
    if tokens == 0:
        raise ValueError(f"no document is longer than {skip} tokens; nothing to score")
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


def with_threshold(model: Llama, threshold: float) -> Llama:
    """The same model under another FATReLU threshold (weights are shared)."""
    model.threshold = torch.tensor(threshold, dtype=model.embed_VD.dtype, device=model.device)
    return model


def search_threshold(
    student: Llama,
    teacher: Llama,
    documents: Sequence[Sequence[int]],
    max_kl_increase: float,
    candidates: Sequence[float],
    skip: int = 1,
    on_candidate: Callable[[float, Quality], None] = lambda t, q: None,
) -> tuple[float, list[tuple[float, Quality]]]:
    """Largest FATReLU threshold whose KL stays within `max_kl_increase` of the smallest's.

    Step 3 of ProSparse: thresholds are tried in rising order until one breaks the bound. The
    documents must be neither trained on nor reported on.
    """
    ordered = sorted(candidates)
    tried: list[tuple[float, Quality]] = []
    best = ordered[0]
    for threshold in ordered:
        quality = compare(with_threshold(student, threshold), teacher, documents, skip)
        tried.append((threshold, quality))
        on_candidate(threshold, quality)
        if quality.kl > tried[0][1].kl + max_kl_increase:
            break
        best = threshold
    with_threshold(student, best)
    return best, tried
