"""Plots of an analysis: each a function from the report to a figure, saved as PNG and SVG.

The same numbers give the same bytes: figures carry no date and no random ids. Colours are those of
Okabe and Ito, which colour-blind people tell apart; beyond them lines are dashed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from scipy.ndimage import uniform_filter1d

from predictor.files import replacing

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
INK, QUIET = "#222222", "#8a8a8a"
SEQUENTIAL = "viridis"  # even in lightness, so it also works in grey
PERCENT = PercentFormatter(1.0, decimals=0)
STYLE = {
    "font.size": 10.0,
    "axes.titlesize": 11.0,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.hashsalt": "hotneuron",
    "svg.fonttype": "path",
}


def write_plots(report: Mapping[str, Any], folder: Path) -> list[Path]:
    """Every plot that the report has numbers for, in `folder`; the files written."""
    plots = {
        "sparsity-by-layer": sparsity_by_layer,
        "sparsity-by-kind": sparsity_by_kind,
        "neurons": neurons,
        "overlap": overlap,
    }
    if "training" in report:
        plots["training"] = training
    written = []
    with matplotlib.rc_context(STYLE):
        for name, plot in plots.items():
            figure = plot(report)
            FigureCanvasAgg(figure)
            for suffix, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
                path = folder / f"{name}.{suffix}"
                with replacing(path) as partial:
                    figure.savefig(partial, format=suffix, dpi=150, metadata=metadata)
                written.append(path)
    return written


def sparsity_by_layer(report: Mapping[str, Any]) -> Figure:
    """A line per kind of text; thresholds below, if layers differ."""
    thresholds = report["thresholds"]
    by_layer = isinstance(thresholds, list)
    figure = Figure(figsize=(7.5, 5.4 if by_layer else 4.2), layout="constrained")
    axes, *below = figure.subplots(
        1 + by_layer, 1, sharex=True, squeeze=False, height_ratios=[3, 1][: 1 + by_layer]
    )[:, 0]
    layers = range(len(report["all"]["sparsity_by_layer"]))
    for (name, kind), style in zip(report["kinds"].items(), _line_styles(), strict=False):
        axes.plot(layers, kind["sparsity_by_layer"], label=name, linewidth=1.4, **style)
    mean = report["all"]["sparsity_by_layer"]
    axes.plot(layers, mean, color=INK, linewidth=2.6, label="mean of kinds")
    axes.set(title="Sparsity by layer", ylabel="silent neurons")
    axes.yaxis.set_major_formatter(PERCENT)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    if by_layer:
        below[0].step(layers, thresholds, where="mid", color=INK)
        below[0].set(ylabel="threshold", ylim=(0, None))
    [*below, axes][0].set(xlabel="layer")
    return figure


def sparsity_by_kind(report: Mapping[str, Any]) -> Figure:
    """A bar per kind of text, the sparsest on top, and their mean."""
    kinds = sorted(report["kinds"].items(), key=lambda item: float(item[1]["sparsity"]))
    values = [report["all"]["sparsity"], *(kind["sparsity"] for _, kind in kinds)]
    names = ["mean of kinds", *(f"{name}\n{kind['tokens']:,} tokens" for name, kind in kinds)]
    figure = Figure(figsize=(7.5, 1.2 + 0.42 * len(names)), layout="constrained")
    axes = figure.subplots()
    colours = [INK, *[COLOURS[0]] * len(kinds)]
    bars = axes.barh(names, values, height=0.62, color=colours)
    axes.bar_label(bars, [f"{value:.1%}" for value in values], padding=4, color=INK)
    axes.set(title="Sparsity by kind of text", xlabel="silent neurons", xlim=(0, 1))
    axes.xaxis.set_major_formatter(PERCENT)
    axes.tick_params(axis="y", length=0, labelsize=8.5)
    axes.grid(visible=False, axis="y")
    return figure


def neurons(report: Mapping[str, Any]) -> Figure:
    """How few neurons make most of the activations: cumulated, and by layer."""
    facts = report["neurons"]
    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    curves = facts["curve_by_layer"]
    colours = matplotlib.colormaps[SEQUENTIAL]
    share = [i / (len(facts["curve"]) - 1) for i in range(len(facts["curve"]))]
    for layer, curve in enumerate(curves):
        colour = colours(layer / max(1, len(curves) - 1))
        left.plot(share, curve, color=colour, linewidth=0.8, alpha=0.8)
    left.plot(share, facts["curve"], color=INK, linewidth=2.4, label="all layers together")
    left.plot(share, share, color=QUIET, linestyle="--", linewidth=1, label="all equally often")
    covered, needed = facts["covered_share"], facts["share_of_neurons"]
    left.plot([0, needed, needed], [covered, covered, 0], color=COLOURS[3], linewidth=1.2)
    left.annotate(
        f"{needed:.0%} of the neurons:\n{covered:.0%} of the activations",
        (needed, 0.25),
        xytext=(7, 0),
        textcoords="offset points",
        color=COLOURS[3],
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
    )
    left.set(
        title="Activations, most frequent neurons first",
        xlabel="share of neurons",
        ylabel="share of activations",
        xlim=(0, 1),
        ylim=(0, 1.005),
    )
    left.legend(loc="lower right", fontsize=9)
    scale = matplotlib.cm.ScalarMappable(
        matplotlib.colors.Normalize(0, max(1, len(curves) - 1)), colours
    )
    figure.colorbar(scale, ax=left, label="layer", pad=0.02)
    by_layer = facts["share_of_neurons_by_layer"]
    right.bar(range(len(by_layer)), by_layer, color=COLOURS[0])
    right.axhline(needed, color=INK, linestyle=":", linewidth=1.2)
    right.set(
        title=f"Neurons that cover {covered:.0%} (dotted: all layers together)",
        xlabel="layer",
        ylabel="share of the layer's neurons",
    )
    right.grid(visible=False, axis="x")
    for axis in (left.xaxis, left.yaxis, right.yaxis):
        axis.set_major_formatter(PERCENT)
    return figure


def overlap(report: Mapping[str, Any]) -> Figure:
    """A heat map of the Jaccard index between kinds; the diagonal is a kind against itself."""
    facts = report["overlap"]
    names = list(facts["within"])
    place = {name: i for i, name in enumerate(names)}
    grid = [[0.0] * len(names) for _ in names]
    for name, own in facts["within"].items():
        grid[place[name]][place[name]] = own["jaccard"]
    for pair in facts["between"]:
        one, other = (place[name] for name in pair["kinds"])
        grid[one][other] = grid[other][one] = pair["jaccard"]
    size = 2.6 + 0.72 * len(names)
    figure = Figure(figsize=(size + 0.8, size), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(grid, cmap=SEQUENTIAL, vmin=0, vmax=1)
    for row, values in enumerate(grid):
        for column, value in enumerate(values):
            colour = INK if value > 0.6 else "white"
            weight = "bold" if row == column else "normal"
            text = f"{value:.2f}"
            axes.text(column, row, text, ha="center", va="center", color=colour, fontweight=weight)
    axes.set_xticks(range(len(names)), names, rotation=35, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set_title(
        f"The {facts['top_share']:.0%} most frequent neurons: Jaccard index\n"
        "(bold: one half of a kind's documents against the other)"
    )
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, shrink=0.8)
    return figure


def training(report: Mapping[str, Any]) -> Figure:
    """Sparsity and language loss over the tokens of a run."""
    steps: Sequence[Mapping[str, Any]] = report["training"]
    figure = Figure(figsize=(7.5, 6), layout="constrained")
    top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=[2, 2, 1])
    tokens = [step["tokens"] / 1e6 for step in steps]
    loss = "kl" if "kl" in steps[0] else "nll"
    for axes, key, colour in ((top, "sparsity", COLOURS[0]), (middle, loss, COLOURS[3])):
        values = [step[key] for step in steps]
        axes.plot(tokens, values, color=colour, linewidth=0.6, alpha=0.35)
        smooth = uniform_filter1d(values, max(1, len(values) // 40), mode="nearest")
        axes.plot(tokens, smooth, color=colour, linewidth=1.8)
    top.set(title="Training", ylabel="silent neurons")
    top.yaxis.set_major_formatter(PERCENT)
    names = {"kl": "KL to the dense model, nats", "nll": "loss per token, nats"}
    middle.set(ylabel=names[loss])
    for key, label, colour in (
        ("l1_weight", "L1 weight", INK),
        ("threshold", "FATReLU threshold", COLOURS[1]),
    ):
        bottom.plot(tokens, [step[key] for step in steps], color=colour, label=label)
    bottom.set(xlabel="million tokens", ylim=(0, None))
    bottom.legend(ncols=2, loc="upper left", bbox_to_anchor=(0, 1.25))
    return figure


def _line_styles() -> Any:
    dashes = ("-", "--", ":", "-.")
    return cycle({"color": c, "linestyle": dash} for dash in dashes for c in COLOURS)
