"""The report's plots: what is drawn from which figures. Files and determinism are files.py's.

Colours are Okabe and Ito's, which stay apart for every kind of colour vision; lines differ in dash
and marker too. Figures are made without pyplot, so no display and no global state is involved.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from .build import covered_by_top
from .stored import Stored

BLUE, ORANGE, GREEN, RED, PURPLE, SKY = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9",
)  # fmt: skip
GREY = "#555555"
CYCLE = (BLUE, ORANGE, GREEN, PURPLE, SKY, RED)
DASHES = ("-", (0, (5, 1.5)), (0, (3, 1, 1, 1)), (0, (1.5, 1)), (0, (7, 2, 1, 2)), (0, (2, 2)))
SERVED: tuple[dict[str, Any], ...] = (  # the mark of the first set and of the second
    {"marker": "*", "markersize": 13, "color": "black", "markeredgecolor": "white"},
    {"marker": "o", "markersize": 7, "color": "white", "markeredgecolor": "black"},
)
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "lines.linewidth": 1.8,
    "svg.hashsalt": "hotneuron",  # ids in an SVG depend on the drawing alone
}
WIDTH = 9.0  # inches
LEGEND_COLUMNS = 3  # of long names
SHARES = np.linspace(0, 1, 101)
RECALL_STEPS = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 1.0)
MEASURES = {"recall": "recall", "energy_recall": "energy recall"}

Report = Mapping[str, Any]


@dataclass(frozen=True)
class Plot:
    """One figure: its file name, title and reading, what it is drawn from and what writes that."""

    name: str
    title: str
    note: str
    source: str
    command: str
    is_possible: Callable[[Report, Stored], bool]
    draw: Callable[[Report, Stored], Figure]


def _percent(axis: Any) -> None:
    axis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def _figure(height: float) -> Figure:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    engine = figure.get_layout_engine()
    assert engine is not None
    engine.set(wspace=0.06)  # type: ignore[call-arg]
    return figure


def draw_kinds(report: Report, _: Stored) -> Figure:
    """Recall and energy recall against predicted sparsity, a line per kind of predictor."""
    entries = len(report["kinds"]) + 2 * len(report["sets"])
    figure = _figure(3.7 + 0.22 * math.ceil(entries / LEGEND_COLUMNS))
    axes = figure.subplots(1, 2, sharey=True)
    for ax, (key, label) in zip(axes, MEASURES.items(), strict=True):
        for index, (name, kind) in enumerate(report["kinds"].items()):
            again = index // len(CYCLE)  # a colour comes back with another dash
            ax.plot(
                kind["predicted_sparsity"],
                kind[key],
                color=CYCLE[index % len(CYCLE)],
                linestyle=DASHES[(index + again) % len(DASHES)],
                label=_kind_label(name, kind["bytes"]),
            )
        for index, one in enumerate(report["sets"]):
            _mark_served(ax, one, key, index)
        ax.set_title(label)
        ax.set_xlabel("predicted sparsity")
        _percent(ax.xaxis)
        _percent(ax.yaxis)
    axes[0].set_ylabel("share found")
    axes[0].set_ylim(top=1.01)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=LEGEND_COLUMNS)
    return figure


def _kind_label(name: str, num_bytes: int) -> str:
    name = name.replace("_", " ")
    return f"{name} ({num_bytes / 1e6:.1f} MB)" if num_bytes else name


def _mark_served(ax: Axes, one: Mapping[str, Any], key: str, index: int) -> None:
    """Where the served predictors stand on a set, and how many of its neurons are silent."""
    mean = one["result"]["mean"]
    natural = mean["natural_sparsity"]
    ax.axvline(
        natural,
        color=GREY,
        linewidth=1.2,
        linestyle=(":", "--")[index],
        label=f"natural sparsity {natural:.1%}, {one['name']}",
    )
    if mean[key] is not None:
        ax.plot(
            mean["predicted_sparsity"],
            mean[key],
            linestyle="none",
            label=f"as served, {one['name']}",
            zorder=5,
            **SERVED[index],
        )


def draw_curves(report: Report, stored: Stored) -> Figure:
    """Heat maps of recall by layer and predicted sparsity, with each layer's operating point."""
    assert stored.curves is not None
    layers = stored.curves["layers"]
    one = report["sets"][0]
    figure = _figure(max(3.2, 1.6 + 0.13 * len(layers)))
    axes = figure.subplots(1, 2, sharey=True)
    colours = BoundaryNorm(RECALL_STEPS, 256)
    for ax, (key, label) in zip(axes, MEASURES.items(), strict=True):
        found_LS = [np.interp(SHARES, row["predicted_sparsity"], row[key]) for row in layers]
        half = (SHARES[1] - SHARES[0]) / 2
        image = ax.imshow(
            np.array(found_LS),
            norm=colours,
            cmap="cividis",
            aspect="auto",
            interpolation="nearest",
            extent=(-half, 1 + half, len(layers) - 0.5, -0.5),
        )
        _mark_layers(ax, one["result"]["layers"], "predicted_sparsity", "o", RED, "as served")
        _mark_layers(
            ax, one["result"]["layers"], "natural_sparsity", "|", "white", "natural sparsity"
        )
        ax.set_title(label)
        ax.set_xlabel("predicted sparsity")
        ax.grid(False)
        _percent(ax.xaxis)
        ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].set_ylabel("layer")
    bar = figure.colorbar(image, ax=axes, ticks=RECALL_STEPS, spacing="uniform", pad=0.02)
    _percent(bar.ax.yaxis)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=2,
        title=one["name"],
        facecolor="#d8d8d8",  # white marks show on it
        frameon=True,
        edgecolor="none",
    )
    return figure


