"""`hotneuron place`: what would live on the accelerator, and what that is worth, before serving."""

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import options
from ..console import UserError, note
from ..units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from runtime.budget import Ledger, Needs
    from runtime.planner import Plan, Planner
    from runtime.workload import MachineCosts

MEASURED_TOKENS = 16
# What data sheets say of a desktop GPU beside a dual-channel host: where nothing was measured.
ESTIMATES = {"hot": parse_bytes("600GB"), "cold": parse_bytes("40GB"), "link": parse_bytes("20GB")}
SYNC_US = 20.0


def place(
    model: options.ModelArgument = "default",
    vram_budget: Annotated[
        int,
        typer.Option(parser=parse_bytes, metavar="SIZE", help="Accelerator memory in all."),
    ] = parse_bytes("4GiB"),
    kv_tokens: Annotated[
        int, typer.Option(min=8, help="Cached tokens of all requests together.")
    ] = 8192,
    max_batch: Annotated[int, typer.Option(min=1, help="Most requests per step.")] = 16,
    sparsity: options.SparsityOption = options.Mode.auto,
    device: options.DeviceOption = "auto",
    hot_bandwidth: Annotated[
        int | None,
        typer.Option(
            parser=parse_bytes,
            metavar="SIZE",
            help="Accelerator bytes per second; measured if there is one, else 600GB.",
        ),
    ] = None,
    cold_bandwidth: Annotated[
        int | None,
        typer.Option(
            parser=parse_bytes,
            metavar="SIZE",
            help="Host bytes per second; measured if there is an accelerator, else 40GB.",
        ),
    ] = None,
    link_bandwidth: Annotated[
        int | None,
        typer.Option(
            parser=parse_bytes,
            metavar="SIZE",
            help="Bytes per second from host to accelerator; measured if there is one, else 20GB.",
        ),
    ] = None,
    sync_us: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Microseconds to hand over a vector and join, per layer; measured if there is an "
            "accelerator, else 20.",
        ),
    ] = None,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure",
            help="Also load the model as planned and print predicted against measured. Without a "
            "GPU the CPU stands in for the accelerator, with its own costs.",
        ),
    ] = False,
    measure_again: Annotated[
        bool, typer.Option("--measure-again", help="Measure this machine anew.")
    ] = False,
    dtype: options.DtypeOption = options.Dtype.auto,
    threads: options.ThreadsOption = None,
    out: Annotated[
        Path | None, typer.Option(help="Save the placement here, for `serve --placement`.")
    ] = None,
    as_json: options.JsonOption = False,
) -> None:
    """Plan the split of neurons and layers between accelerator and host."""
    from predictor import fingerprint
    from runtime import EngineConfig
    from runtime.budget import ledger_of, planner_within
    from runtime.build import needs_of, read_profile

    from ..loading import find_model

    folder = find_model(model)
    config = EngineConfig(
        folder, mode=sparsity.value, device=device, dtype=dtype.value, threads=threads,
        kv_tokens=kv_tokens, max_batch=max_batch,
    ).resolved()  # fmt: skip
    profile = read_profile(folder)
    if profile is None:
        raise UserError(
            f"{folder} has no activation profile: record one with `train-predictors {model}`"
        )
    needs = needs_of(config)
    workload = needs.workload(profile)
    costs = costs_of(config, needs, workload.active_share, measure, measure_again)
    given: dict[str, Any] = {
        "hot_bytes_per_s": hot_bandwidth,
        "cold_bytes_per_s": cold_bandwidth,
        "host_bytes_per_s": cold_bandwidth,
        "link_bytes_per_s": link_bandwidth,
        "sync_s": None if sync_us is None else 1e-6 * sync_us,
    }
    costs = replace(costs, **{name: value for name, value in given.items() if value is not None})
    planner = planner_within(needs, workload, costs, vram_budget)
    plan = planner.best()
    ledger = ledger_of(needs, workload, plan, vram_budget)
    summary = {
        "model": model,
        "vram_budget_bytes": vram_budget,
        "profile_tokens": profile.num_tokens,
        **summarize(planner, plan, ledger),
    }
    if measure:
        summary["measured_tokens_per_s"] = measure_plans(config, needs, planner, plan)
    if as_json:
        typer.echo(json.dumps(summary))
    else:
        print_tables(summary)
    if out is not None:
        plan.placement.save(out, fingerprint(folder))
        note(f"saved {out}")


