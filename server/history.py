"""The last quarter of an hour, one sample a second: what the dashboard's charts are drawn from.

Samples are differences of the engine's counters, so nothing is lost between two of them.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from .activity import Activity

LENGTH = 900
PERIOD_SECONDS = 1.0
LATENCY_SECONDS = 30.0  # the latencies of a sample are those of so long before it
COLUMNS = (
    "at", "generated_per_s", "prompt_per_s", "running", "waiting", "kv_share", "itl_p50", "itl_p95",
)  # fmt: skip
Sample = dict[str, float | None]


class History:
    """Written on the event loop only."""

    def __init__(self, read_report: Callable[[], dict[str, Any]], activity: Activity) -> None:
        self._read_report = read_report
        self._activity = activity
        self._last: tuple[float, Mapping[str, int]] | None = None
        self.samples: deque[Sample] = deque(maxlen=LENGTH)
        self._sampled = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Samples are taken meanwhile."""
        self.start()
        try:
            yield
        finally:
            if self._task is not None:
                self._task.cancel()
                await asyncio.gather(self._task, return_exceptions=True)

    def start(self) -> None:
        """Take samples from now on, if they are not taken yet: not every server runs a lifespan."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        while True:
            self.add(await asyncio.to_thread(self._read_report))
            await asyncio.sleep(PERIOD_SECONDS)

    async def next(self) -> Sample:
        """The next sample, as soon as there is one."""
        await self._sampled.wait()
        return self.samples[-1]

    def add(self, report: dict[str, Any], now: float | None = None) -> None:
        at, totals = time.time() if now is None else now, report["totals"]
        queue, memory = report["queue"], report["memory"]
        latency = self._activity.itl_s.figures(LATENCY_SECONDS, at)
        self.samples.append(
            {
                "at": round(at, 3),
                "generated_per_s": self._rate("generated_tokens", at, totals),
                "prompt_per_s": self._rate("prompt_tokens", at, totals),
                "running": queue["running"],
                "waiting": queue["waiting"],
                "kv_share": memory["kv_taken"] / memory["kv_budget"],
                "itl_p50": latency["p50"],
                "itl_p95": latency["p95"],
            }
        )
        self._last = (at, totals)
        self._sampled.set()
        self._sampled = asyncio.Event()

    def _rate(self, key: str, at: float, totals: Mapping[str, int]) -> float | None:
        if self._last is None or at <= self._last[0]:
            return None
        before_at, before = self._last
        return round((totals[key] - before[key]) / (at - before_at), 2)

    def columns(self) -> dict[str, list[float | None]]:
        """The samples by column, oldest first. Any thread may ask."""
        samples = list(self.samples)  # at once: the event loop goes on adding
        return {key: [sample[key] for sample in samples] for key in COLUMNS}


def history_means(generated_per_s: Sequence[float | None]) -> list[dict[str, float | None]]:
    """Tokens per second over the last 1, 5 and 15 minutes; shorter where there is less."""
    rows = []
    for minutes in (1, 5, 15):
        rates = [rate for rate in generated_per_s[-60 * minutes :] if rate is not None]
        busy = [rate for rate in rates if rate > 0]
        rows.append(
            {
                "minutes": minutes,
                "seconds": len(rates),
                "generated_per_s": sum(rates) / len(rates) if rates else None,
                "busy_share": len(busy) / len(rates) if rates else None,
                "generated_per_busy_s": sum(busy) / len(busy) if busy else None,
            }
        )
    return rows