def _mark_layers(
    ax: Axes, rows: Sequence[Mapping[str, Any]], key: str, marker: str, colour: str, label: str
) -> None:
    ax.plot(
        [row[key] for row in rows],
        [row["layer"] for row in rows],
        marker,
        color=colour,
        markeredgecolor=colour if marker == "|" else "white",
        markersize=6,
        markeredgewidth=2 if marker == "|" else 0.8,
        label=label,
    )


def draw_layers(report: Report, _: Stored) -> Figure:
    """Natural and predicted sparsity as bars, recall and energy recall as lines, by layer."""
    sets = report["sets"]
    figure = _figure(5.6)
    axes = figure.subplots(2, len(sets), sharex=True, sharey="row", squeeze=False)
    for column, one in enumerate(sets):
        rows = one["result"]["layers"]
        layer = np.array([row["layer"] for row in rows])
        top, bottom = axes[0, column], axes[1, column]
        for side, (key, colour) in enumerate(
            {"natural_sparsity": SKY, "predicted_sparsity": BLUE}.items()
        ):
            share = [row[key] for row in rows]
            label = key.replace("_", " ")
            top.bar(layer + 0.4 * (side - 0.5), share, 0.4, color=colour, label=label)
        for key, colour, marker in (("recall", RED, "o"), ("energy_recall", GREEN, "s")):
            _line_with_interval(bottom, layer, rows, key, colour, marker)
        top.set_title(f"{one['name']} ({one['result']['mean']['tokens']:,} tokens)")
        top.set_ylim(0, 1)
        top.set_xlim(-0.8, len(rows) - 0.2)
        bottom.set_xlabel("layer")
        bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
        for ax in (top, bottom):
            ax.grid(axis="x", visible=False)
            _percent(ax.yaxis)
    axes[0, 0].set_ylabel("share of neurons")
    axes[1, 0].set_ylabel("share found")
    handles = [handle for ax in axes[:, 0] for handle in ax.get_legend_handles_labels()[0]]
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
    return figure


