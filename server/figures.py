"""What the report's numbers amount to, in the order and the words that people read them in.

The page and the Markdown are made of these; nothing is measured here.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runtime.hybrid_meter import HYBRID_PARTS


@dataclass(frozen=True)
class TimePart:
    """A part of the time of all decode steps; `kind` names its colour."""

    kind: str
    name: str
    what: str
    seconds: float | None
    per_step: float | None
    share: float | None


TIME_PARTS = {
    "select": ("select", "the predictor"),
    "gate": ("gate", "selected"),
    "up_down": ("up and down", "active"),
    "transfer": ("transfer", "between devices"),
    "wait": ("wait", "idle threads"),
    "ffn": ("FFN", "not split further here"),
    "attention": ("attention", ""),
    "head": ("head", "logits"),
    "sample": ("sampling", ""),
    "other": ("other", "norms, scheduling"),
}


def time_parts(report: Mapping[str, Any]) -> list[TimePart]:
    """Where the time of decode steps goes: the FFN by stages where the kernels count them."""
    spent = {name.removesuffix("_s"): value for name, value in report["time_split"].items()}
    for beside in ("prefill", "audit"):
        spent.pop(beside)
    if report["ffn_split"] is not None:
        spent.pop("ffn")
        stages = {key.removesuffix("_s"): value for key, value in report["ffn_split"].items()}
        spent["other"] = (spent["other"] or 0.0) + stages.pop("rest")
        spent |= stages
    total, steps = sum(value or 0.0 for value in spent.values()), report["steps"]["decode"]

    def part(kind: str, value: float | None) -> TimePart:
        name, what = TIME_PARTS[kind]
        if value is None or not total or not steps:
            return TimePart(kind, name, what, value, None, None)
        return TimePart(kind, name, what, value, value / steps, value / total)

    return [part(kind, spent[kind]) for kind in TIME_PARTS if kind in spent]


def stack_of(parts: Sequence[TimePart]) -> Iterator[tuple[str, float, float]]:
    """(kind, start, share) in percent, to be drawn as one bar."""
    at = 0.0
    for part in parts:
        width = 100 * (part.share or 0.0)
        yield part.kind, round(at, 3), round(width, 3)
        at += width


def hybrid_parts(split: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Names and seconds per step of layers that both devices compute."""
    return [(name, split["per_step"][key]) for key, name in HYBRID_PARTS.items()]


