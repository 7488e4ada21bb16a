"""The `usage` of a reply: tokens, and for those who ask what the sparse FFNs did."""

from collections.abc import Sequence
from typing import Any

from runtime.sequence import Usage as EngineUsage

from .generation import Generation
from .replies import CompletionTokensDetails, PromptTokensDetails, SparsityUsage, Usage
from .schemas import SparsityOptions

MEASURED = ("natural_sparsity", "predicted_sparsity", "recall", "energy_recall", "precision")


def usage_of(generation: Generation, asked: SparsityOptions | None) -> Usage:
    """What the request has used so far. `sparsity` is there only for those who asked for it."""
    prompt, completion = generation.num_prompt_tokens, generation.num_completion_tokens
    usage = Usage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=generation.num_cached_tokens),
        completion_tokens_details=CompletionTokensDetails(reasoning_tokens=0),
    )
    if asked is not None and generation.usages:
        usage.sparsity = sparsity_of(generation.usages)
    return usage


def sparsity_of(usages: Sequence[EngineUsage]) -> SparsityUsage:
    """Of several answers: means over all their audited tokens."""
    audits = [usage.audit for usage in usages if usage.audit]
    tokens = sum(audit["tokens"] for audit in audits)
    means: dict[str, Any] = {}
    for key in MEASURED:
        values = [(audit[key], audit["tokens"]) for audit in audits if audit[key] is not None]
        weight = sum(count for _, count in values)
        means[key] = sum(value * count for value, count in values) / weight if weight else None
    return SparsityUsage(mode=usages[0].mode, audited_tokens=tokens, **means)