def _line_with_interval(
    ax: Axes, layer: Any, rows: Sequence[Mapping[str, Any]], key: str, colour: str, marker: str
) -> None:
    def numbers(values: Sequence[float | None]) -> Any:
        return np.array([np.nan if value is None else value for value in values])

    pairs = [row[f"{key}_ci95"] or (None, None) for row in rows]
    low, high = (numbers([pair[side] for pair in pairs]) for side in (0, 1))
    ax.fill_between(layer, low, high, color=colour, alpha=0.25, linewidth=0)
    share = numbers([row[key] for row in rows])
    ax.plot(layer, share, color=colour, marker=marker, markersize=4, label=key.replace("_", " "))


def draw_frequency(report: Report, stored: Stored) -> Figure:
    """Share of all activations that the most frequent neurons cover: the power law."""
    assert stored.profile is not None
    counts_LF = stored.profile.counts_LF.numpy()
    figure = _figure(4.6)
    ax = figure.subplots()
    for layer, counts_F in enumerate(counts_LF):
        label = "each layer alone" if layer == 0 else None
        _cover(ax, counts_F, color="#b8b8b8", linewidth=0.7, label=label)
    _cover(ax, counts_LF.ravel(), color=BLUE, linewidth=2.4, label="all layers together")
    ax.plot((0, 1), (0, 1), color=GREY, linestyle=":", linewidth=1.2, label="all equally often")
    found = report["coverage"]
    neurons, activations = found["share_of_neurons"], found["share_of_activations"]
    ax.plot((neurons, neurons, 0), (0, activations, activations), "--", color=RED, linewidth=1.2)
    ax.plot(neurons, activations, "o", color=RED, markeredgecolor="white", markersize=9, zorder=5)
    left = neurons < 0.5
    ax.annotate(
        f"{activations:.0%} of activations:\ntop {neurons:.1%} of neurons",
        (neurons, 0.05),
        xytext=(8 if left else -8, 0),
        textcoords="offset points",
        ha="left" if left else "right",
        color=RED,
    )
    ax.set_xlabel("neurons, most frequent first")
    ax.set_ylabel("share of activations covered")
    ax.set_xlim(0, 1)
    ax.set_ylim(0, 1.01)
    for axis in (ax.xaxis, ax.yaxis):
        _percent(axis)
    ax.legend(loc="lower right")
    return figure


def _cover(ax: Axes, counts: Any, **style: Any) -> None:
    covered = covered_by_top(counts)
    if covered is not None:
        number = np.linspace(0, len(covered), min(len(covered), 512) + 1).round().astype(np.int64)
        ax.plot(number / len(covered), np.append(0.0, covered)[number], **style)


PLOTS = (
    Plot(
        "recall-by-sparsity",
        "Recall against predicted sparsity, all kinds of predictors",
        "A line skips the same share of neurons in every layer. The served predictors skip more "
        "where a layer allows it, so their mark may lie off their line.",
        "sparsity/kinds.json",
        "train-predictors {model} --compare",
        lambda report, stored: report["kinds"] is not None,
        draw_kinds,
    ),
    Plot(
        "recall-by-layer",
        "Recall against predicted sparsity, layer by layer",
        "Colour is recall if the layer skipped that share of its neurons, on the documents that "
        "calibrated it.",
        "sparsity/curves.json",
        "train-predictors {model}",
        lambda report, stored: stored.curves is not None,
        draw_curves,
    ),
    Plot(
        "layers",
        "Sparsity and recall of each layer",
        "Bands are 95 % intervals of the mean over tokens.",
        "sets",
        "{sets}",
        lambda report, stored: True,
        draw_layers,
    ),
    Plot(
        "activation-frequency",
        "How few neurons do most of the firing",
        "Counted on all tokens that train-predictors recorded.",
        "sparsity/profile.safetensors",
        "train-predictors {model}",
        lambda report, stored: bool(
            report["coverage"] and report["coverage"]["share_of_neurons"] is not None
        ),
        draw_frequency,
    ),
)
