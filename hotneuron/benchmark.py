"""Measuring decode speed: what is timed, in which order, and what goes into the result.

One run visits every mode and batch size in turn, several times, so that a slow spell of the
machine hits all alike. The engine times itself (`Engine.measure_speed`).
"""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import machine
from .peer import Job

if TYPE_CHECKING:
    from runtime import Engine

Runner = Callable[[int], float]  # batch size -> tokens/s
TEXT = "Tell me how a river finds its way from the mountains to the sea, and what lives in it. "


def available_modes(engine: "Engine") -> tuple[str, ...]:
    """What the model's files allow: exact needs a sparse activation, predicted also predictors."""
    if not engine.model_config.is_sparse:
        return ("dense",)
    return ("dense", "exact", "predicted") if engine.mode == "predicted" else ("dense", "exact")


def prompt_ids(folder: Path, num_tokens: int) -> list[int]:
    """Tokens of plain English: random ones make other neurons fire than text does."""
    from server import load_tokenizer

    tokenizer = load_tokenizer(folder)
    ids: list[int] = tokenizer(TEXT, add_special_tokens=False).input_ids
    return (ids * (num_tokens // len(ids) + 1))[:num_tokens]


def engine_runners(
    engine: "Engine", modes: Sequence[str], prompt: list[int], new_tokens: int
) -> dict[str, Runner]:
    """One runner per mode of our own engine."""

    def runner(mode: Any) -> Runner:
        def run(batch: int) -> float:
            result = engine.measure_speed(
                mode, batch=batch, new_tokens=new_tokens, prompt_ids=prompt
            )
            return float(result["tokens_per_s"])

        return run

    return {mode: runner(mode) for mode in modes}


def transformers_job(folder: Path, prompt: list[int], new_tokens: int, engine: "Engine") -> Job:
    """`generate` of transformers on the same folder, prompt, dtype, device and threads."""
    config = engine.config
    assert config.threads is not None, "the config is resolved"
    return Job(str(folder), prompt, new_tokens, config.dtype, config.device, config.threads)


def measure(
    runners: dict[str, Runner], sizes: Sequence[int], repeats: int, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Median, least and most tokens/s of each runner at each batch size."""
    speeds: dict[tuple[str, int], list[float]] = {}
    for round_number in range(1, repeats + 1):
        for size in sizes:
            for name, run in runners.items():
                speeds.setdefault((name, size), []).append(run(size))
        say(f"round {round_number} of {repeats} done")
    return [
        {
            "mode": name,
            "batch": size,
            "tokens_per_s": statistics.median(values),
            "tokens_per_s_min": min(values),
            "tokens_per_s_max": max(values),
        }
        for (name, size), values in speeds.items()
    ]


def describe(
    model: str,
    engine: "Engine",
    prompt: list[int],
    new_tokens: int,
    repeats: int,
    rows: list[dict[str, Any]],
) -> dict[str, Any]:
    """The result with everything that a reader needs to judge it."""
    report = engine.report()
    return {
        **machine.facts(),
        # without the folder: a result is shown to others, a path of this machine is not theirs
        "model": {key: value for key, value in report["model"].items() if key != "folder"}
        | {"name": model},
        "devices": report["devices"],
        "threads": report["threads"],
        "kernels": report["kernels"],
        "placement": report["placement"],
        "method": {
            "timed": "greedy decode steps after prefill and warm-up",
            "prompt_tokens": len(prompt),
            "new_tokens": new_tokens,
            "rounds": repeats,
            "order": "each round visits every batch size and mode in turn; the median counts",
        },
        "results": rows,
    }
