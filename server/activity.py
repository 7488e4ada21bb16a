"""What the dashboard tells of single requests: the last ones, and their latencies.

Written on the event loop as answers begin, go on and end; bounded, so that it never grows.
"""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import takewhile
from typing import Any

from .answer_times import AnswerTimes, EndedAnswer

WINDOW_SECONDS = 900.0
MAX_REQUESTS = 200
MAX_SAMPLES = 20_000
PERCENTILES = (50, 95, 99)


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


class Latencies:
    """Values with their times; figures are of the last quarter of an hour."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, float]] = deque(maxlen=MAX_SAMPLES)

    def add(self, value: float, now: float | None = None) -> None:
        self._samples.append((time.time() if now is None else now, value))

    def figures(self, seconds: float = WINDOW_SECONDS, now: float | None = None) -> dict[str, Any]:
        """{"count", "p50", "p95", "p99"}; without samples the percentiles are None."""
        since = (time.time() if now is None else now) - seconds
        newest_first = takewhile(lambda sample: sample[0] >= since, reversed(self._samples))
        values = sorted(value for _, value in newest_first)
        points = {f"p{p}": percentile(values, p) for p in PERCENTILES}
        return {"count": len(values), **points}


def percentile(values: Sequence[float], p: int) -> float | None:
    """Nearest rank: the smallest of the sorted values that at least p percent do not exceed."""
    if not values:
        return None
    return values[-(-len(values) * p // 100) - 1]


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

    def report(self, num_requests: int = MAX_REQUESTS) -> dict[str, Any]:
        """Latencies, and the last requests, newest first."""
        newest = list(self.requests)[-num_requests:][::-1]
        return {
            "window_s": WINDOW_SECONDS,
            "queue_s": self.queue_s.figures(),
            "ttft_s": self.ttft_s.figures(),
            "itl_s": self.itl_s.figures(),
            "requests": [asdict(request) for request in newest],
        }
