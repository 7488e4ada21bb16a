"""`hotneuron report`: recall and sparsity per layer, as stored with the predictors or measured."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import options
from ..console import UserError

COLUMNS = {
    "natural_sparsity": "natural",
    "predicted_sparsity": "predicted",
    "recall": "recall",
    "energy_recall": "energy recall",
    "precision": "precision",
}


def report(
    model: options.ModelArgument = "default",
    data: Annotated[
        list[Path] | None,
        typer.Option(
            help="Chats or texts (.jsonl, .txt, .md, folders) to measure on.", exists=True
        ),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Stop after about this many tokens.")
    ] = None,
    as_json: options.JsonOption = False,
) -> None:
    """Show what the predictors find and miss, layer by layer.

    With --data it is measured now, on the assistant's tokens of these texts, by the definitions of
    the dashboard. Without, it is what `train-predictors` measured on held-out texts.
    """
    from ..loading import find_model

    folder = find_model(model)
    if data:
        from training_predictors.report import evaluate

        result = evaluate(folder, data, max_tokens=max_tokens)
        source = f"measured now on {result['documents']} documents"
    else:
        result = read_stored(folder, model)
        source = "measured by train-predictors on held-out documents"
    if as_json:
        typer.echo(json.dumps(result, indent=2))
    else:
        print_table(model, source, result)


def read_stored(folder: Path, model: str) -> dict[str, Any]:
    """The report that was written when the predictors were trained."""
    path = folder / "sparsity" / "report.json"
    if not path.is_file():
        raise UserError(
            f"{folder} has no stored report: train predictors with `train-predictors {model}`, or "
            "give --data to measure those that are there"
        )
    stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return stored


def print_table(model: str, source: str, result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{value:.1%}"

    table = Table(title=f"{model}: {source}")
    for name in ("layer", *COLUMNS.values(), "tokens"):
        table.add_column(name, justify="right")
    for row in result["layers"]:
        shares = [percent(row[key]) for key in COLUMNS]
        table.add_row(str(row["layer"]), *shares, str(row["tokens"]))
    table.add_section()
    mean = result["mean"]
    table.add_row("mean", *[percent(mean[key]) for key in COLUMNS], str(mean["tokens"]))
    console = Console()
    console.print(table)
    if interval := mean.get("recall_ci95"):
        low, high = interval
        console.print(f"mean recall, 95 % interval: {low:.2%} to {high:.2%}", highlight=False)
