"""From logits to tokens. Knows sampling parameters and tokens so far, not models or queues.

Order per row: penalties, logit bias, banned end tokens (min_tokens), the request's token mask;
temperature; top-k; top-p on what is left; min-p relative to the likeliest. Then one uniform number
of the request's own generator picks by inverse CDF, so a seeded answer does not depend on its batch
mates. Greedy rows cost one argmax for the whole batch. Log probabilities are of the raw logits,
before all of this.
Dimensions: N sequences, V vocabulary.
"""

import secrets
from collections import Counter
from collections.abc import Sequence as Rows

import torch
from torch import Tensor

from .errors import TokenMaskFailed
from .sequence import Sample, SamplingParams, Sequence, TokenLogprobs
from .token_mask import accept, allowed_tokens
from .torch_ops import argmax

TOP_P_GUESS = 256  # candidates looked at before sorting a whole vocabulary
PROMPT_ROWS = 256  # rows of prompt log probabilities at a time


class Sampler:
    """Stateless but for the end-of-text tokens of the model."""

    def __init__(self, eos_token_ids: tuple[int, ...]) -> None:
        self._eos_token_ids = eos_token_ids

    def stop_ids(self, sampling: SamplingParams) -> set[int]:
        """Tokens that end this request."""
        eos = () if sampling.ignore_eos else self._eos_token_ids
        return {*eos, *sampling.stop_token_ids}

    @torch.inference_mode()
    def sample(self, logits_NV: Tensor, sequences: Rows[Sequence]) -> list[Sample]:
        """One token for each row; a row that is not a number, or whose token mask fails, ends its
        own request, not the batch."""
        greedy_N = argmax(logits_NV)
        best_N = logits_NV.gather(1, greedy_N[:, None])[:, 0]
        finite = torch.isfinite(best_N).tolist()
        greedy = greedy_N.tolist()
        samples = []
        for n, sequence in enumerate(sequences):
            if not finite[n]:
                samples.append(Sample(None, error="the model's logits are not finite"))
                continue
            sampling, mask = sequence.sampling, sequence.request.token_mask
            try:
                if sampling.is_greedy and not sampling.changes_logits and mask is None:
                    token_id = int(greedy[n])
                else:
                    token_id = self._pick(logits_NV[n].cpu(), sequence)
                ends = mask is not None and accept(mask, token_id)
            except TokenMaskFailed as error:
                samples.append(Sample(None, error=str(error), is_mask_error=True))
                continue
            logprobs = None
            if sampling.num_logprobs is not None:
                logprobs = token_logprobs(
                    logits_NV[n : n + 1], torch.tensor([token_id]), sampling.num_logprobs
                )[0]
            samples.append(Sample(token_id, logprobs, ends_answer=ends))
        return samples

    def _pick(self, logits_V: Tensor, sequence: Sequence) -> int:
        sampling = sequence.sampling
        if sampling.changes_logits:
            logits_V = self._adjusted(logits_V, sequence)
        if sequence.request.token_mask is not None:
            logits_V = _masked(logits_V, allowed_tokens(sequence.request.token_mask, len(logits_V)))
        if sampling.is_greedy:
            return int(logits_V.argmax())
        if sequence.generator is None:
            sequence.generator = _generator(sampling.seed)
        uniform = torch.rand(1, generator=sequence.generator, dtype=torch.float64)
        ids, probs = candidates(logits_V, sampling)
        cumulative = probs.double().cumsum(0)
        index = int(torch.searchsorted(cumulative, uniform * cumulative[-1], right=True))
        index = min(index, len(probs) - 1)
        return index if ids is None else int(ids[index])

    def _adjusted(self, logits_V: Tensor, sequence: Sequence) -> Tensor:
        """Penalties and biases on a copy. Repetition looks at the prompt too, the others do not."""
        sampling = sequence.sampling
        logits_V = logits_V.clone()
        if sampling.repetition_penalty != 1.0:
            seen = torch.tensor(sorted({*sequence.request.prompt_ids, *sequence.output_ids}))
            score = logits_V[seen]
            penalty = sampling.repetition_penalty
            logits_V[seen] = torch.where(score > 0, score / penalty, score * penalty)
        if sequence.output_ids and (sampling.presence_penalty or sampling.frequency_penalty):
            counts = Counter(sequence.output_ids)
            seen, count = torch.tensor(list(counts)), torch.tensor(list(counts.values()))
            logits_V[seen] -= sampling.presence_penalty + sampling.frequency_penalty * count
        for token_id, bias in (sampling.logit_bias or {}).items():
            logits_V[token_id] += bias
        if sequence.num_output < sampling.min_tokens:
            banned = [i for i in self.stop_ids(sampling) if i < len(logits_V)]
            logits_V[banned] = -torch.inf
        return logits_V


