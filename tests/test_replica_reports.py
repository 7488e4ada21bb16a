"""Several replicas as one service: report, page and metrics hold them all, also who is down."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from server import load_tokenizer
from server.activity import Latencies, histogram_figures
from server.history import COLUMNS
from server.merged_report import merge_histories, merge_reports
from server.replica_news import ReplicaNews
from tests.fake_engine import CHAT, HI, FakeEngine, LiveServer, serving


class ThreeReplicas:
    """The one that a test asks, one beside it, and one that is down."""

    name = "mine"
    num_configured = 3
    num_up = 2

    def __init__(self, told: ReplicaNews) -> None:
        self.told = told

    def others(self) -> Sequence[ReplicaNews]:
        packed = self.told.packed()
        return [
            ReplicaNews.unpack("near", True, 0.5, packed),
            ReplicaNews.unpack("gone", False, 75.0, packed),
        ]


@pytest.fixture(scope="module")
def live(tiny_model_dir: Path) -> Iterator[LiveServer]:
    """Every replica has answered the same two questions."""
    with serving(FakeEngine(), load_tokenizer(tiny_model_dir)) as live:
        for _ in range(2):
            live.http.post(CHAT, json={"messages": HI})
        state = live.app.state.server
        state.replicas = ThreeReplicas(state.own_news("theirs"))
        yield live


def test_report_adds_up(live: LiveServer) -> None:
    report = live.http.get("/dashboard/report.json").json()
    own = live.engine.report()
    assert report["totals"] == {key: 3 * value for key, value in own["totals"].items()}
    assert report["totals"]["requests"] == 6
    assert report["queue"]["max_batch"] == 2 * own["queue"]["max_batch"]
    assert report["memory"]["attention"] == 2 * own["memory"]["attention"]
    assert report["steps"]["decode"] == 3 * own["steps"]["decode"]
    assert report["mean"]["audited_tokens"] == 3 * 1234
    assert report["mean"]["recall"] == pytest.approx(own["mean"]["recall"])
    low, high = report["layers"][0]["recall_ci95"]  # three times the tokens
    assert (high - low) * 3**0.5 == pytest.approx(0.006)
    assert report["density"][1]["steps"] == 3 * own["density"][1]["steps"]
    assert report["served_speeds"][0]["tokens_per_s"] == pytest.approx(30.0)
    assert report["speed"]["live_tokens_per_s"] == 2 * own["speed"]["live_tokens_per_s"]
    assert report["activity"]["ttft_s"]["count"] == 6
    assert len(report["activity"]["requests"]) == 6
    rows = {row["name"]: row["is_up"] for row in report["replicas"]["rows"]}
    assert rows == {"mine": True, "near": True, "gone": False}
    assert (report["replicas"]["up"], report["replicas"]["configured"]) == (2, 3)


def test_page_and_exports_name_the_one_that_is_down(live: LiveServer) -> None:
    for path in ("/dashboard", "/dashboard/report.html", "/dashboard/report.md"):
        text = live.http.get(path).text
        assert "down, last heard of 1 min 15 s ago" in text, path
        assert "2 of 3" in text, path
    assert live.http.get("/ready").json() == {"status": "ok", "replicas_up": 2, "replicas": 3}


def test_metrics_say_who_is_down_and_leave_out_what_it_had(live: LiveServer) -> None:
    families = text_string_to_metric_families(live.http.get("/metrics").text)
    samples = [sample for family in families for sample in family.samples]
    found: dict[str, dict[str, float]] = {}
    for sample in samples:
        found.setdefault(sample.name, {})[sample.labels.get("replica", "")] = sample.value
    assert found["hotneuron_replica_up"] == {"mine": 1, "near": 1, "gone": 0}
    assert found["hotneuron_replicas_configured"] == {"": 3}
    assert found["hotneuron_prompt_tokens_total"].keys() == {"mine", "near"}
    assert found["hotneuron_time_to_first_token_seconds_count"] == {"mine": 2, "near": 2}


def test_a_measurement_is_the_last_one(live: LiveServer) -> None:
    mine, theirs = (live.app.state.server.own_news(name) for name in ("mine", "theirs"))
    speed: dict[str, Any] = {**theirs.report["speed"], "measured_at": 1.8e9, "speedup": 2.0}
    theirs = replace(theirs, report={**theirs.report, "speed": speed})
    assert merge_reports([mine, theirs], 2)["speed"]["speedup"] == 2.0


def test_percentiles_of_several_are_those_of_all_their_values() -> None:
    parts, together = [Latencies(), Latencies()], Latencies()
    for i in range(1, 1001):
        parts[i % 2].add(i * i / 1e6)
        together.add(i * i / 1e6)
    merged, right = histogram_figures(part.histogram() for part in parts), together.figures()
    assert merged["count"] == right["count"] == 1000
    for key in ("p50", "p95", "p99"):
        assert merged[key] == pytest.approx(right[key], rel=0.025)
    assert histogram_figures([[]]) == {"count": 0, "p50": None, "p95": None, "p99": None}


def history(start: float, rates: Sequence[float | None], step: float = 1.0) -> dict[str, Any]:
    columns: dict[str, Any] = {key: [0.5] * len(rates) for key in COLUMNS}
    at = [start + i * step for i in range(len(rates))]
    return {**columns, "at": at, "generated_per_s": list(rates)}


def test_histories_are_added_by_second() -> None:
    now = float(int(time.time()))
    up = history(now, [None, 10.0, 20.0, 30.0])
    late = history(now + 1.2, [None, 2.0])  # has told less, and is waited for
    gone = history(now, [5.0, 5.0])
    merged = merge_histories([up, late, gone], [True, True, False])
    assert merged["at"] == [now, now + 1, now + 2]
    assert merged["generated_per_s"] == [5.0, 15.0, 22.0]
    assert merged["kv_share"] == [0.5, 0.5, 0.5]
    assert merged["running"] == [1.0, 1.5, 1.0]
    # Samples are a little more than a second apart: now and then a second has none of its own.
    slow = merge_histories([history(now + 0.75, [1.0, 2.0, 3.0], step=1.25)], [True])
    assert slow["at"] == [now, now + 1, now + 2, now + 3]
    assert slow["generated_per_s"] == [1.0, 1.0, 2.0, 3.0]
    assert merge_histories([history(now, [])], [True])["at"] == []
