"""Before anything is timed: `exact` must give the greedy tokens of `dense`."""

from typing import Any

from runtime.model import Model


def greedy(model: Model, mode: Any, prompt: list[int], num_tokens: int) -> list[int]:
    """The likeliest token at each step, without an engine around the model."""
    cache = model.new_cache(len(prompt) + num_tokens)
    ids = [int(model.prefill(prompt, cache, mode).argmax())]
    while len(ids) < num_tokens:
        ids.append(int(model.decode(ids[-1:], [cache], mode)[0].argmax()))
    return ids