def _masked(logits_V: Tensor, allowed_V: Tensor) -> Tensor:
    """-inf where a token is not allowed. Where all that is allowed is banned (the mask is at its
    end, and min_tokens is not reached), the mask wins."""
    masked_V = torch.where(allowed_V, logits_V, -torch.inf)
    if not bool(torch.isfinite(masked_V).any()):
        return torch.where(allowed_V, 0.0, -torch.inf)
    return masked_V


def candidates(logits_V: Tensor, sampling: SamplingParams) -> tuple[Tensor | None, Tensor]:
    """(token ids, probabilities up to a factor) that may be drawn; ids None means all, in order."""
    scaled_V = logits_V / sampling.temperature
    V = len(scaled_V)
    top_k = min(sampling.top_k or V, V)
    if top_k == V and sampling.top_p == 1.0:
        probs_V = torch.softmax(scaled_V, -1)
        if sampling.min_p > 0.0:
            probs_V = torch.where(probs_V >= sampling.min_p * probs_V.max(), probs_V, 0.0)
        return None, probs_V
    if top_k < V:
        top, ids = scaled_V.topk(top_k)
        probs = torch.softmax(top, -1)
    else:
        probs, ids = _head_of(torch.softmax(scaled_V, -1), sampling.top_p)
    # keep the smallest head whose mass reaches top_p: a token stays if the mass before it is less
    before = probs.double().cumsum(0) - probs.double()
    keep = (before < sampling.top_p) & (probs >= sampling.min_p * probs[0])
    keep[0] = True
    return ids[keep], probs[keep]


def _head_of(probs_V: Tensor, mass: float) -> tuple[Tensor, Tensor]:
    """The likeliest tokens, in order, until their mass is reached; rarely the whole vocabulary."""
    guess = min(TOP_P_GUESS, len(probs_V))
    probs, ids = probs_V.topk(guess)
    if guess < len(probs_V) and float(probs.double().sum()) < mass:
        probs, ids = probs_V.sort(descending=True)
    return probs, ids


def token_logprobs(logits_NV: Tensor, ids_N: Tensor, num_top: int) -> list[TokenLogprobs]:
    """Log probability of the given token of each row, and of the `num_top` likeliest."""
    logprob_NV = torch.log_softmax(logits_NV.float(), -1)
    chosen_N = logprob_NV.gather(1, ids_N.to(logits_NV.device)[:, None])[:, 0].tolist()
    top_value, top_id = logprob_NV.topk(num_top, dim=-1)
    rows = zip(ids_N.tolist(), chosen_N, top_id.tolist(), top_value.tolist(), strict=True)
    return [
        TokenLogprobs(token_id, logprob, tuple(zip(ids, values, strict=True)))
        for token_id, logprob, ids, values in rows
    ]


def prompt_logprobs(
    logits_NV: Tensor, following_ids: tuple[int, ...], num_top: int
) -> list[TokenLogprobs]:
    """Of the token that follows each position; the prompt's last position has none."""
    result: list[TokenLogprobs] = []
    ids = torch.tensor(following_ids)
    for start in range(0, len(ids), PROMPT_ROWS):
        part = ids[start : start + PROMPT_ROWS]
        result += token_logprobs(logits_NV[start : start + len(part)], part, num_top)
    return result


def _generator(seed: int | None) -> torch.Generator:
    value = secrets.randbits(63) if seed is None else seed % (1 << 63)
    return torch.Generator().manual_seed(value)