def costs_of(
    config: Any, needs: "Needs", active_share: float, measure: bool, again: bool
) -> "MachineCosts":
    """Measured where there is an accelerator, or where plans are to be compared with it."""
    import torch

    from runtime.workload import MachineCosts

    if config.device == "cpu" and not measure:
        host, sync_s = ESTIMATES["cold"], 1e-6 * SYNC_US
        return MachineCosts(ESTIMATES["hot"], host, host, ESTIMATES["link"], sync_s)
    from runtime.accelerator import new_accelerator
    from runtime.measure import machine_rates

    note("measuring this machine, once")
    accelerator = new_accelerator(torch.device(config.device))
    return machine_rates(accelerator, needs.config.d_model, again=again).costs(active_share)


def summarize(planner: "Planner", plan: "Plan", ledger: "Ledger") -> dict[str, Any]:
    """The plan, layer by layer, and what it and the others are expected to give."""
    workload, placement = planner.workload, plan.placement
    layers = [
        {
            "layer": layer,
            "home": home,
            "hot_neurons": hot,
            "hot_share": hot / len(row),
            "activations_on_hot": float(row[:hot].sum() / row.sum()) if row.sum() else 0.0,
            "modelled_us": 1e6 * planner.layer_seconds(layer, hot, home),
        }
        for layer, (row, hot, home) in enumerate(
            zip(workload.sorted_LF, placement.num_hot_L, placement.home_L, strict=True)
        )
    ]
    whole = planner.all_accelerator()
    hot = sum(placement.num_hot_L)
    total = workload.num_layers * workload.num_neurons
    return {
        "costs": "measured" if planner.costs.is_measured else "estimated",
        "mode": workload.mode,
        "hot_neurons": hot,
        "hot_bytes": hot * workload.neuron_bytes,
        "cold_bytes": (total - hot) * workload.neuron_bytes,
        "fixed_bytes": ledger.budget - planner.budget,
        "vram": dict(ledger.entries),
        "predicted_tokens_per_s": {
            "this plan": 1 / plan.seconds,
            "all on the accelerator": None if whole is None else 1 / whole.seconds,
            "split by layers": 1 / planner.split_by_layers().seconds,
            "all on the CPU": 1 / planner.cpu_seconds(),
        },
        "layers": layers,
    }


def measure_plans(
    config: Any, needs: "Needs", planner: "Planner", plan: "Plan"
) -> dict[str, float | None]:
    """Decode speed at batch 1 of the same plans, loaded one after the other."""
    from runtime.build import load_model
    from runtime.speed import measure_decode, random_prompt

    whole = planner.all_accelerator()
    plans: dict[str, tuple[str, Plan | None] | None] = {
        "this plan": (config.device, plan),
        "all on the accelerator": None if whole is None else (config.device, whole),
        "split by layers": (config.device, planner.split_by_layers()),
        "all on the CPU": ("cpu", None),
    }
    prompt = random_prompt(needs.config.vocab_size, 16)
    found: dict[str, float | None] = {}
    for name, which in plans.items():
        found[name] = None
        if which is not None:
            note(f"measuring {name}")
            placement = None if which[1] is None else which[1].placement
            model = load_model(replace(config, device=which[0]), needs, placement)
            speed = measure_decode(model, needs.mode, 1, prompt, MEASURED_TOKENS)
            found[name] = speed["tokens_per_s"]
    return found


def print_tables(summary: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(
        title=f"Placement of {summary['model']} within {format_bytes(summary['vram_budget_bytes'])}"
    )
    names = ("layer", "attention", "hot neurons", "hot share", "activations on hot", "modelled us")
    for name in names:
        table.add_column(name, justify="right")
    for row in summary["layers"]:
        table.add_row(
            str(row["layer"]), row["home"], str(row["hot_neurons"]), f"{row['hot_share']:.1%}",
            f"{row['activations_on_hot']:.1%}", f"{row['modelled_us']:.1f}",
        )  # fmt: skip
    console.print(table)
    memory = ", ".join(f"{name} {format_bytes(size)}" for name, size in summary["vram"].items())
    console.print(f"accelerator memory: {memory}", highlight=False)
    speeds = Table(title=f"Tokens per second, mode {summary['mode']}, batch 1")
    measured = summary.get("measured_tokens_per_s")
    for name in ("plan", "predicted", *(("measured",) if measured else ())):
        speeds.add_column(name, justify="left" if name == "plan" else "right")
    for name, predicted in summary["predicted_tokens_per_s"].items():
        values = [predicted, *((measured[name],) if measured else ())]
        shown = ["does not fit" if value is None else f"{value:.1f}" for value in values]
        speeds.add_row(name, *shown)
    console.print(speeds)
    console.print(
        f"costs of the machine {summary['costs']}; profile of {summary['profile_tokens']} tokens",
        highlight=False,
    )
