"""The report as Markdown tables."""

from collections.abc import Mapping, Sequence
from typing import Any

from .figures import batches, guard_notes, latencies, setting_groups, time_parts
from .formats import (
    budget,
    clock,
    count,
    interval,
    milliseconds,
    number,
    percent,
    range_of_times,
    rate,
    seconds,
    size,
    times,
)

LAYER_COLUMNS = {
    "natural_sparsity": "natural sparsity",
    "predicted_sparsity": "predicted sparsity",
    "recall": "recall",
    "energy_recall": "energy recall",
    "precision": "precision",
}


def report_markdown(report: Mapping[str, Any]) -> str:
    """The whole report as Markdown tables."""
    model, speed, totals, queue = (report[k] for k in ("model", "speed", "totals", "queue"))
    placement, mean = report["placement"], report["mean"]
    how = f" ({speed['how']})" if speed["how"] else ""
    bounds = f", {range_of_times(speed['speedup_ci95'])}" if speed["how"] else ""
    parts = [
        f"# {model['name']} in {report['mode']} mode",
        "## Speed",
        _table(["mode", "decode speed", "tokens"], _speed_rows(speed)),
        f"Speed-up over dense: {times(speed['speedup'])}{bounds}{how}. "
        f"Now: {rate(speed['live_tokens_per_s'])}.",
        *_replicas(report["replicas"]),
        "## Layers",
        _table(
            ["layer", *LAYER_COLUMNS.values(), "recall, 95 %", "audited tokens", "hot neurons"],
            [_layer_row(str(layer["layer"]), layer) for layer in report["layers"]]
            + [_layer_row("mean", mean)],
        ),
        *guard_notes(report["layers"]),
        "## Time",
        _table(
            ["part of a decode step", "per step", "share"],
            [[p.name, milliseconds(p.per_step), percent(p.share)] for p in time_parts(report)],
        ),
        f"{report['steps']['decode']} decode steps; beside them, reading prompts: "
        f"{seconds(report['time_split']['prefill_s'])}, audits: "
        f"{seconds(report['time_split']['audit_s'])}.",
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
        "## Batch sizes",
        _table(
            ["mode", "batch", "steps", "active, one token", "active, any token", "tokens/s"],
            [
                [
                    mode,
                    str(row["batch"]),
                    count(row["steps"]),
                    percent(row["active_share"]),
                    percent(row["united_share"]),
                    number(row["tokens_per_s"]),
                ]
                for mode, rows in batches(report).items()
                for row in rows
            ],
        ),
        "## Latency of the last 15 minutes",
        _table(
            ["", "p50", "p95", "p99", "values"],
            [
                [name, *(milliseconds(row[p]) for p in ("p50", "p95", "p99")), count(row["count"])]
                for name, row in latencies(report).items()
            ],
        ),
        "## Last requests",
        _table(
            ["ended", "mode", "prompt", "answer", "first token", "tokens/s", "end"],
            [
                [
                    clock(row["ended_at"]),
                    row["mode"],
                    count(row["prompt_tokens"]),
                    count(row["completion_tokens"]),
                    milliseconds(row["ttft_s"]),
                    number(row["tokens_per_s"]),
                    row["finish_reason"],
                ]
                for row in report["activity"]["requests"]
            ],
        ),
        "## Settings",
        _table(
            ["setting", "value"],
            [[k, v] for rows in setting_groups(report).values() for k, v in rows],
        ),
    ]
    return "\n\n".join(parts) + "\n"


def _replicas(replicas: Mapping[str, Any] | None) -> list[str]:
    if replicas is None:
        return []
    columns = ("running", "waiting", "generated_tokens", "finished", "failed")
    rows = [
        [
            row["name"],
            "up" if row["is_up"] else f"down, last heard of {seconds(row['heard_s'])} ago",
            *(count(row[key]) for key in columns),
        ]
        for row in replicas["rows"]
    ]
    title = f"## Replicas: {replicas['up']} of {replicas['configured']} are up"
    return [title, _table(["", "state", *(key.replace("_", " ") for key in columns)], rows)]


def _speed_rows(speed: Mapping[str, Any]) -> list[list[str]]:
    rows = [["dense", rate(speed["dense_tokens_per_s"]), count(speed["dense_tokens"])]]
    if speed["mode"] != "dense":
        now = [rate(speed["decode_tokens_per_s"]), count(speed["decode_tokens"])]
        rows.insert(0, [speed["mode"], *now])
    return rows


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
