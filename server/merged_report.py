"""The reports of several replicas as one.

Counters, times, queues and memory are added up; shares are means, weighted by what they were
measured on; latencies come from added histograms; a measurement of speed stays the last one's.
What happened in a replica that is down still counts; what it held and had waiting is gone.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from .activity import MAX_REQUESTS, histogram_figures
from .history import COLUMNS, history_means
from .replica_news import ReplicaNews

Report = Mapping[str, Any]
SHARES = ("natural_sparsity", "predicted_sparsity", "recall", "energy_recall", "precision")
INTERVALS = ("recall_ci95", "energy_recall_ci95")
GUARD_STATES = ("ok", "lowered", "exact")  # the later, the worse


def merge_reports(news: Sequence[ReplicaNews], num_configured: int) -> dict[str, Any]:
    """One report of them all. The first is the one that answers: it is up, and what is equal in
    all of them, such as settings, is told as it has it."""
    own = news[0].report
    every = [one.report for one in news]
    up = [one.report for one in news if one.is_up]
    history = merge_histories([one.report["history"] for one in news], [one.is_up for one in news])
    return {
        **own,
        "uptime_s": max(report["uptime_s"] for report in up),
        "kv_blocks": _added(report["kv_blocks"] for report in up),
        "memory": _added(report["memory"] for report in up),
        "queue": _added(report["queue"] for report in up),
        "totals": _added(report["totals"] for report in every),
        "layers": [_merge_layers(rows) for rows in zip(*(r["layers"] for r in every), strict=True)],
        "mean": _merge_audits([report["mean"] for report in every]),
        "activation": _merge_activations([report["activation"] for report in every]),
        "time_split": _added(report["time_split"] for report in every),
        "ffn_split": _added(report["ffn_split"] for report in every),
        "hybrid_split": _merge_hybrid_splits([report["hybrid_split"] for report in every]),
        "steps": _added(report["steps"] for report in every),
        "density": _merge_densities([row for report in every for row in report["density"]]),
        "served_speeds": _merge_speeds([row for r in every for row in r["served_speeds"]]),
        "speed": _merge_measurements(every, up),
        "activity": _merge_activities([report["activity"] for report in every]),
        "history": history,
        "history_means": history_means(history["generated_per_s"]),
        "replicas": {
            "configured": num_configured,
            "up": len(up),
            "rows": [_replica_row(one) for one in news],
        },
    }


def _replica_row(one: ReplicaNews) -> dict[str, Any]:
    report = one.report
    return {
        "name": one.name,
        "is_up": one.is_up,
        "heard_s": round(one.heard_s, 1),
        "uptime_s": report["uptime_s"],
        "running": report["queue"]["running"],
        "waiting": report["queue"]["waiting"],
        "finished": report["totals"]["finished"],
        "failed": report["totals"]["failed"],
        "generated_tokens": report["totals"]["generated_tokens"],
        "live_tokens_per_s": report["speed"]["live_tokens_per_s"],
        "speedup": report["speed"]["speedup"],
        "recall": report["mean"]["recall"],
    }


def _added(parts: Iterable[Mapping[str, Any] | None]) -> Any:
    """Sums by key; what is None in all of them stays None."""
    found = [part for part in parts if part is not None]
    if not found:
        return None
    return {key: _sum(part[key] for part in found) for key in found[0]}


def _sum(values: Iterable[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return sum(found) if found else None


def _mean(pairs: Iterable[tuple[float | None, float]]) -> float | None:
    """Of (value, weight); None where no value was measured on anything."""
    found = [(value, weight) for value, weight in pairs if value is not None and weight]
    total = sum(weight for _, weight in found)
    return sum(value * weight for value, weight in found) / total if total else None


def _merge_audits(rows: Sequence[Report]) -> dict[str, Any]:
    """Means over the audited tokens of all; intervals are those of independent samples."""
    weights = [row["audited_tokens"] or 0 for row in rows]
    merged = {
        **rows[0],
        "audited_tokens": sum(weights),
        "nonfinite_tokens": sum(row["nonfinite_tokens"] for row in rows),
        **{key: _mean(zip((r[key] for r in rows), weights, strict=True)) for key in SHARES},
    }
    for key in INTERVALS:
        value = merged[key.removesuffix("_ci95")]
        merged[key] = value and _interval(value, [row[key] for row in rows], weights)
    return merged


def _interval(
    value: float, bounds: Sequence[Sequence[float] | None], weights: Sequence[float]
) -> list[float] | None:
    found = [(b, weight) for b, weight in zip(bounds, weights, strict=True) if b is not None]
    total = sum(weight for _, weight in found)
    if not total:
        return None
    half = math.hypot(*((high - low) / 2 * weight / total for (low, high), weight in found))
    return [max(0.0, value - half), min(1.0, value + half)]


def _merge_layers(rows: Sequence[Report]) -> dict[str, Any]:
    states = [row["guard"] for row in rows if row["guard"] is not None]
    recalls = [row["recent_recall"] for row in rows if row["recent_recall"] is not None]
    return {
        **_merge_audits(rows),
        "ffn_times": _added(row["ffn_times"] for row in rows),
        "guard": max(states, key=GUARD_STATES.index, default=None),
        "recent_recall": min(recalls, default=None),
    }


def _merge_activations(maps: Sequence[Report]) -> dict[str, Any]:
    """Group by group, where they stand in each replica's memory: those whose hot neurons have
    changed places since the start may differ in which these are."""
    tokens = [one["tokens"] for one in maps]
    if not sum(tokens):
        return dict(maps[0])
    share_LG = np.average([one["share_LG"] for one in maps], axis=0, weights=tokens)
    return {**maps[0], "tokens": sum(tokens), "share_LG": share_LG.round(4).tolist()}


def _merge_hybrid_splits(splits: Sequence[Report | None]) -> dict[str, Any] | None:
    timed = [split for split in splits if split is not None and split["timed_steps"]]
    if not timed:
        return None if splits[0] is None else dict(splits[0])
    weights = [split["timed_steps"] for split in timed]
    per_step = {
        key: _mean(zip((split["per_step"].get(key) for split in timed), weights, strict=True))
        for key in timed[0]["per_step"]
    }
    return {**timed[0], "timed_steps": sum(weights), "per_step": per_step}


def _grouped(
    rows: Iterable[Report], merge: Callable[[Sequence[Report]], dict[str, Any]]
) -> list[dict[str, Any]]:
    groups: dict[tuple[str, int], list[Report]] = {}
    for row in rows:
        groups.setdefault((row["mode"], row["batch"]), []).append(row)
    return [merge(groups[key]) for key in sorted(groups)]


def _merge_densities(rows: Sequence[Report]) -> list[dict[str, Any]]:
    def merge(group: Sequence[Report]) -> dict[str, Any]:
        shares = ("selected_share", "active_share", "united_share")
        counts = {key: sum(row[key] for row in group) for key in ("steps", "tokens")}
        means = {key: _mean((row[key], row["steps"]) for row in group) for key in shares}
        return {**group[0], **counts, **means}

    return _grouped(rows, merge)


def _merge_speeds(rows: Sequence[Report]) -> list[dict[str, Any]]:
    def merge(group: Sequence[Report]) -> dict[str, Any]:
        steps = sum(row["steps"] for row in group)
        seconds = sum(row["batch"] * row["steps"] / row["tokens_per_s"] for row in group)
        return {**group[0], "steps": steps, "tokens_per_s": group[0]["batch"] * steps / seconds}

    return _grouped(rows, merge)


def _merge_measurements(every: Sequence[Report], up: Sequence[Report]) -> dict[str, Any]:
    """Each replica measures itself: the last result, and the last measurement that was begun."""
    speeds = [report["speed"] for report in every]
    runs = [speed["benchmark"] for speed in speeds if speed["benchmark"] is not None]
    return {
        **max(speeds, key=lambda speed: speed["measured_at"] or 0.0),
        "benchmark": max(runs, key=lambda run: run["started_at"], default=None),
        "live_tokens_per_s": _sum(report["speed"]["live_tokens_per_s"] for report in up),
    }


def _merge_activities(activities: Sequence[Report]) -> dict[str, Any]:
    requests = [request for one in activities for request in one["requests"]]
    requests.sort(key=lambda request: request["ended_at"], reverse=True)
    merged: dict[str, Any] = {**activities[0], "requests": requests[:MAX_REQUESTS]}
    for key in ("queue_s", "ttft_s", "itl_s"):
        merged[key] = histogram_figures([one[key]["histogram"] for one in activities])
    return merged


def merge_histories(
    histories: Sequence[Mapping[str, Sequence[float | None]]], is_up: Sequence[bool]
) -> dict[str, list[float | None]]:
    """Columns by second. Rates and requests are added up, the cache's share is the mean, latencies
    are those of the slowest. Ends with the last second that all who are up have told."""
    by_second = [_by_second(history) for history in histories]
    lasts = [max(one) for one, lives in zip(by_second, is_up, strict=True) if one and lives]
    seconds = sorted({second for one in by_second for second in one})
    columns: dict[str, list[float | None]] = {key: [] for key in COLUMNS}
    for second in seconds:
        if second > min(lasts, default=math.inf):
            break
        rows = [one[second] for one in by_second if second in one]
        columns["at"].append(second)
        for key in COLUMNS[1:]:
            values = [row[key] for row in rows if row[key] is not None]
            columns[key].append(_OVER_REPLICAS[key](values) if values else None)
    return columns


def _by_second(history: Mapping[str, Sequence[float | None]]) -> dict[int, dict[str, Any]]:
    """A sample for each second. One that fell between two samples has that of the second before:
    they are taken a little more than a second apart."""
    found: dict[int, dict[str, Any]] = {}
    for values in zip(*(history[key] for key in COLUMNS), strict=True):
        sample = dict(zip(COLUMNS, values, strict=True))
        second = int(sample["at"] or 0)
        if second - 2 in found and second - 1 not in found:
            found[second - 1] = found[second - 2]
        found[second] = sample
    return found


def _average(values: Sequence[float]) -> float:
    return sum(values) / len(values)


_OVER_REPLICAS: Mapping[str, Callable[[Sequence[float]], float]] = {
    "generated_per_s": sum,
    "prompt_per_s": sum,
    "running": sum,
    "waiting": sum,
    "kv_share": _average,
    "itl_p50": max,
    "itl_p95": max,
}
