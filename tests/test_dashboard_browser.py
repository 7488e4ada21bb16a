"""The page in a real browser: headless Chromium, driven by Playwright.

Skipped where one of them is missing: `make test-browser` installs Playwright, and Chromium comes
from the system's packages.
"""

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from server import load_tokenizer
from tests.fake_engine import FakeEngine, LiveServer, say, serving, wait_until

playwright = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed (make test-browser)"
)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="chromium is not installed (apt-get install chromium)"
)
WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
# Text and what it stands on, in every colour scheme: the contrast that WCAG asks for (AA) is 4.5.
CONTRAST = """() => {
  const parse = (text) => (text.match(/[\\d.]+/g) || []).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const [r, g, b, a = 1] = parse(getComputedStyle(at).backgroundColor);
      if (a === 1) return [r, g, b];
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || element.disabled || !element.checkVisibility()) continue;
    const pair = [light(parse(getComputedStyle(element).color)), light(ground(element))];
    const ratio = (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
    if (ratio < 4.5) found.push([element.textContent.trim().slice(0, 40), ratio.toFixed(2)]);
  }
  return found;
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path) -> Any:
    return load_tokenizer(tiny_model_dir)


@pytest.fixture(scope="module")
def live(tokenizer: Any) -> Iterator[LiveServer]:
    with serving(FakeEngine(say("Paris.")), tokenizer) as live:
        yield live


StartServer = Callable[..., LiveServer]
OpenPage = Callable[..., Any]


@pytest.fixture
def start_server(tokenizer: Any) -> Iterator[StartServer]:
    with ExitStack() as stack:
        yield lambda engine, **settings: stack.enter_context(serving(engine, tokenizer, **settings))


@pytest.fixture
def open_page(browser: Any, start_server: StartServer) -> Iterator[OpenPage]:
    """Opens the dashboard; at the end nothing may have gone wrong or elsewhere in any page.

    Pages are closed before the servers that they show.
    """
    contexts, problems, hosts = [], [], set()

    def visit(live: LiveServer, **settings: Any) -> Any:
        context = browser.new_context(**{"viewport": WIDE, **settings})
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: hosts.add(urlsplit(request.url).hostname))
        page.goto(live.url + "/dashboard")
        return page

    yield visit
    for context in contexts:
        context.close()
    assert problems == []
    assert hosts == {"127.0.0.1"}


def wait_live(page: Any) -> None:
    page.locator("#status.live").wait_for()
    page.locator("#speed-chart canvas").wait_for()


def test_it_comes_alive(live: LiveServer, open_page: OpenPage) -> None:
    page = open_page(live)
    wait_live(page)
    assert page.locator("canvas").count() == 3
    page.locator(".u-legend >> text=25.0 tokens/s").wait_for()  # the dense line
    page.locator("text=Layer by layer, in numbers").click()
    summary = page.locator('[data-live="layers"] details')
    page.wait_for_timeout(2500)  # panels came again
    assert summary.get_attribute("open") is not None
    page.locator(".heat svg").hover(position={"x": 10, "y": 10})
    readout = page.locator("#heat-readout").inner_text()
    assert readout == "Layer 0, neurons 0 to 39: fire for 47 to 53 % of the audited tokens."


def test_it_tells_when_no_answer_comes(tokenizer: Any, browser: Any) -> None:
    with serving(FakeEngine(), tokenizer) as live:
        page = browser.new_context().new_page()
        page.goto(live.url + "/dashboard")
        wait_live(page)
    page.locator("#status.lost").wait_for()
    page.context.close()


@pytest.mark.parametrize("viewport", [WIDE, NARROW], ids=["wide", "narrow"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_and_can_be_read(
    live: LiveServer, open_page: OpenPage, viewport: dict[str, int], scheme: str
) -> None:
    page = open_page(live, viewport=viewport, color_scheme=scheme)
    wait_live(page)
    for summary in page.locator("summary").all():
        summary.click()
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width == viewport["width"]
    assert page.evaluate(CONTRAST) == []


def test_without_scripts(live: LiveServer, open_page: OpenPage) -> None:
    page = open_page(live, java_script_enabled=False, viewport=NARROW)
    assert page.locator(".figure.speedup .value").inner_text() == "1.60\u00d7"
    assert page.locator("svg.sparkline").is_visible()
    for needs_script in ("#chat", "#benchmark", "#theme"):
        assert page.locator(needs_script).is_hidden()


def test_the_theme_is_kept(live: LiveServer, open_page: OpenPage) -> None:
    page = open_page(live, color_scheme="light")
    wait_live(page)
    ground = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(ground)
    for label in ("Theme: light", "Theme: dark"):
        page.locator("#theme").click()
        assert page.locator("#theme").inner_text() == label
    dark = page.evaluate(ground)
    assert dark != light
    page.reload()
    wait_live(page)
    assert page.evaluate(ground) == dark
    page.locator("#theme").click()
    assert page.evaluate(ground) == light


def test_one_question_in_two_modes(start_server: StartServer, open_page: OpenPage) -> None:
    engine = FakeEngine(say("Paris, \u00fcber all."))
    engine.step_seconds = 0.01
    live = start_server(engine)
    page = open_page(live)
    page.locator("#question").fill("Where?")
    page.locator("#chat-form button[type=submit]").click()
    page.locator("#chat-verdict:not(:empty)").wait_for()
    assert page.locator("#chat-verdict").inner_text().endswith("the same answer")
    for box in page.locator(".answer-text").all():
        assert box.inner_text() == "Paris, \u00fcber all."
    for speed in page.locator(".answer-speed").all():
        assert float(speed.inner_text().removesuffix(" tokens/s")) > 0
    assert [request.mode for request in engine.requests] == ["predicted", "dense"]
    page.get_by_label("Mode of answer 2").select_option("exact")
    page.locator("#chat-form button[type=submit]").click()
    wait_until(lambda: len(engine.requests) == 4)
    assert [request.mode for request in engine.requests[2:]] == ["predicted", "exact"]
    rows = page.locator('[data-live="requests"] tbody tr')
    rows.nth(3).wait_for()
    modes = [row.locator("td").first.inner_text() for row in rows.all()]
    assert modes == ["exact", "predicted", "dense", "predicted"]


def test_an_answer_can_be_stopped(start_server: StartServer, open_page: OpenPage) -> None:
    engine = FakeEngine(lambda request: [ord("a")] * 500)
    engine.step_seconds = 0.05
    live = start_server(engine)
    page = open_page(live)
    page.locator("#chat-form button[type=submit]").click()
    page.locator(".answer-text:not(:empty)").first.wait_for()
    page.locator("#chat-stop").click()
    page.locator("#chat-verdict >> text=stopped").wait_for()
    deadline = time.monotonic() + 10
    while not engine.aborted and time.monotonic() < deadline:
        page.wait_for_timeout(50)
    assert len(engine.aborted) == len(engine.requests) == 1


def test_speed_is_measured_by_the_button(start_server: StartServer, open_page: OpenPage) -> None:
    engine = FakeEngine()
    live = start_server(engine)
    page = open_page(live)
    wait_live(page)
    page.locator("#benchmark select").select_option("4")
    page.locator("#benchmark button").click()
    page.locator("text=Measuring: round 3 of 12, batch 4").wait_for()
    assert engine.comparison is not None
    engine.comparison["is_done"] = True
    page.locator("text=Last measured at").wait_for()
    with page.expect_download() as download:
        page.locator(".exports >> text=HTML").click()
    assert "1.60\u00d7" in Path(download.value.path()).read_text(encoding="utf-8")


def test_signing_in(start_server: StartServer, open_page: OpenPage) -> None:
    live = start_server(FakeEngine(), api_keys=("secret",))
    page = open_page(live)
    page.get_by_label("API key").fill("wrong")
    page.locator("text=Sign in").click()
    page.locator("text=does not know this key").wait_for()
    page.get_by_label("API key").fill("secret")
    page.locator("text=Sign in").click()
    wait_live(page)
    assert "secret" not in page.url
    page.locator("#chat-form button[type=submit]").click()
    page.locator("#chat-verdict >> text=the same answer").wait_for()
    page.locator("text=Sign out").click()
    page.get_by_label("API key").wait_for()


def test_a_hidden_page_rests_and_one_that_is_signed_out_asks_again(
    start_server: StartServer, browser: Any
) -> None:
    live = start_server(FakeEngine(), api_keys=("secret",))
    page = browser.new_context().new_page()
    streams = []
    page.on("request", lambda request: streams.append(request.url.endswith("/stream")))
    page.goto(live.url + "/dashboard")
    page.get_by_label("API key").fill("secret")
    page.locator("text=Sign in").click()
    wait_live(page)
    turn = """(hidden) => {
      Object.defineProperty(document, "hidden", { value: hidden, configurable: true });
      document.dispatchEvent(new Event("visibilitychange"));
    }"""
    page.evaluate(turn, True)
    page.evaluate(turn, False)
    wait_live(page)
    assert sum(streams) == 2
    page.context.clear_cookies()
    page.evaluate(turn, True)
    page.evaluate(turn, False)
    page.locator("#status.lost").wait_for()
    page.get_by_label("API key").wait_for()
    page.context.close()
