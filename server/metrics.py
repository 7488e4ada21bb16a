"""Prometheus metrics of one app: latencies seen here, the rest read from the engine when scraped.

Names are vLLM's with our prefix, so its dashboards work after replacing the prefix.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.exposition import generate_latest

from .answer_times import AnswerTimes, EndedAnswer
from .engine_metrics import PREFIX, EngineCollector
from .errors import CLIENT_LIMIT, QUEUE_FULL

LATENCY_BUCKETS = (0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48)
E2E_BUCKETS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
TOKEN_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)
FINISH_REASONS = ("stop", "length", "abort", "error")
PHASES = {
    "queue": "From submitting a request until it is computed",
    "prefill": "From the queue's end to the first token",
    "decode": "From the first token to the end of the answer",
}


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
        self._phases = {
            phase: self._histogram(f"request_{phase}_time", text, E2E_BUCKETS)
            for phase, text in PHASES.items()
        }
        self._inference = self._histogram(
            "request_inference_time", "From the queue's end to the end of the answer", E2E_BUCKETS
        )
        self._prompt_tokens = self._histogram(
            "request_prompt_tokens", "Prompt tokens of a request", TOKEN_BUCKETS, unit=""
        )
        self._generation_tokens = self._histogram(
            "request_generation_tokens", "Tokens of an answer", TOKEN_BUCKETS, unit=""
        )
        self._max_tokens = self._histogram(
            "request_params_max_tokens", "max_tokens where given", TOKEN_BUCKETS, unit=""
        )
        self._finished = self._counter("request_success", "Answers ended", "finished_reason")
        for reason in FINISH_REASONS:
            self._finished.labels(model_name, reason)
        self._refused = self._counter("admission_rejections", "Requests refused", "reason")
        for reason in (QUEUE_FULL, CLIENT_LIMIT):
            self._refused.labels(model_name, reason)
        self.registry.register(EngineCollector(model_name, read_report))

    def _histogram(
        self, name: str, text: str, buckets: Sequence[float], unit: str = "_seconds"
    ) -> Histogram:
        return Histogram(
            f"{PREFIX}{name}{unit}",
            text,
            labelnames=("model_name",),
            buckets=buckets,
            registry=self.registry,
        ).labels(self._model_name)

    def _counter(self, name: str, text: str, label: str) -> Counter:
        return Counter(
            f"{PREFIX}{name}_total",
            f"{text}, by {label}",
            labelnames=("model_name", label),
            registry=self.registry,
        )

    def token_came(self, times: AnswerTimes, at: float) -> None:
        if times.last_token is None:
            self.time_to_first_token.observe(at - times.submitted)
        else:
            self.inter_token_latency.observe(at - times.last_token)

    def answer_ended(self, answer: EndedAnswer) -> None:
        times = answer.times
        end = times.ended or time.perf_counter()
        self._finished.labels(self._model_name, answer.reason).inc()
        self._e2e.observe(end - times.submitted)
        for phase, (start, stop) in times.phases().items():
            self._phases[phase].observe(stop - start)
        if times.admitted is not None:
            self._inference.observe(end - times.admitted)
        self._prompt_tokens.observe(answer.num_prompt_tokens)
        self._generation_tokens.observe(answer.num_tokens)
        if answer.max_tokens is not None:
            self._max_tokens.observe(answer.max_tokens)

    def refused(self, reason: str) -> None:
        self._refused.labels(self._model_name, reason).inc()

    def exposition(self) -> bytes:
        return generate_latest(self.registry)
