"""`hotneuron report`: what the predictors find and miss, at which speed; with --out, as files."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import options
from ..console import note


def report(
    model: options.ModelArgument = "default",
    data: Annotated[
        list[Path] | None,
        typer.Option(
            help="Chats or texts (.jsonl, .txt, .md, folders) to measure on now; repeatable. "
            "Chats and texts are reported apart.",
            exists=True,
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Stop after about this many tokens of chats, and of texts."),
    ] = None,
    dense: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Also compare with this dense original on --data: KL, top-1, perplexity. "
            "`default` is the default model's.",
        ),
    ] = None,
    bench: Annotated[
        bool, typer.Option("--bench", help="Also time dense, exact and predicted at batch 1.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Write report.json, report.md and the plots (PNG, SVG) here."
        ),
    ] = None,
    as_json: options.JsonOption = False,
) -> None:
    """Report sparsity, recall, speed and quality, as a paper would: tables, and with --out plots.

    Without --data the figures are those that `train-predictors` measured on held-out documents.
    With it they are measured now, on the assistant's tokens of chats and all tokens of texts, by
    the definitions of the dashboard. A column that was not measured is "-", with the command that
    measures it; nothing is estimated.

    A report to cite: hotneuron report MODEL --data chats.jsonl --data texts.jsonl --dense ORIGINAL
    --bench --out report/
    """
    if dense and not data:
        raise typer.BadParameter(
            "give the documents to compare on with --data", param_hint="--dense"
        )
    from ..loading import find_model
    from ..reporting.build import build_report
    from ..reporting.files import prepare_folder, write_report
    from ..reporting.stored import read_stored

    folder = find_model(model)
    stored = read_stored(folder, model)
    if out:
        prepare_folder(out)
    result = build_report(
        folder,
        model,
        stored,
        data=data or (),
        max_tokens=max_tokens,
        dense=dense,
        bench=bench,
        out=out,
    )
    if out:
        write_report(out, result, stored)
        note(f"written: {out}")
    if as_json:
        typer.echo(json.dumps(result, indent=2))
    else:
        print_tables(result)


def print_tables(result: dict[str, Any]) -> None:
    """The panels of the main table with their footnotes, then every layer of every set."""
    from rich.console import Console

    from ..reporting.table import LAYER, PANELS, footnotes, panel_rows

    console = Console()
    for title, columns in PANELS.items():
        _print(console, title, columns, panel_rows(columns, result["table"]))
        for line in footnotes(columns, result["missing"]):
            console.print(line, highlight=False, markup=False)
    for one in result["sets"]:
        mean = one["result"]["mean"]
        _print(console, f"Layers, {one['name']} ({one['source']})", LAYER, one["result"]["layers"])
        if interval := mean.get("recall_ci95"):
            low, high = interval
            console.print(f"mean recall, 95 % interval: {low:.2%} to {high:.2%}", highlight=False)


def _print(console: Any, title: str, columns: Any, rows: Any) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(
        title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 0), pad_edge=False
    )
    for column in columns:
        table.add_column(column.heading.replace(" ", "\n"), justify="right")
    for row in rows:
        table.add_row(*(column.cell(row) for column in columns))
    console.print(table)
