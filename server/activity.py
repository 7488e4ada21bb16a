"""What the dashboard tells of single requests: the last ones, and their latencies.

Written on the event loop as answers begin, go on and end; bounded, so that it never grows.
"""

import math
import time
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import takewhile
from typing import Any

from .answer_times import AnswerTimes, EndedAnswer

WINDOW_SECONDS = 900.0
MAX_REQUESTS = 200
MAX_SAMPLES = 20_000
PERCENTILES = (50, 95, 99)
BUCKET_RATIO = 1.05  # of the bounds of neighbouring buckets
LEAST_SECONDS = 1e-6  # what is shorter counts as this


@dataclass(frozen=True)
class AnsweredRequest:
    """One answer that has ended."""

    id: str
    ended_at: float  # Unix time
    mode: str
    prompt_tokens: int
    completion_tokens: int
    ttft_s: float | None  # None: it ended before its first token
    seconds: float
    tokens_per_s: float | None  # between its first and last token; None below two
    finish_reason: str


Histogram = Sequence[tuple[float, int]]
"""(upper bound in seconds, values), of the buckets that have any."""


class Latencies:
    """Values with their times; figures are of the last quarter of an hour."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, float]] = deque(maxlen=MAX_SAMPLES)

    def add(self, value: float, now: float | None = None) -> None:
        self._samples.append((time.time() if now is None else now, value))

    def figures(self, seconds: float = WINDOW_SECONDS, now: float | None = None) -> dict[str, Any]:
        """{"count", "p50", "p95", "p99"}; without samples the percentiles are None."""
        values = sorted(self._values(seconds, now))
        points = {f"p{p}": percentile(values, p) for p in PERCENTILES}
        return {"count": len(values), **points}

    def histogram(self) -> Histogram:
        """What can be added to the histograms of other replicas."""
        buckets = Counter(
            math.ceil(math.log(max(value, LEAST_SECONDS), BUCKET_RATIO))
            for value in self._values(WINDOW_SECONDS)
        )
        return [(BUCKET_RATIO**bucket, count) for bucket, count in sorted(buckets.items())]

    def _values(self, seconds: float, now: float | None = None) -> list[float]:
        since = (time.time() if now is None else now) - seconds
        samples = list(self._samples)  # at once: the event loop goes on adding
        return [v for _, v in takewhile(lambda sample: sample[0] >= since, reversed(samples))]


def percentile(values: Sequence[float], p: int) -> float | None:
    """Nearest rank: the smallest of the sorted values that at least p percent do not exceed."""
    if not values:
        return None
    return values[-(-len(values) * p // 100) - 1]


def histogram_figures(histograms: Iterable[Histogram]) -> dict[str, Any]:
    """As `Latencies.figures`, of all their values; percentiles are right to half a bucket."""
    counts: Counter[float] = Counter()
    for histogram in histograms:
        for upper, count in histogram:
            counts[upper] += count
    total = counts.total()
    figures: dict[str, Any] = {"count": total, **{f"p{p}": None for p in PERCENTILES}}
    seen = 0
    for upper in sorted(counts):
        before, seen = seen, seen + counts[upper]
        for p in PERCENTILES:
            if before < -(-total * p // 100) <= seen:
                figures[f"p{p}"] = upper / math.sqrt(BUCKET_RATIO)
    return figures


@dataclass
class Activity:
    """Owned by the app's state; an `AnswerObserver`."""

    queue_s: Latencies = field(default_factory=Latencies)
    ttft_s: Latencies = field(default_factory=Latencies)
    itl_s: Latencies = field(default_factory=Latencies)
    requests: deque[AnsweredRequest] = field(default_factory=lambda: deque(maxlen=MAX_REQUESTS))

    def token_came(self, times: AnswerTimes, at: float) -> None:
        if times.last_token is None:
            self.ttft_s.add(at - times.submitted)
        else:
            self.itl_s.add(at - times.last_token)

    def answer_ended(self, answer: EndedAnswer) -> None:
        times = answer.times
        end = times.ended or time.perf_counter()
        if times.admitted is not None:
            self.queue_s.add(times.admitted - times.submitted)
        ttft_s = tokens_per_s = None
        if times.first_token is not None and times.last_token is not None:
            ttft_s, decode_s = (
                times.first_token - times.submitted,
                times.last_token - times.first_token,
            )
            tokens_per_s = (answer.num_tokens - 1) / decode_s if decode_s > 0 else None
        self.requests.append(
            AnsweredRequest(
                id=answer.request_id,
                ended_at=time.time(),
                mode=answer.mode,
                prompt_tokens=answer.num_prompt_tokens,
                completion_tokens=answer.num_tokens,
                ttft_s=ttft_s,
                seconds=end - times.submitted,
                tokens_per_s=tokens_per_s,
                finish_reason=answer.reason,
            )
        )

    def report(self, *, with_histograms: bool = False) -> dict[str, Any]:
        """Latencies, and the last requests, newest first. Any thread may ask."""
        latencies = {"queue_s": self.queue_s, "ttft_s": self.ttft_s, "itl_s": self.itl_s}
        return {
            "window_s": WINDOW_SECONDS,
            **{
                key: {"histogram": of_one.histogram()} if with_histograms else of_one.figures()
                for key, of_one in latencies.items()
            },
            "requests": [asdict(request) for request in reversed(list(self.requests))],
        }
