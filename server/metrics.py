"""Prometheus metrics of one app: latencies seen here, the rest read from the engine when scraped.

Names are vLLM's with our prefix, so its dashboards work after replacing the prefix.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import generate_latest

PREFIX = "hotneuron_"
LATENCY_BUCKETS = (0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48)
E2E_BUCKETS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
LAYER_GAUGES = {
    "natural_sparsity": "Share of neurons of the layer that are zero, on audited tokens",
    "predicted_sparsity": "Share of neurons of the layer that the predictor skips",
    "recall": "Share of active neurons that were predicted active, on audited tokens",
    "energy_recall": "Share of the layer's output energy that was kept, on audited tokens",
    "precision": "Share of predicted neurons that are active, on audited tokens",
}
GUARD_LEVELS = {"ok": 0, "lowered": 1, "exact": 2}


class Metrics:
    """Owns the registry. `read_report` is the engine's `report`."""

    def __init__(self, model_name: str, read_report: Callable[[], dict[str, Any]]) -> None:
        self.registry = CollectorRegistry()
        self._model_name = model_name
        self._read_report = read_report
        self.time_to_first_token = self._histogram(
            "time_to_first_token", "From submitting a request to its first token", LATENCY_BUCKETS
        )
        self.inter_token_latency = self._histogram(
            "inter_token_latency", "Between two tokens of one answer", LATENCY_BUCKETS
        )
        self._e2e = self._histogram(
            "e2e_request_latency", "From submitting a request to the end of its answer", E2E_BUCKETS
        )
        self._finished = Counter(
            PREFIX + "request_success_total",
            "Answers ended, by reason",
            labelnames=("model_name", "finished_reason"),
            registry=self.registry,
        )
        for reason in ("stop", "length", "abort", "error"):
            self._finished.labels(model_name, reason)
        self.registry.register(_EngineCollector(model_name, read_report))

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(
            f"{PREFIX}{name}_seconds",
            text,
            labelnames=("model_name",),
            buckets=buckets,
            registry=self.registry,
        ).labels(self._model_name)

    def finished(self, reason: str, seconds: float) -> None:
        self._finished.labels(self._model_name, reason).inc()
        self._e2e.observe(seconds)

    def exposition(self) -> bytes:
        return generate_latest(self.registry)


class _EngineCollector:
    """One report per scrape, as metric families. Unmeasured values are left out."""

    def __init__(self, model_name: str, read_report: Callable[[], dict[str, Any]]) -> None:
        self._model_name = model_name
        self._read_report = read_report

    def describe(self) -> list[Metric]:
        return []  # registering must not ask the engine

    def collect(self) -> Iterator[Metric]:
        report = self._read_report()
        queue, totals, speed = report["queue"], report["totals"], report["speed"]
        yield self._gauge("num_requests_running", "Requests being computed", queue["running"])
        yield self._gauge("num_requests_waiting", "Requests in the queue", queue["waiting"])
        yield self._counter("prompt_tokens", "Prompt tokens read", totals["prompt_tokens"])
        yield self._counter("generation_tokens", "Tokens generated", totals["generated_tokens"])
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
        audited = CounterMetricFamily(
            PREFIX + "audited_tokens", "Tokens audited", labels=("model_name", "layer")
        )
        for layer in report["layers"]:
            audited.add_metric(
                (self._model_name, str(layer["layer"])), layer["audited_tokens"] or 0
            )
        yield audited

    def _gauge(self, name: str, text: str, value: float | None) -> Metric:
        family = GaugeMetricFamily(PREFIX + name, text, labels=("model_name",))
        if value is not None:
            family.add_metric((self._model_name,), value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(PREFIX + name, text, labels=("model_name",))
        family.add_metric((self._model_name,), value)
        return family