def batches(report: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """By mode, a row for each batch size that was decoded: how many neurons were active, how fast.

    A value that is not measured is None: neurons of backends that do not count them, and speeds of
    steps whose tokens had several modes, which count as `mixed` and have no neurons.
    """
    unknown = {"active_share": None, "united_share": None, "tokens_per_s": None}
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for row in (*report["density"], *report["served_speeds"]):
        key = (row["mode"], row["batch"])
        rows[key] = {**unknown, **rows.get(key, {}), **row}
    modes = dict.fromkeys(mode for mode, _ in sorted(rows))
    return {mode: [row for key, row in sorted(rows.items()) if key[0] == mode] for mode in modes}


def ffn_per_step(layer: Mapping[str, Any], report: Mapping[str, Any]) -> float | None:
    spent, steps = layer["ffn_times"], report["steps"]["decode"]
    return sum(spent.values()) / steps if spent and steps else None


MEMORY_NAMES = {
    "hot": "hot neurons",
    "cold": "cold neurons",
    "attention": "attention",
    "embeddings": "embeddings and head",
    "predictors": "predictors",
    "kv_taken": "keys and values in use",
}


def memory_bars(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What each device holds, in bytes by kind."""
    memory, devices = report["memory"], report["devices"]
    beside = {
        "attention": memory["attention"],
        "embeddings": memory["embeddings"],
        "predictors": memory["predictors"],
        "kv_taken": memory["kv_taken"],
    }
    hot, cold = {"hot": memory["ffn_hot"]}, {"cold": memory["ffn_cold"]}
    host = {"device": devices["host"], "place": "host memory"}
    if devices["accelerator"] is None:
        return [{**host, "parts": {**(hot if memory["ffn_hot"] else {}), **cold, **beside}}]
    return [
        {"device": devices["accelerator"], "place": "its own memory", "parts": {**hot, **beside}},
        {**host, "parts": cold},
    ]


def quality(report: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """The figures to show first and where they were measured: `serving`, or as long as nothing was
    audited yet, `training`; `nowhere` without either."""
    mean, training = report["mean"], report["training"]
    if mean["natural_sparsity"] is not None:
        return mean, "serving"
    if training is not None and report["mode"] == "predicted":
        intervals = dict.fromkeys(("recall_ci95", "energy_recall_ci95"))
        return {**training, **intervals, "audited_tokens": training["tokens"]}, "training"
    return mean, "nowhere"


def why_no_recall(report: Mapping[str, Any]) -> str:
    """What has to happen before there is a recall to show."""
    if report["mode"] == "dense" and report["mean"]["natural_sparsity"] is None:
        return "A model whose activation is never zero has no recall."
    if not report["audit_rate"]:
        return "The audit is off; start with --audit-rate above 0."
    if report["predictor_kind"] is None:
        return f"There are no predictors to audit: {report['predictors']}."
    return "Ask it something: a share of the tokens it generates is audited."


def latencies(report: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """By name: percentiles in seconds, and of how many values."""
    activity = report["activity"]
    return {
        "in the queue": activity["queue_s"],
        "to the first token": activity["ttft_s"],
        "between tokens": activity["itl_s"],
    }


def prefix_hit_share(totals: Mapping[str, int]) -> float | None:
    """Of the prompt tokens that were looked up in the prefix cache, the share that was there."""
    queried = totals["prefix_queried_tokens"]
    return totals["prefix_hit_tokens"] / queried if queried else None


def chat_modes(report: Mapping[str, Any]) -> list[str]:
    """Which to compare at first: this server's own mode, or what it could be, beside dense."""
    own = report["mode"] if report["mode"] != "dense" else report["modes"][-1]
    return list(dict.fromkeys((own, "dense")))


def scale_start(layers: Sequence[Mapping[str, Any]], key: str) -> float:
    """Where the axis of a column of high shares starts: a tenth below its lowest point."""
    lows = [low for layer in layers if (low := _lowest(layer, key)) is not None]
    return max(0.0, math.floor(min(lows) * 10) / 10) if lows and min(lows) < 1 else 0.9


def _lowest(layer: Mapping[str, Any], key: str) -> float | None:
    bounds = layer.get(f"{key}_ci95")
    low: float | None = bounds[0] if bounds and bounds[0] is not None else layer[key]
    return low


def guard_notes(layers: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the drift guard changed, a line for each kind of change."""
    texts = {"lowered": "threshold lowered", "exact": "all gates computed"}
    notes = []
    for state, text in texts.items():
        if changed := [str(row["layer"]) for row in layers if row["guard"] == state]:
            notes.append(f"Drift guard: {text} in layer {', '.join(changed)}.")
    return notes


def setting_groups(report: Mapping[str, Any]) -> dict[str, list[tuple[str, Any]]]:
    """What is served and how, as names and values: the settings with every 'auto' resolved."""
    config = report["config"]
    rest = {
        key: value
        for key, value in report.items()
        if not isinstance(value, dict | list) and key not in (*config, "uptime_s")
    }
    groups = {
        "Model": report["model"],
        "Engine": config,
        "Computed": {**rest, **report["devices"]},
        "Server": report["server"],
    }
    return {
        title: [(key.replace("_", " "), _setting(value)) for key, value in rows.items()]
        for title, rows in groups.items()
    }


def _setting(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {item}" for key, item in value.items()) or "none"
    return "none" if value is None or value == () else str(value)
