"""The dashboard: its numbers are the report's; it works offline, without scripts, with keys."""

import shutil
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from server import load_tokenizer, report_format
from tests.fake_engine import FakeEngine, LiveServer, serving

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
CHROMIUM_FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--hide-scrollbars",
]  # fmt: skip


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
    reply = live.http.get("/dashboard")
    page = Page(reply.text)
    text = " ".join(page.texts)
    for shown in (
        "tiny", "predicted mode", "1.60\u00d7", "40.0 tokens/s", "25.0 tokens/s",
        "measured at start, batch 1", "83.0 %", "61.0 %", "96.40 %", "96.1 to 96.7 %", "99.12 %",
        "42.0 %", "1,234", "120 neurons", "360 neurons", "0 of 16", "0 of 64", "fatrelu(0.1)",
    ):  # fmt: skip
        assert shown in text
    assert "not measured yet" not in text
    assert live.http.get("/").headers["location"] == "/dashboard"


def test_it_loads_nothing_from_elsewhere(live: LiveServer) -> None:
    reply = live.http.get("/dashboard")
    assert reply.headers["content-security-policy"].startswith("default-src 'self'")
    assert "unsafe" not in reply.headers["content-security-policy"]
    page = Page(reply.text)
    assert page.inline == []
    assert page.loads
    for path in page.loads:
        assert path.startswith("/dashboard/static/")
        asset = live.http.get(path)
        assert asset.status_code == 200
        assert "http" not in asset.text.replace("http://www.w3.org/2000/svg", "")
    missing = live.http.get("/dashboard/static/../app.py")
    assert missing.status_code == 404


def test_bars_are_as_long_as_the_numbers(live: LiveServer) -> None:
    html = live.http.get("/dashboard/panels").text
    assert html.count('class="bar natural"') == html.count('class="bar predicted"') == 3
    assert html.count('width="83.0"') == 3
    assert html.count('width="61.0"') == 3
    # recall 0.964, interval 0.961 to 0.967, on an axis from 90 to 100 %
    assert html.count('class="whisker" x="61.0"') == 3
    assert 'width="62.5" height="1"' in html  # dense: 25 of 40 tokens/s


def test_report_json_is_the_engines_report(live: LiveServer) -> None:
    shown = live.http.get("/dashboard/report.json").json()
    report = live.engine.report()
    assert shown.pop("uptime_s") <= report.pop("uptime_s")
    assert shown == report


def test_report_markdown(live: LiveServer) -> None:
    reply = live.http.get("/dashboard/report.md")
    assert reply.headers["content-type"].startswith("text/markdown")
    lines = reply.text.splitlines()
    assert "# tiny in predicted mode" in lines
    row = "83.00 % | 61.00 % | 96.40 % | 99.12 % | 42.00 % | 96.1 to 96.7 % | 1,234 | 40 |"
    assert f"| 2 | {row}" in lines
    assert f"| mean | {row}" in lines
    assert "| predicted | 40.0 tokens/s | 64 |" in lines
    assert "| dense | 25.0 tokens/s | 64 |" in lines
    assert "| ffn | 2.0 s | 50.0 % |" in lines
    header = next(line for line in lines if line.startswith("| layer"))
    assert header.count("|") == f"| 2 | {row}".count("|")


def test_what_was_not_measured_says_so(tokenizer: Any) -> None:
    engine = FakeEngine()
    engine.is_measured = False
    with serving(engine, tokenizer) as live:
        page = live.http.get("/dashboard").text
        markdown = live.http.get("/dashboard/report.md").text
        metrics = live.http.get("/metrics").text
        models = live.http.get("/v1/models").json()
    assert "96" not in page.split("<tbody>")[1].split("</tbody>")[0]
    assert page.count("not measured yet") > 15
    assert "Speed-up over dense: not measured yet. Now: not measured yet." in markdown
    assert "hotneuron_ffn_recall{" not in metrics
    assert "hotneuron_sparse_speedup_ratio{" not in metrics
    assert models["data"][0]["sparsity"]["recall"] is None


def test_text_of_the_report_is_escaped(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine()
    report = engine.report()
    report["model"]["name"] = "<script>alert(1)</script> a|b"
    monkeypatch.setattr(engine, "report", lambda: report)
    with serving(engine, tokenizer) as live:
        assert "<script>alert" not in live.http.get("/dashboard").text
        assert "a\\|b |" in live.http.get("/dashboard/report.md").text


def test_with_keys_the_page_is_open_but_empty(tokenizer: Any) -> None:
    with serving(FakeEngine(), tokenizer, api_keys=("secret",)) as live:
        page = live.http.get("/dashboard")
        assert page.status_code == 200
        assert 'id="key-form"' in page.text
        for datum in ("tiny", "predicted", "fatrelu", "tokens/s"):
            assert datum not in page.text
        for path in ("panels", "report.json", "report.md"):
            url = f"/dashboard/{path}"
            assert live.http.get(url).status_code == 401
            with_key = live.http.get(url, headers={"authorization": "Bearer secret"})
            assert with_key.status_code == 200


def test_numbers_as_people_read_them() -> None:
    assert [report_format.size(v) for v in (None, 0, 1023, 1024, 5 * 2**30)] == [
        "not measured yet", "0 B", "1023 B", "1.0 KiB", "5.0 GiB",
    ]  # fmt: skip
    assert [report_format.seconds(v) for v in (0.24, 61, 7265)] == [
        "0.2 s",
        "1 min 1 s",
        "2 h 1 min",
    ]
    assert report_format.interval(None) == report_format.interval([None, None]) == ""
    shares = report_format.time_shares({"a_s": 1.0, "b_s": None, "c_s": 3.0})
    assert shares == [("a", 1.0, 0.25), ("b", None, None), ("c", 3.0, 0.75)]
    assert report_format.time_shares({"a_s": 0.0}) == [("a", 0.0, None)]


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt-get install chromium)")
def test_in_a_browser(live: LiveServer, tmp_path: Path) -> None:
    """The script runs under the policy, swaps the live panels in and draws the chart."""
    command = [
        str(CHROMIUM), *CHROMIUM_FLAGS, f"--user-data-dir={tmp_path}", "--enable-logging=stderr",
        "--virtual-time-budget=8000", "--dump-dom", live.url + "/dashboard",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    page = Page(done.stdout)
    assert "live" in page.texts
    assert any(text.startswith("Generated per second: ") for text in page.texts)
    assert 'class="line" points="' in done.stdout
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    assert console == []
