"""Task scores: which of the choices a model finds likeliest, and whether it produces an answer.

Choices are compared by the log-probability of their tokens after the context, as evaluation
harnesses do; an item with a single choice counts when greedy decoding would give exactly its
tokens. Sparse and dense model go through the same code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from .modeling import Llama
from .task import Item, Task

BATCH_TOKENS = 4096  # of a padded batch
LOGIT_ROWS = 512  # positions whose logits exist at once


class Scored(NamedTuple):
    """Of one continuation: log-probability in nats, and whether greedy decoding gives it."""

    log_probability: float
    greedy: bool


@dataclass(frozen=True)
class TaskScore:
    """Share of right answers of one task; `stderr` is the standard error of a mean of 0s and 1s."""

    task: str
    chance: float
    correct: tuple[bool, ...]

    @property
    def accuracy(self) -> float:
        return sum(self.correct) / len(self.correct)

    @property
    def stderr(self) -> float:
        p = self.accuracy
        return math.sqrt(p * (1 - p) / max(1, len(self.correct) - 1))

    def as_dict(self) -> dict[str, Any]:
        return {
            "accuracy": self.accuracy,
            "stderr": self.stderr,
            "chance": self.chance,
            "items": len(self.correct),
        }


def mean_score(scores: Sequence[TaskScore]) -> dict[str, float]:
    """Plain mean over tasks of accuracy and chance, and the standard error of the former."""
    count = len(scores)
    return {
        "accuracy": sum(score.accuracy for score in scores) / count,
        "stderr": math.sqrt(sum(score.stderr**2 for score in scores)) / count,
        "chance": sum(score.chance for score in scores) / count,
    }


def paired_difference(a: TaskScore, b: TaskScore) -> tuple[float, float]:
    """Accuracy of a minus b's, and its standard error over items (both answered the same ones)."""
    steps = [int(x) - int(y) for x, y in zip(a.correct, b.correct, strict=True)]
    mean = sum(steps) / len(steps)
    squares = sum((step - mean) ** 2 for step in steps)
    return mean, math.sqrt(squares / max(1, len(steps) - 1) / len(steps))


def mean_difference(a: Sequence[TaskScore], b: Sequence[TaskScore]) -> tuple[float, float]:
    """The same of the mean over tasks."""
    pairs = [paired_difference(x, y) for x, y in zip(a, b, strict=True)]
    return (
        sum(step for step, _ in pairs) / len(pairs),
        math.sqrt(sum(error**2 for _, error in pairs)) / len(pairs),
    )


class _Row(NamedTuple):
    """Tokens to run, and which continuations to read off them."""

    ids: tuple[int, ...]
    spans: list[tuple[int, int, tuple[int, ...]]]  # continuation, position of first token, tokens


def _rows(pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[_Row]:
    """Rows that hold every context and continuation but its last token.

    Attention is causal, so what is a prefix of another row is read off that row: the choices of an
    item that are one token long share one row.
    """
    inputs = [(*context, *continuation[:-1]) for context, continuation in pairs]
    order = sorted(range(len(pairs)), key=lambda i: inputs[i], reverse=True)
    rows: list[_Row] = []
    for i in order:
        # in sorted order, what a prefix is a prefix of stands right behind it
        if not rows or rows[-1].ids[: len(inputs[i])] != inputs[i]:
            rows.append(_Row(inputs[i], []))
        context, continuation = pairs[i]
        rows[-1].spans.append((i, len(context) - 1, tuple(continuation)))
    return sorted(rows, key=lambda row: len(row.ids))


def _batches(rows: list[_Row], batch_tokens: int) -> list[list[_Row]]:
    """Rows of rising length, cut where a padded batch would hold more than `batch_tokens`."""
    batches: list[list[_Row]] = []
    for row in rows:
        if not batches or (len(batches[-1]) + 1) * len(row.ids) > batch_tokens:
            batches.append([])
        batches[-1].append(row)
    return batches


@torch.no_grad()
def score_continuations(
    model: Llama,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    batch_tokens: int = BATCH_TOKENS,
) -> list[Scored]:
    """One `Scored` for each (context ids, continuation ids); both must not be empty."""
    if not all(context and continuation for context, continuation in pairs):
        raise ValueError("a context or a continuation has no token")
    log_probability, greedy = [0.0] * len(pairs), [True] * len(pairs)
    for batch in _batches(_rows(pairs), batch_tokens):
        ids_BS = torch.zeros(len(batch), len(batch[-1].ids), dtype=torch.long)
        for b, row in enumerate(batch):
            ids_BS[b, : len(row.ids)] = torch.tensor(row.ids)
        last_BSD = model.hidden(ids_BS.to(model.device))[0][-1]
        wanted = [
            (b, position + step, token, index)
            for b, row in enumerate(batch)
            for index, position, tokens in row.spans
            for step, token in enumerate(tokens)
        ]
        for start in range(0, len(wanted), LOGIT_ROWS):
            some = wanted[start : start + LOGIT_ROWS]
            rows_N, places_N, tokens_N, _ = torch.tensor(some, device=model.device).unbind(1)
            logits_NV = model.logits(last_BSD[rows_N, places_N])
            own_N = logits_NV.gather(1, tokens_N[:, None])[:, 0]
            shares_N = (own_N - logits_NV.logsumexp(-1)).tolist()
            best_N = (logits_NV.argmax(-1) == tokens_N).tolist()
            for (_, _, _, index), share, best in zip(some, shares_N, best_N, strict=True):
                log_probability[index] += share
                greedy[index] &= best
    return [Scored(*pair) for pair in zip(log_probability, greedy, strict=True)]


def render(task: Task, item: Item, tokenizer: Any) -> list[tuple[list[int], list[int]]]:
    """(context ids, choice ids) of every choice; encoded apart, so that the context's tokens are
    the same for all."""
    context = item.context
    if task.chat:
        asked = [{"role": "user", "content": context}]
        context = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    context_ids = encode(context)
    return [(context_ids, encode(choice)) for choice in item.choices]


def run_task(
    model: Llama, tokenizer: Any, task: Task, batch_tokens: int = BATCH_TOKENS
) -> TaskScore:
    """Score every item of a task."""
    pairs = [pair for item in task.items for pair in render(task, item, tokenizer)]
    scored = iter(score_continuations(model, pairs, batch_tokens))
    correct = []
    for item in task.items:
        values = [next(scored) for _ in item.choices]
        if task.greedy:
            correct.append(values[0].greedy)
            continue
        lengths = [len(choice) if task.per_character else 1 for choice in item.choices]
        rated = [value.log_probability / n for value, n in zip(values, lengths, strict=True)]
        correct.append(rated.index(max(rated)) == item.answer)
    return TaskScore(task.name, task.chance, tuple(correct))


def run_tasks(
    model: Llama,
    tokenizer: Any,
    tasks: Sequence[Task],
    on_task: Callable[[TaskScore], None] = lambda score: None,
) -> list[TaskScore]:
    """Score every task; `on_task` is told of each as it ends."""
    scores = []
    for task in tasks:
        scores.append(run_task(model, tokenizer, task))
        on_task(scores[-1])
    return scores
