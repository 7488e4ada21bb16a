"""The engine's report as Prometheus metrics, read when scraped."""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from .figures import time_parts

M = TypeVar("M", CounterMetricFamily, GaugeMetricFamily)
PREFIX = "hotneuron_"
COUNTERS = (
    ("prompt_tokens", "prompt_tokens", "Prompt tokens read"),
    ("generation_tokens", "generated_tokens", "Tokens generated"),
    ("num_preemptions", "preemptions", "Requests that gave way to older ones"),
    ("prefix_cache_queries", "prefix_queried_tokens", "Prompt tokens looked up in the cache"),
    ("prefix_cache_hits", "prefix_hit_tokens", "Prompt tokens found in the cache"),
)
LAYER_GAUGES = {
    "natural_sparsity": "Share of neurons of the layer that are zero, on audited tokens",
    "predicted_sparsity": "Share of neurons of the layer that the predictor skips",
    "recall": "Share of active neurons that were predicted active, on audited tokens",
    "energy_recall": "Share of the layer's output energy that was kept, on audited tokens",
    "precision": "Share of predicted neurons that are active, on audited tokens",
}
LAYER_COUNTERS = {
    "audited_tokens": "Tokens audited",
    "nonfinite_tokens": "Tokens left out of the audit: their activations are not finite",
}
DENSITIES = {
    "active_share": "Share of neurons active for one token, mean over decode steps and layers",
    "united_share": "Share of neurons active for any token of a decode step",
}
GUARD_LEVELS = {"ok": 0, "lowered": 1, "exact": 2}


class EngineCollector:
    """One report per scrape, as metric families. Unmeasured values are left out."""

    def __init__(self, model_name: str, read_report: Callable[[], dict[str, Any]]) -> None:
        self._model_name = model_name
        self._read_report = read_report

    def describe(self) -> list[Metric]:
        return []  # registering must not ask the engine

    def collect(self) -> Iterator[Metric]:
        report = self._read_report()
        queue, totals, speed = report["queue"], report["totals"], report["speed"]
        blocks = report["kv_blocks"]
        yield self._gauge("num_requests_running", "Requests being computed", queue["running"])
        yield self._gauge("num_requests_waiting", "Requests in the queue", queue["waiting"])
        yield self._gauge(
            "kv_cache_usage_perc", "Share of the KV cache in use", blocks["used"] / blocks["total"]
        )
        for name, key, text in COUNTERS:
            yield self._counter(name, text, totals[key])
        yield self._gauge(
            "sparse_speedup_ratio", "Decode speed over the dense mode's, measured", speed["speedup"]
        )
        for key, text in LAYER_GAUGES.items():
            family = GaugeMetricFamily(f"{PREFIX}ffn_{key}", text, labels=("model_name", "layer"))
            for layer in report["layers"]:
                if layer[key] is not None:
                    family.add_metric((self._model_name, str(layer["layer"])), layer[key])
            yield family
        guard = GaugeMetricFamily(
            f"{PREFIX}ffn_guard_level",
            "Drift guard of the layer: 0 ok, 1 threshold lowered, 2 all gates computed",
            labels=("model_name", "layer"),
        )
        for layer in report["layers"]:
            if layer["guard"] is not None:
                level = GUARD_LEVELS[layer["guard"]]
                guard.add_metric((self._model_name, str(layer["layer"])), level)
        yield guard
        for key, text in LAYER_COUNTERS.items():
            counted = self._labelled(CounterMetricFamily, key, text, "layer")
            for layer in report["layers"]:
                counted.add_metric((self._model_name, str(layer["layer"])), layer[key] or 0)
            yield counted
        yield from self._times(report)
        yield from self._densities(report)
        memory = self._labelled(
            GaugeMetricFamily, "memory_bytes", "Memory by what it holds", "kind"
        )
        for kind, size in report["memory"].items():
            memory.add_metric((self._model_name, kind), size)
        yield memory

    def _times(self, report: dict[str, Any]) -> Iterator[Metric]:
        yield self._counter("decode_steps", "Decode steps", report["steps"]["decode"])
        family = self._labelled(
            CounterMetricFamily, "step_seconds", "Time of the engine's steps by part", "part"
        )
        spent = {part.kind: part.seconds for part in time_parts(report)}
        beside = {name: report["time_split"][f"{name}_s"] for name in ("prefill", "audit")}
        for part, seconds in {**spent, **beside}.items():
            if seconds is not None:
                family.add_metric((self._model_name, part), seconds)
        yield family

    def _densities(self, report: dict[str, Any]) -> Iterator[Metric]:
        for key, text in DENSITIES.items():
            family = self._labelled(GaugeMetricFamily, f"ffn_{key}", text, "mode", "batch")
            for row in report["density"]:
                labels = (self._model_name, row["mode"], str(row["batch"]))
                family.add_metric(labels, row[key])
            yield family

    def _labelled(self, kind: type[M], name: str, text: str, *labels: str) -> M:
        return kind(PREFIX + name, text, labels=("model_name", *labels))

    def _gauge(self, name: str, text: str, value: float | None) -> Metric:
        family = GaugeMetricFamily(PREFIX + name, text, labels=("model_name",))
        if value is not None:
            family.add_metric((self._model_name,), value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(PREFIX + name, text, labels=("model_name",))
        family.add_metric((self._model_name,), value)
        return family
