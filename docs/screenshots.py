"""Takes the pictures of the dashboard in this folder, of a real server with some traffic.

make screenshots                     the default model; needs Chromium (apt-get install chromium)
python docs/screenshots.py MODEL
"""

import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
from PIL import Image
from playwright.sync_api import Browser, sync_playwright

FOLDER = Path(__file__).parent
MAX_BYTES = 200 << 10
# name: width, height (None: the whole page), colour scheme
PICTURES: dict[str, tuple[int, int | None, Any]] = {
    "dashboard-light": (1280, 1560, "light"),
    "dashboard-dark": (1280, None, "dark"),
    "dashboard-narrow": (390, 1560, "light"),
}
QUESTIONS = (
    "What is the capital of France?", "Why is the sky blue?", "Write a short story about a fox.",
    "How do bees make honey?", "Explain what a prime number is.", "Describe a day at the sea.",
    "What do plants need to grow?", "Tell me about the moon.",
)  # fmt: skip


@contextmanager
def server(model: str) -> Iterator[str]:
    """The URL of a server of its own, which is ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("hotneuron")), "serve", model]
    process = subprocess.Popen([*command, "--port", str(port), "--log-level", "warning"])
    url = f"http://127.0.0.1:{port}"
    try:
        while not is_ready(url):
            if process.poll() is not None:
                raise SystemExit("the server ended before it was ready")
            time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        process.wait()


def is_ready(url: str) -> bool:
    try:
        return httpx.get(url + "/ready").status_code == 200
    except httpx.TransportError:
        return False


def ask(url: str, question: str) -> None:
    messages = [{"role": "user", "content": question}]
    body = {"messages": messages, "max_tokens": 96, "temperature": 0.7, "seed": 1}
    httpx.post(url + "/v1/chat/completions", json=body, timeout=120).raise_for_status()


def make_traffic(url: str) -> None:
    """Answers one by one, then two, four and eight at a time."""
    for at_once in (1, 2, 4, 8):
        with ThreadPoolExecutor(at_once) as clients:
            list(clients.map(lambda question: ask(url, question), QUESTIONS))


def take(browser: Browser, url: str, name: str) -> None:
    width, height, scheme = PICTURES[name]
    page = browser.new_page(viewport={"width": width, "height": height or 900}, color_scheme=scheme)
    page.goto(url + "/dashboard")
    page.locator("#speed-chart canvas").wait_for()
    page.locator("#question").fill(QUESTIONS[1])
    page.locator("#chat-form button[type=submit]").click()
    page.locator("#chat-verdict:not(:empty)").wait_for(timeout=120_000)
    page.wait_for_timeout(2500)  # until the panels know of it
    page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
    picture = Image.open(BytesIO(page.screenshot(full_page=height is None)))
    page.close()
    path = FOLDER / f"{name}.png"
    # Few pixels have a line's colour: the usual method would spend all colours on shades of grey.
    small = picture.convert("RGB").quantize(
        method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE
    )
    small.save(path, optimize=True)
    size = path.stat().st_size
    print(f"{path}: {size >> 10} KiB")
    if size > MAX_BYTES:
        raise SystemExit(f"{path} is larger than {MAX_BYTES >> 10} KiB")


def main() -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    with (
        server(sys.argv[1] if len(sys.argv) > 1 else "default") as url,
        sync_playwright() as driver,
    ):
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        make_traffic(url)
        for name in PICTURES:
            take(browser, url, name)
        browser.close()


if __name__ == "__main__":
    main()
