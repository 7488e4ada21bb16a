"""The dashboard: its numbers are the report's; it works offline, without scripts, with keys."""

import base64
import hashlib
import json
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.responses import Response

from runtime import Engine, EngineConfig
from runtime.hybrid_meter import HYBRID_PARTS
from server import charts, figures, formats, load_tokenizer
from server.activity import Activity, percentile
from server.answer_times import AnswerTimes, EndedAnswer
from server.history import History, history_means
from server.sessions import COOKIE, LIFETIME_SECONDS, Sessions
from tests.fake_engine import CHAT, HI, FakeEngine, LiveServer, error_of, serving

FROM_PAGE = {"x-hotneuron-page": "1"}


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path) -> Any:
    return load_tokenizer(tiny_model_dir)


@pytest.fixture(scope="module")
def live(tokenizer: Any) -> Iterator[LiveServer]:
    with serving(FakeEngine(), tokenizer) as live:
        yield live


class Page(HTMLParser):
    """What a page shows and what it loads."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.loads: list[str] = []
        self.inline: list[str] = []
        self._inside = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside = tag
        given = dict(attrs)
        self.inline += [name for name in given if name == "style" or name.startswith("on")]
        if tag in ("script", "link", "img", "svg") and (given.get("src") or given.get("href")):
            self.loads.append(str(given.get("src") or given["href"]))

    def handle_data(self, data: str) -> None:
        if self._inside in ("script", "style") and data.strip():
            self.inline.append(data)
        elif data.strip():
            self.texts.append(" ".join(data.split()))


def test_the_page_reads_without_scripts(live: LiveServer) -> None:
    text = " ".join(Page(live.http.get("/dashboard").text).texts)
    for shown in (
        "tiny", "predicted", "1.60\u00d7", "1.55 to 1.65, 95 % interval", "64 tokens in each mode",
        "40.0 tokens/s", "25.0 tokens/s", "8 rounds of 8 tokens", "83.0 %", "61.0 %", "96.4 %",
        "96.1 to 96.7 %", "99.12 %", "99.00 to 99.24 %", "42.0 %", "1,234 audited tokens",
        "45.0 KiB", "135.0 KiB", "fatrelu(0.1)", "up and down", "17.0 %", "41.0 %",
    ):  # fmt: skip
        assert shown in text, shown
    assert "not measured yet" not in text
    assert live.http.get("/").headers["location"] == "/dashboard"


def test_it_loads_nothing_from_elsewhere(live: LiveServer) -> None:
    reply = live.http.get("/dashboard")
    policy = reply.headers["content-security-policy"]
    assert policy.startswith("default-src 'self'")
    assert "unsafe" not in policy
    page = Page(reply.text)
    assert page.inline == []
    assert page.loads
    for path in page.loads:
        assert path.startswith("/dashboard/static/")
        asset = live.http.get(path)
        assert asset.status_code == 200
        assert "@import" not in asset.text
    folder = page.loads[0].rpartition("/")[0]
    assert live.http.get(f"{folder}/uplot/LICENSE").text.startswith("The MIT License")
    assert live.http.get(f"{folder}/../app.py").status_code == 404


def test_drawings_are_the_numbers() -> None:
    assert charts.bars([0.25, None, 1.0], width=0.5) == (
        "M0.25 100h0.5v-25h-0.5zM2.25 100h0.5v-100h-0.5z"
    )
    # recall 0.96 on an axis from 0.9 to 1; beyond the axis is its end
    assert charts.dots([0.96, None, 0.5], 0.9, 1.0) == "M0.5 40h0M2.5 100h0"
    assert charts.whiskers([[0.95, 0.97], None], 0.9, 1.0) == "M0.5 50V30"
    assert charts.line([1.0, None, 0.0, 0.5], 0, 1) == "M0.5 0M2.5 100L3.5 50"
    assert charts.area([None, 1.0], 0, 1) == "M0.5 100L0.5 100L1.5 0L1.5 100z"
    assert charts.area([], 0, 1) == ""
    assert charts.level(0.25, 0, 1, 7) == "M0 75H7"
    assert charts.heat([[0.5, 0.5, 0.0], [0.25, 0.5, 0.01]]) == [
        (4, "M0 1h1v1h-1z"),
        (9, "M0 0h2v1h-2zM1 1h1v1h-1z"),
    ]
    assert charts.heat([[0.0]]) == []
    assert charts.hot_edge([40, 0], num_neurons=160, num_groups=8) == "M2 0v1M0 1v1"
    assert charts.stack({"a": 1.0, "b": 3.0}) == [("a", 0.0, 25.0), ("b", 25.0, 75.0)]


def test_report_json_is_the_engines_report_and_more(live: LiveServer) -> None:
    shown = live.http.get("/dashboard/report.json").json()
    report = live.engine.report()
    assert shown.pop("uptime_s") <= report.pop("uptime_s")
    added = {"activity", "history", "history_means", "server", "replicas"}
    assert {key: shown[key] for key in report} == report
    assert set(shown) - set(report) == added
    assert len(shown["history"]["at"]) == len(shown["history"]["running"])


def test_report_markdown(live: LiveServer) -> None:
    reply = live.http.get("/dashboard/report.md")
    assert reply.headers["content-type"].startswith("text/markdown")
    lines = reply.text.splitlines()
    assert "# tiny in predicted mode" in lines
    assert "| predicted | 40.0 tokens/s | 64 |" in lines
    row = "| 83.00 % | 61.00 % | 96.40 % | 99.12 % | 42.00 % | 96.1 to 96.7 % | 1,234 | 40 |"
    assert f"| 2 {row}" in lines
    assert f"| mean {row}" in lines
    header = next(line for line in lines if line.startswith("| layer"))
    assert header.count("|") == f"| 2 {row}".count("|")
    assert "| predicted | 4 | 50 | 17.0 % | 41.0 % | 120.0 |" in lines
    assert any(line.startswith("Speed-up over dense: 1.60\u00d7, 1.55 to 1.65") for line in lines)


def test_report_html_needs_no_other_file(live: LiveServer) -> None:
    reply = live.http.get("/dashboard/report.html")
    page = Page(reply.text)
    assert page.loads == []
    (style,) = page.inline
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = reply.headers["content-security-policy"]
    assert policy == f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'"
    assert "http" not in reply.text
    assert reply.text.count("<svg") > 8
    text = " ".join(page.texts)
    assert "1.60\u00d7" in text
    assert "96.40 %" in text


def test_what_was_not_measured_says_so(tokenizer: Any) -> None:
    engine = FakeEngine()
    engine.is_measured = False
    with serving(engine, tokenizer) as live:
        page = live.http.get("/dashboard").text
        markdown = live.http.get("/dashboard/report.md").text
        html = live.http.get("/dashboard/report.html").text
        metrics = live.http.get("/metrics").text
        models = live.http.get("/v1/models").json()
    for text in (page, html):
        assert "96.4" not in text
        assert text.count("not measured yet") > 15
        assert "No token decoded yet." in text
        assert "a share of the tokens it generates is audited" in text
    assert "Speed-up over dense: not measured yet. Now: not measured yet." in markdown
    assert "hotneuron_ffn_recall{" not in metrics
    assert "hotneuron_sparse_speedup_ratio{" not in metrics
    assert models["data"][0]["sparsity"]["recall"] is None


def test_before_the_first_audit_it_shows_what_training_measured(tokenizer: Any) -> None:
    engine = FakeEngine()
    engine.is_measured = False
    report = engine.report()
    report["training"] = {
        "natural_sparsity": 0.8, "predicted_sparsity": 0.75, "recall": 0.955,
        "energy_recall": 0.995, "tokens": 4066,
    }  # fmt: skip
    engine.report = lambda: report  # type: ignore[method-assign]
    with serving(engine, tokenizer) as live:
        text = " ".join(Page(live.http.get("/dashboard").text).texts)
    assert "95.5 % at training, 4,066 held-out tokens; nothing audited here yet" in text
    assert "75.0 % 80.0 % are truly zero" in text
    report["mode"] = "exact"
    assert figures.quality(report)[1] == "nowhere"
    report["mean"] = {**report["mean"], "natural_sparsity": 0.8}
    assert figures.quality(report)[1] == "serving"


def test_text_of_the_report_is_escaped(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine()
    report = engine.report()
    report["model"]["name"] = "<script>alert(1)</script> a|b"
    monkeypatch.setattr(engine, "report", lambda: report)
    with serving(engine, tokenizer) as live:
        for path in ("/dashboard", "/dashboard/report.html"):
            assert "<script>alert" not in live.http.get(path).text
        assert "a\\|b |" in live.http.get("/dashboard/report.md").text


def events_of(http: httpx.Client, count: int) -> list[tuple[str, Any]]:
    """The first events of the stream."""
    found: list[tuple[str, Any]] = []
    with http.stream("GET", "/dashboard/stream") as reply:
        assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
        name = ""
        for line in reply.iter_lines():
            kind, _, value = line.partition(": ")
            if kind == "event":
                name = value
            elif kind == "data":
                found.append((name, json.loads(value)))
            if len(found) == count:
                return found
    raise AssertionError("the stream ended")


def test_the_stream_brings_samples_and_what_changed(tokenizer: Any) -> None:
    with serving(FakeEngine(), tokenizer) as live:
        (history, _), (panels, first), (sample, row), _, (again, second) = events_of(live.http, 5)
        page = live.http.get("/dashboard").text
    assert [history, panels, sample, again] == ["history", "panels", "sample", "panels"]
    assert row["running"] == 0
    assert "1.60\u00d7" in first["headline"]
    for name in first:
        assert f'data-live="{name}"' in page
    assert "headline" not in second  # unchanged


def test_a_measurement_is_started_from_the_page(tokenizer: Any) -> None:
    engine = FakeEngine()
    with serving(engine, tokenizer) as live:
        url = "/dashboard/benchmark"
        refused = live.http.post(url, json={})
        assert (refused.status_code, error_of(refused)["code"]) == (403, "page_header_missing")
        too_large = live.http.post(url, json={"batch": 17}, headers=FROM_PAGE)
        assert (too_large.status_code, error_of(too_large)["param"]) == (400, "batch")
        assert live.http.post(url, json={"batch": 0}, headers=FROM_PAGE).status_code == 400
        assert engine.comparison is None
        assert live.http.post(url, json={"batch": 4}, headers=FROM_PAGE).status_code == 202
        assert "Measuring: round 3 of 12, batch 4" in live.http.get("/dashboard").text
        busy = live.http.post(url, json={}, headers=FROM_PAGE)
        assert (busy.status_code, error_of(busy)["code"]) == (409, "benchmark_running")


def test_with_keys_the_page_asks_for_one(tokenizer: Any) -> None:
    chat = {"model": "tiny", "messages": HI}
    with serving(FakeEngine(), tokenizer, api_keys=("first", "secret")) as live:
        http = live.http
        page = http.get("/dashboard")
        assert page.status_code == 200
        assert 'name="key"' in page.text
        for datum in ("tiny", "predicted", "fatrelu", "tokens/s"):
            assert datum not in page.text
        for path in ("stream", "report.json", "report.md", "report.html"):
            assert http.get(f"/dashboard/{path}").status_code == 401
        with_key = {"authorization": "Bearer secret"}
        assert http.get("/dashboard/report.json", headers=with_key).status_code == 200
        for fields in ({"key": "wrong"}, {"key": ""}, {}, {"other": "secret"}):
            refused = http.post("/dashboard/login", data=fields)
            assert refused.headers["location"] == "/dashboard?refused"
            assert "set-cookie" not in refused.headers
        assert "does not know this key" in http.get("/dashboard?refused").text
        entered = http.post("/dashboard/login", data={"key": "secret"})
        assert (entered.status_code, entered.headers["location"]) == (303, "/dashboard")
        cookie = entered.headers["set-cookie"]
        assert "secret" not in cookie
        assert {"HttpOnly", "SameSite=strict"} <= set(cookie.split("; "))
        assert http.cookies[COOKIE]
        assert "1.60\u00d7" in http.get("/dashboard").text
        assert http.get("/dashboard/report.json").status_code == 200
        # What changes something also needs a header that no other site's form can send.
        assert http.post(CHAT, json=chat).status_code == 401
        assert http.post(CHAT, json=chat, headers=FROM_PAGE).status_code == 200
        http.post("/dashboard/logout")
        assert http.get("/dashboard/report.json").status_code == 401
        http.cookies.set(COOKIE, "made-up")
        assert http.get("/dashboard/report.json").status_code == 401


def test_sessions_end_and_are_signed() -> None:
    now = 1000.0

    def clock() -> float:
        return now

    def scope(cookie: str, method: str = "GET", *more: tuple[bytes, bytes]) -> dict[str, Any]:
        return {"method": method, "headers": [(b"cookie", cookie.encode("latin-1")), *more]}

    sessions = Sessions(("b", "a"), clock)
    response = Response()
    sessions.start(response, is_https=True)
    assert "Secure" in response.headers["set-cookie"]
    cookie = response.headers["set-cookie"].split(";")[0]
    assert sessions.allows(scope(cookie))
    assert Sessions(("a", "b"), clock).allows(scope(cookie))  # a replica, or after a restart
    assert not Sessions(("a",), clock).allows(scope(cookie))  # a key was withdrawn
    assert not Sessions((), clock).allows(scope(cookie))
    page = (b"x-hotneuron-page", b"1")
    assert not sessions.allows(scope(cookie, "POST"))
    assert sessions.allows(scope(cookie, "POST", page))
    name, _, value = cookie.partition("=")
    end, _, signature = value.partition(".")
    later = int(end) + 1
    for forged in (
        "", "x", f"{name}=", f"{name}={end}", f"{name}={end}.", f"{name}={later}.{signature}",
        f"{name}={end}.\u00fc", f"{name}=\u00b2.{signature}", f"{name}=-1.{signature}", "a=\"b",
    ):  # fmt: skip
        assert not sessions.allows(scope(forged)), forged
    now += LIFETIME_SECONDS + 1
    assert not sessions.allows(scope(cookie))


def test_samples_are_differences_of_the_counters() -> None:
    engine = FakeEngine()
    report = engine.report()
    engine.stop()
    history = History(lambda: report, Activity())
    for at, tokens in ((100.0, 0), (101.0, 30), (103.0, 130), (104.0, 130)):
        report["totals"]["generated_tokens"] = tokens
        history.add({**report, "totals": dict(report["totals"])}, now=at)
    assert history.columns()["generated_per_s"] == [None, 30.0, 50.0, 0.0]
    minute = history_means(history.columns()["generated_per_s"])[0]
    assert (minute["seconds"], minute["generated_per_s"]) == (3, pytest.approx(80 / 3))
    assert minute["generated_per_busy_s"] == 40.0


def test_requests_and_their_latencies() -> None:
    activity = Activity()
    times = AnswerTimes(submitted=10.0, admitted=10.25)
    for i, at in enumerate((10.5, 10.6, 10.8)):
        activity.token_came(times, at)
        times.first_token = times.first_token or at
        times.last_token = at
        times.ended = at
        assert activity.ttft_s.figures()["count"] == 1
        assert activity.itl_s.figures()["count"] == i
    activity.answer_ended(EndedAnswer("a", "exact", "stop", 7, 3, None, times))
    activity.answer_ended(EndedAnswer("b", "dense", "abort", 5, 0, 9, AnswerTimes(1.0, ended=3.0)))
    newest, oldest = activity.report()["requests"]
    assert activity.report()["queue_s"] == {"count": 1, "p50": 0.25, "p95": 0.25, "p99": 0.25}
    assert (newest["id"], newest["ttft_s"], newest["tokens_per_s"]) == ("b", None, None)
    assert newest["seconds"] == 2.0
    assert oldest["mode"] == "exact"
    assert oldest["ttft_s"] == pytest.approx(0.5)
    assert oldest["tokens_per_s"] == pytest.approx(2 / 0.3)
    assert activity.itl_s.figures()["p99"] == pytest.approx(0.2)
    assert [percentile(range(1, 101), p) for p in (50, 95, 99)] == [50, 95, 99]
    assert [percentile([4.0], p) for p in (50, 99)] == [4.0, 4.0]
    assert percentile([], 50) is None


def test_an_answered_request_is_shown(tokenizer: Any) -> None:
    with serving(FakeEngine(), tokenizer) as live:
        live.http.post(CHAT, json={"model": "tiny", "messages": HI}).raise_for_status()
        (row,) = live.http.get("/dashboard/report.json").json()["activity"]["requests"]
        page = live.http.get("/dashboard").text
    assert (row["mode"], row["finish_reason"], row["completion_tokens"]) == ("predicted", "stop", 7)
    assert row["id"] in page


def keys_of(value: Any) -> Any:
    """The shape of a report: its keys, and those of the first of each list."""
    if isinstance(value, dict):
        return {key: keys_of(item) for key, item in value.items()}
    return [keys_of(value[0])] if isinstance(value, list) and value else None


@pytest.mark.parametrize("mode", ["predicted", "dense"])
def test_it_shows_a_real_engine(
    make_sparse_model: Callable[..., Path], tokenizer: Any, mode: Any
) -> None:
    """And the engine of the tests above reports what a real one does."""
    config = EngineConfig(make_sparse_model("gate"), mode=mode, threads=1, audit_rate=1.0)
    engine, fake = Engine.from_config(config), FakeEngine()
    fake.comparison = engine.compare_speed(rounds=3, round_tokens=1).report()
    engine.start()
    with serving(engine, tokenizer) as live:
        live.http.post(CHAT, json={"model": "tiny", "messages": HI}).raise_for_status()
        shape, expected = (
            keys_of(live.http.get("/dashboard/report.json").json()),
            keys_of(fake.report()),
        )
        for path in ("/dashboard", "/dashboard/report.html", "/dashboard/report.md"):
            assert live.http.get(path).status_code == 200
        (_, _), (_, panels) = events_of(live.http, 2)
    fake.stop()
    assert "audited tokens" in panels["layers"]
    if mode == "predicted":
        assert {key: shape[key] for key in expected} == expected


def test_numbers_as_people_read_them() -> None:
    assert [formats.size(v) for v in (None, 0, 1023, 1024, 5 * 2**30)] == [
        "not measured yet", "0 B", "1023 B", "1.0 KiB", "5.0 GiB",
    ]  # fmt: skip
    assert [formats.seconds(v) for v in (0.24, 61, 7265)] == ["0.2 s", "1 min 1 s", "2 h 1 min"]
    assert [formats.milliseconds(v) for v in (None, 0.0012, 0.0123, 0.123, 12.3)] == [
        "not measured yet", "1.20 ms", "12.3 ms", "123 ms", "12,300 ms",
    ]  # fmt: skip
    assert formats.interval(None) == ""
    assert formats.interval([0.5, 0.75], 0) == "50 to 75 %"
    assert formats.clock(3723.0) == "01:02:03 UTC"


def test_time_is_split_as_far_as_it_is_known() -> None:
    engine = FakeEngine()
    report = engine.report()
    engine.stop()
    parts = {part.kind: part for part in figures.time_parts(report)}
    assert sum(part.share or 0 for part in parts.values()) == pytest.approx(1.0)
    assert parts["gate"].per_step == pytest.approx(0.9 / 150)
    assert parts["other"].seconds == pytest.approx(0.2)  # of the step and of the FFN
    assert "ffn" not in parts
    *_, (name, start, width) = figures.stack_of(list(parts.values()))
    assert (name, start + width) == ("other", pytest.approx(100, abs=0.01))
    report["ffn_split"] = None
    parts = {part.kind: part for part in figures.time_parts(report)}
    assert parts["ffn"].seconds == 2.0
    assert "gate" not in parts
    report["time_split"] = dict.fromkeys(report["time_split"], 0.0)
    assert {part.share for part in figures.time_parts(report)} == {None}


def test_batches_are_told_as_far_as_they_are_known() -> None:
    def speed(mode: str, batch: int) -> dict[str, Any]:
        return {"mode": mode, "batch": batch, "steps": 5, "tokens_per_s": 40.0}

    counted = {"mode": "exact", "batch": 2, "steps": 4, "active_share": 0.2, "united_share": 0.3}
    report = {
        "density": [counted],
        "served_speeds": [speed("mixed", 3), speed("exact", 10), speed("exact", 2)],
    }
    batches = figures.batches(report)
    assert list(batches) == ["exact", "mixed"]
    two, ten = batches["exact"]
    assert two == {**counted, **speed("exact", 2)}
    assert (ten["batch"], ten["active_share"]) == (10, None)


def test_layers_on_both_devices(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine()
    report = engine.report()
    per_step = {key: 0.001 * (i + 1) for i, key in enumerate(HYBRID_PARTS)}
    report["hybrid_split"] = {"timed_steps": 7, "every": 32, "layers": 2, "per_step": per_step}
    monkeypatch.setattr(engine, "report", lambda: report)
    with serving(engine, tokenizer) as live:
        text = " ".join(Page(live.http.get("/dashboard").text).texts)
    assert "2 layers on both devices" in text
    assert "transfer to the host 2.00 ms" in text
    assert "one step in 32 is timed, 7 so far" in text


def test_modes_to_compare() -> None:
    every = ["dense", "exact", "predicted"]
    for mode, modes, chosen in (
        ("predicted", every, ["predicted", "dense"]),
        ("exact", every, ["exact", "dense"]),
        ("dense", every, ["predicted", "dense"]),
        ("dense", ["dense", "exact"], ["exact", "dense"]),
        ("dense", ["dense"], ["dense"]),
    ):
        assert figures.chat_modes({"mode": mode, "modes": modes}) == chosen


def test_each_device_has_a_bar() -> None:
    engine = FakeEngine()
    report = engine.report()
    engine.stop()
    (host,) = figures.memory_bars(report)
    assert host["parts"]["cold"] == 138240
    report["devices"]["accelerator"] = "Test GPU"
    gpu, host = figures.memory_bars(report)
    assert (gpu["device"], gpu["parts"]["hot"]) == ("Test GPU", 46080)
    assert host["parts"] == {"cold": 138240}
