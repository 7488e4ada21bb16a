"""The report as Markdown that stands alone: tables, plots, and how everything was measured."""

from collections.abc import Mapping, Sequence
from typing import Any

from .table import (
    LAYER,
    PANELS,
    count,
    footnotes,
    four_digits,
    megabytes,
    panel_rows,
    percent,
    times,
)

WORDS = """\
A neuron is active on a token if its gate passes the activation's threshold. *Natural sparsity* is
the share of neurons that are not active, *predicted sparsity* the share that the predictor says to
skip. *Recall* is the share of a token's active neurons that the predictor found, *energy recall*
the same share weighted with (activation x norm of its column of down)^2; both are means over
tokens, then over layers. *Precision* is the share of selected neurons that are active. *Exact* mode
computes every gate and skips only zeros, *predicted* mode computes what the predictors select. KL
is in nats per token, *top-1* the share of tokens with the same most likely next token."""
NOT_DRAWN = "Not drawn: {source} is absent; `{command}` writes it."


def report_markdown(report: Mapping[str, Any]) -> str:
    """The whole report; the plots are linked by name, as they lie beside it."""
    parts = [f"# Sparsity of {report['model']['name']}", _facts(report), "## Main table"]
    for title, columns in PANELS.items():
        rows = panel_rows(columns, report["table"])
        cells = [[column.cell(row) for column in columns] for row in rows]
        parts += [f"**{title}**", markdown_table([c.heading for c in columns], cells)]
        if notes := footnotes(columns, report["missing"]):
            parts.append("\n".join(f"* {note}" for note in notes))
    parts.append(WORDS)
    if report["quality"]:
        parts += ["## Against the dense original", _quality(report["quality"])]
    if report["kinds"]:
        parts += ["## Kinds of predictors: energy recall %", _kinds(report["kinds"])]
    for one in report["sets"]:
        if baselines := one["result"]["mean"].get("baselines"):
            parts += [f"## Masks that do not look at the input, {one['name']}", _masks(baselines)]
    parts += ["## Plots", *_plots(report["figures"])]
    for one in report["sets"]:
        parts += [f"## Layers, {one['name']}", _layers(one["result"]["layers"])]
    parts += ["## How it was measured", _method(report)]
    return "\n\n".join(parts) + "\n"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Words to the left, numbers to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines
    )


def _facts(report: Mapping[str, Any]) -> str:
    model, predictors = report["model"], report["predictors"]
    text = (
        f"{model['num_layers']} layers of {model['num_neurons']:,} neurons, width "
        f"{model['d_model']:,}, activation {model['activation']}; fingerprint "
        f"`{model['fingerprint']}`. Predictors: {predictors['kind']}{_ranks(predictors['ranks'])}, "
        f"{megabytes(predictors['bytes'])} MB in all."
    )
    if found := report["coverage"]:
        share = found["share_of_neurons"]
        if share is not None:
            text += (
                f" {found['share_of_activations']:.0%} of activations come from "
                f"{share:.1%} of neurons."
            )
    return text


def _ranks(ranks: Sequence[int] | None) -> str:
    if not ranks:
        return ""
    low, high = min(ranks), max(ranks)
    return f" of rank {low}" if low == high else f" of ranks {low} to {high}"


def _quality(quality: Mapping[str, Any]) -> str:
    columns = {
        "documents": count,
        "tokens": count,
        "sparsity": percent,
        "kl": four_digits,
        "top1_agreement": percent,
        "perplexity": times,
        "teacher_perplexity": times,
    }
    headings = ["all tokens of", "documents", "tokens", "natural sparsity %", "KL", "top-1 %"]
    headings += ["perplexity", f"of {quality['dense']}"]
    rows = [
        [name, *(write(result[key]) for key, write in columns.items())]
        for name, result in quality["sets"].items()
    ]
    return markdown_table(headings, rows)


def _kinds(kinds: Mapping[str, Any]) -> str:
    """The first kind's shares head the columns; a cell that ties keep off one says its own."""
    shares = next(iter(kinds.values()))["predicted_sparsity"]

    def cell(found: float, skipped: float, share: float) -> str:
        return percent(found) + (f" (at {skipped:.1%})" if abs(skipped - share) >= 0.005 else "")

    rows = [
        [
            name,
            megabytes(kind["bytes"]),
            *map(cell, kind["energy_recall"], kind["predicted_sparsity"], shares),
        ]
        for name, kind in kinds.items()
    ]
    return markdown_table(["skipped", "MB", *(f"{share:.0%}" for share in shares)], rows)


def _masks(baselines: Mapping[str, Mapping[str, float | None]]) -> str:
    rows = [
        [
            name.replace("_", " "),
            *("-" if share is None else percent(share) for share in found.values()),
        ]
        for name, found in baselines.items()
    ]
    return markdown_table(["mask of the same size", "recall %", "energy recall %"], rows)


def _plots(figures: Sequence[Mapping[str, Any]]) -> list[str]:
    parts = []
    for figure in figures:
        parts.append(f"### {figure['title']}")
        if figure["files"]:
            png, svg = figure["files"]
            parts.append(f"![{figure['title']}]({png})\n\n{figure['note']} [SVG]({svg})")
        else:
            parts.append(NOT_DRAWN.format(**figure))
    return parts


def _layers(rows: Sequence[Mapping[str, Any]]) -> str:
    cells = [[column.cell(row) for column in LAYER] for row in rows]
    return markdown_table([column.heading for column in LAYER], cells)


def _method(report: Mapping[str, Any]) -> str:
    rows = [["this report", f"`{report['command']}`"]]
    rows += [[f"recall, {one['name']}", f"`{one['command']}`"] for one in report["sets"]]
    rows += [[f"data of {one['name']}", f"`{one['command']}`"] for one in report["figures"]]
    rows += [[f"data {one['name']}", _checksum(one["sha256"])] for one in report["data"]]
    rows += [["made at", report["made_at"]], ["commit", str(report["commit"])]]
    rows += [[name, str(value)] for name, value in report["hardware"].items()]
    rows += [[name, str(value)] for name, value in report["versions"].items()]
    return markdown_table(["what", "how"], rows).replace("---:", "---")


def _checksum(sha256: str | None) -> str:
    return f"sha256 `{sha256}`" if sha256 else "a folder"
