"""The engine's report for people: one way to write each number, and the report as Markdown.

The page and the Markdown use the same formatters. What was not measured says so.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

UNMEASURED = "not measured yet"
LAYER_COLUMNS = {
    "natural_sparsity": "natural sparsity",
    "predicted_sparsity": "predicted sparsity",
    "recall": "recall",
    "energy_recall": "energy recall",
    "precision": "precision",
}


def percent(value: float | None, digits: int = 1) -> str:
    return UNMEASURED if value is None else f"{100 * value:.{digits}f} %"


def interval(bounds: Sequence[float | None] | None) -> str:
    """A 95 % interval as low to high; empty where there is none."""
    if bounds is None or None in bounds:
        return ""
    return f"{100 * (bounds[0] or 0):.1f} to {100 * (bounds[1] or 0):.1f} %"


def rate(value: float | None) -> str:
    return UNMEASURED if value is None else f"{value:.1f} tokens/s"


def times(value: float | None) -> str:
    return UNMEASURED if value is None else f"{value:.2f}\u00d7"


def count(value: float | None) -> str:
    return UNMEASURED if value is None else f"{value:,.0f}"


def size(value: float | None) -> str:
    """Bytes in binary units."""
    if value is None:
        return UNMEASURED
    if value < 1024:
        return f"{value:.0f} B"
    power = min(4, int(math.log(value, 1024)))
    return f"{value / 1024**power:.1f} {'KMGT'[power - 1]}iB"


def budget(value: float | None) -> str:
    return "none set" if value is None else size(value)


def seconds(value: float | None) -> str:
    if value is None:
        return UNMEASURED
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(int(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def plain(value: Any) -> str:
    return UNMEASURED if value is None else str(value)


FORMATTERS = {
    f.__name__: f for f in (percent, interval, rate, times, count, size, budget, seconds, plain)
}


def time_shares(
    split: Mapping[str, float | None],
) -> list[tuple[str, float | None, float | None]]:
    """(name, seconds, share of the sum) of each part of the engine's work, in its order."""
    total = sum(value or 0.0 for value in split.values())
    return [
        (name.removesuffix("_s"), value, value / total if value is not None and total else None)
        for name, value in split.items()
    ]


def scale_start(layers: Sequence[Mapping[str, Any]], key: str) -> float:
    """Where the axis of a column of high shares starts: a tenth below its lowest point."""
    lows = [low for layer in layers if (low := _lowest(layer, key)) is not None]
    return max(0.0, math.floor(min(lows) * 10) / 10) if lows and min(lows) < 1 else 0.9


def _lowest(layer: Mapping[str, Any], key: str) -> float | None:
    bounds = layer.get(f"{key}_ci95")
    low: float | None = bounds[0] if bounds and bounds[0] is not None else layer[key]
    return low


def report_markdown(report: Mapping[str, Any]) -> str:
    """The whole report as Markdown tables."""
    model, speed, totals, queue = (report[k] for k in ("model", "speed", "totals", "queue"))
    placement, mean = report["placement"], report["mean"]
    how = f" ({speed['how']})" if speed["how"] else ""
    parts = [
        f"# {model['name']} in {report['mode']} mode",
        "## Speed",
        _table(["mode", "decode speed", "tokens"], _speed_rows(speed)),
        f"Speed-up over dense: {times(speed['speedup'])}{how}. "
        f"Now: {rate(speed['live_tokens_per_s'])}.",
        "## Layers",
        _table(
            ["layer", *LAYER_COLUMNS.values(), "recall, 95 %", "audited tokens", "hot neurons"],
            [_layer_row(str(layer["layer"]), layer) for layer in report["layers"]]
            + [_layer_row("mean", mean)],
        ),
        *guard_notes(report["layers"]),
        "## Time",
        _table(
            ["part", "time", "share"],
            [[n, seconds(s), percent(share)] for n, s, share in time_shares(report["time_split"])],
        ),
        "## Placement",
        _table(
            ["accelerator budget", "hot weights", "cold weights", "hot neurons"],
            [
                [
                    budget(placement["vram_budget_bytes"]),
                    size(placement["hot_bytes"]),
                    size(placement["cold_bytes"]),
                    count(sum(placement["hot_neurons"])),
                ]
            ],
        ),
        "## Requests",
        _table(
            ["running", "waiting", *(name.replace("_", " ") for name in totals)],
            [[count(queue["running"]), count(queue["waiting"]), *map(count, totals.values())]],
        ),
        "## Settings",
        _table(["setting", "value"], [[k, str(v)] for k, v in settings(report)]),
    ]
    return "\n\n".join(parts) + "\n"


def guard_notes(layers: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the drift guard changed, a line for each kind of change."""
    texts = {"lowered": "threshold lowered", "exact": "all gates computed"}
    notes = []
    for state, text in texts.items():
        if changed := [str(row["layer"]) for row in layers if row["guard"] == state]:
            notes.append(f"Drift guard: {text} in layer {', '.join(changed)}.")
    return notes


def _speed_rows(speed: Mapping[str, Any]) -> list[list[str]]:
    rows = [["dense", rate(speed["dense_tokens_per_s"]), count(speed["dense_tokens"])]]
    if speed["mode"] != "dense":
        now = [rate(speed["decode_tokens_per_s"]), count(speed["decode_tokens"])]
        rows.insert(0, [speed["mode"], *now])
    return rows


def settings(report: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """What is served and how, as name and value."""
    queue = {name: report["queue"][name] for name in ("max_batch", "max_queue")}
    plain_ones = {k: v for k, v in report.items() if not isinstance(v, dict | list)}
    plain_ones.pop("uptime_s")
    rows = {**report["model"], **report["devices"], **plain_ones, **queue}
    return [(k.replace("_", " "), "none" if v is None else v) for k, v in rows.items()]


def _layer_row(name: str, layer: Mapping[str, Any]) -> list[str]:
    return [
        name,
        *(percent(layer[key], 2) for key in LAYER_COLUMNS),
        interval(layer["recall_ci95"]),
        count(layer["audited_tokens"]),
        count(layer["hot_neurons"]),
    ]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
