"""`hotneuron place`: which neurons would be hot, and what that is worth, before serving."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import options
from ..console import UserError, note
from ..units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from predictor import PredictorSet


def place(
    model: options.ModelArgument = "default",
    vram_budget: Annotated[
        int,
        typer.Option(parser=parse_bytes, metavar="SIZE", help="Accelerator memory in all."),
    ] = parse_bytes("4GiB"),
    kv_tokens: Annotated[
        int, typer.Option(min=8, help="Cached tokens that the accelerator holds as well.")
    ] = 8192,
    hot_bandwidth: Annotated[
        int, typer.Option(parser=parse_bytes, metavar="SIZE", help="Accelerator bytes per second.")
    ] = parse_bytes("600GB"),
    cold_bandwidth: Annotated[
        int, typer.Option(parser=parse_bytes, metavar="SIZE", help="Host bytes per second.")
    ] = parse_bytes("40GB"),
    sync_us: Annotated[
        float, typer.Option(min=0.0, help="Microseconds to hand over a vector and join, per layer.")
    ] = 20.0,
    dtype: options.DtypeOption = options.Dtype.auto,
    out: Annotated[
        Path | None, typer.Option(help="Save the placement here, for `serve --placement`.")
    ] = None,
    as_json: options.JsonOption = False,
) -> None:
    """Plan the split of neurons between accelerator and host from the activation profile."""
    import torch

    from predictor import ActivationProfile, fingerprint
    from predictor.profile import PROFILE_FILE
    from runtime import ModelConfig
    from runtime.build import fixed_bytes, neuron_bytes
    from runtime.placement import MachineCosts, plan_placement

    from ..loading import find_model

    folder = find_model(model)
    facts = ModelConfig.from_folder(folder)
    profile_path = folder / "sparsity" / PROFILE_FILE
    if not profile_path.is_file():
        raise UserError(
            f"{folder} has no activation profile: record one with `train-predictors {model}`"
        )
    profile = ActivationProfile.load(profile_path)
    weight_type = torch.float32 if dtype is options.Dtype.float32 else torch.bfloat16
    size = neuron_bytes(facts, weight_type)
    fixed = fixed_bytes(facts, weight_type, kv_tokens, read_predictors(folder))
    if vram_budget < fixed:
        raise UserError(
            f"{format_bytes(vram_budget)} does not hold attention, embeddings, predictors and "
            f"{kv_tokens} cached tokens ({format_bytes(fixed)}): raise --vram-budget or lower "
            "--kv-tokens"
        )
    costs = MachineCosts.estimate(size, hot_bandwidth, cold_bandwidth, sync_us * 1e-6)
    placement = plan_placement(
        profile.counts_LF, profile.num_tokens, size, vram_budget - fixed, costs
    )
    placement.check_fits(facts.num_layers, facts.num_neurons)
    summary = {
        "model": model,
        "vram_budget_bytes": vram_budget,
        "fixed_bytes": fixed,
        **summarize(placement, profile, size, costs),
    }
    if as_json:
        typer.echo(json.dumps(summary))
    else:
        print_table(summary)
    if out is not None:
        placement.save(out, fingerprint(folder))
        note(f"saved {out}")


def read_predictors(folder: Path) -> "PredictorSet | None":
    """The folder's predictors, if it has any: they too live on the accelerator."""
    from predictor import fingerprint, load_predictors
    from predictor.checkpoint import MANIFEST_FILE

    if not (folder / "sparsity" / MANIFEST_FILE).is_file():
        return None
    return load_predictors(folder / "sparsity", fingerprint=fingerprint(folder))


def summarize(placement: Any, profile: Any, neuron_bytes: int, costs: Any) -> dict[str, Any]:
    """Per layer: hot neurons, their share of all activations, modelled seconds per token."""
    import torch

    from runtime.placement import all_cold, layer_seconds, placement_seconds

    frequency_LF = profile.counts_LF.double() / max(1, profile.num_tokens)
    sorted_LF = torch.gather(frequency_LF, 1, placement.order_LF).numpy()
    layers = [
        {
            "layer": index,
            "hot_neurons": hot,
            "hot_share": hot / len(row),
            "activations_on_hot": float(row[:hot].sum() / row.sum()) if row.sum() else 0.0,
            "modelled_us": 1e6 * layer_seconds(row, hot, costs),
        }
        for index, (row, hot) in enumerate(zip(sorted_LF, placement.num_hot_L, strict=True))
    ]
    total, hot = frequency_LF.numel(), sum(placement.num_hot_L)
    cold = all_cold(*frequency_LF.shape)
    return {
        "profile_tokens": profile.num_tokens,
        "costs": "estimated from the given bandwidths" if not costs.is_measured else "measured",
        "hot_neurons": hot,
        "hot_bytes": hot * neuron_bytes,
        "cold_bytes": (total - hot) * neuron_bytes,
        "modelled_us_per_token": 1e6 * placement_seconds(frequency_LF, placement, costs),
        "modelled_us_per_token_all_cold": 1e6 * placement_seconds(frequency_LF, cold, costs),
        "layers": layers,
    }


def print_table(summary: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"Placement of {summary['model']} within {format_bytes(summary['vram_budget_bytes'])}"
    )
    for name in ("layer", "hot neurons", "hot share", "activations on hot", "modelled us"):
        table.add_column(name, justify="right")
    for row in summary["layers"]:
        table.add_row(
            str(row["layer"]),
            str(row["hot_neurons"]),
            f"{row['hot_share']:.1%}",
            f"{row['activations_on_hot']:.1%}",
            f"{row['modelled_us']:.1f}",
        )
    console = Console()
    console.print(table)
    console.print(
        f"attention, cache and predictors {format_bytes(summary['fixed_bytes'])}, "
        f"hot {format_bytes(summary['hot_bytes'])}, cold {format_bytes(summary['cold_bytes'])}; "
        f"FFN time per token {summary['modelled_us_per_token']:.0f} us against "
        f"{summary['modelled_us_per_token_all_cold']:.0f} us with all neurons cold "
        f"(modelled, costs {summary['costs']}, profile of {summary['profile_tokens']} tokens)",
        highlight=False,
    )
