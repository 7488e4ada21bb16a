"""`hotneuron bench`: decode speed of every mode at several batch sizes, in one run."""

import json
from contextlib import ExitStack
from typing import Annotated, Any

import typer

from .. import options
from ..console import UserError, note
from ..peer import transformers_process

MODES = ("dense", "exact", "predicted")


def bench(
    model: options.ModelArgument = "default",
    batch: Annotated[str, typer.Option(help="Batch sizes, separated by commas.")] = "1,2,4,8",
    modes: Annotated[
        str | None,
        typer.Option(help="Modes, separated by commas; all that the model allows if unset."),
    ] = None,
    transformers: Annotated[
        bool, typer.Option("--transformers", help="Also time `generate` of transformers.")
    ] = False,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 32,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens timed per sequence.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; the median counts.")] = 3,
    device: options.DeviceOption = "auto",
    vram_budget: options.VramOption = None,
    threads: options.ThreadsOption = None,
    dtype: options.DtypeOption = options.Dtype.auto,
    weights: options.WeightsOption = options.Weights.auto,
    kernels: options.KernelsOption = options.Kernels.auto,
    as_json: options.JsonOption = False,
) -> None:
    """Measure decode tokens/s: rounds visit every mode in turn, so drift hits all alike."""
    from runtime import EngineConfig

    from .. import benchmark
    from ..loading import find_model, load_engine

    sizes = parse_sizes(batch)
    folder = find_model(model)
    engine = load_engine(
        EngineConfig(
            model_dir=folder,
            device=device,
            dtype=dtype.value,
            weights=weights.value,
            threads=threads,
            vram_budget_bytes=vram_budget,
            max_batch=max(sizes),
            audit_rate=0.0,
            kernels=kernels.value,
        )
    )
    wanted = parse_modes(modes, benchmark.available_modes(engine))
    prompt = benchmark.prompt_ids(folder, prompt_tokens)
    runners = benchmark.engine_runners(engine, wanted, prompt, new_tokens)
    with ExitStack() as stack:
        if transformers:
            job = benchmark.transformers_job(folder, prompt, new_tokens, engine)
            runners["transformers"] = stack.enter_context(transformers_process(job))
        rows = benchmark.measure(runners, sizes, repeats, note)
    result = benchmark.describe(model, engine, prompt, new_tokens, repeats, rows)
    if as_json:
        typer.echo(json.dumps(result, indent=2))
    else:
        print_table(result)


def parse_sizes(text: str) -> list[int]:
    """'1,2,4' -> [1, 2, 4]."""
    try:
        sizes = [int(word) for word in text.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1:
        raise UserError(f"--batch takes positive numbers such as 1,2,4,8; got {text!r}")
    return sizes


def parse_modes(text: str | None, available: tuple[str, ...]) -> tuple[str, ...]:
    """The modes asked for, each of which the model must allow."""
    if text is None:
        return available
    asked = tuple(word.strip() for word in text.split(","))
    for mode in asked:
        if mode not in MODES:
            raise UserError(f"--modes takes {', '.join(MODES)}; got {mode!r}")
        if mode not in available:
            raise UserError(
                f"this model cannot run in the mode {mode}, only in: {', '.join(available)}. "
                "exact needs a ReLU model; predicted also needs `train-predictors`"
            )
    return asked


def print_table(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Decode tokens/s of {result['model']['name']} (median of rounds)")
    names = list(dict.fromkeys(row["mode"] for row in result["results"]))
    table.add_column("batch", justify="right")
    for name in names:
        table.add_column(name, justify="right")
    for size in dict.fromkeys(row["batch"] for row in result["results"]):
        speeds = {r["mode"]: r for r in result["results"] if r["batch"] == size}
        table.add_row(str(size), *(f"{speeds[name]['tokens_per_s']:.1f}" for name in names))
    Console().print(table)
