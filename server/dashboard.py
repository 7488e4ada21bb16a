"""GET /dashboard: the page, its stream of news, and the report as JSON, Markdown and HTML.

Every number comes from `engine.report()`, from `activity` and from `history`, and stands in
report.json too. The panels are rendered here, so the page reads without scripts; the script swaps
those that changed and draws charts of the history.

With API keys set the page asks for one and signs in with it (see sessions.py).
"""

import asyncio
import hashlib
import json
import time
from base64 import b64encode
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import parse_qs

import jinja2
from fastapi import APIRouter, FastAPI, Header, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, RedirectResponse
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel, ConfigDict, Field

from runtime.errors import InvalidRequest

from . import charts, figures, formats
from .config import package_version
from .errors import ApiError
from .gateway import Gateway, Phase
from .report_markdown import report_markdown
from .sessions import PAGE_HEADER
from .state import ServerState, server_state
from .streaming import EventStream

HERE = Path(__file__).parent
STATIC = HERE / "static"
POLICY = (
    "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; "
    "object-src 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}
# Each is a template. Those that are slow to render and slow to change come less often.
PANELS = (
    "headline", "replicas", "speed", "benchmark", "layers", "heat", "time", "memory", "density",
    "traffic", "requests", "settings",
)  # fmt: skip
FAST_PANELS = tuple(name for name in PANELS if name not in ("layers", "heat", "settings"))
SLOW_SAMPLES = 5
PANEL_SAMPLES = 2
BENCHMARK_ROUNDS = 12
BENCHMARK_TOKENS = 16  # per round and sequence
BENCHMARK_SECONDS = 20.0  # then no more rounds are begun
router = APIRouter(include_in_schema=False)


def install(app: FastAPI) -> None:
    pages = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters.update(formats.FORMATTERS)
    version = _assets_version()
    pages.globals.update(
        charts=charts,
        figures=figures,
        now=time.time,
        version=package_version(),
        assets=f"/dashboard/static/{version}",
    )
    app.state.pages = pages
    app.include_router(router)
    app.mount(f"/dashboard/static/{version}", StaticFiles(directory=STATIC), name="static")


def _assets_version() -> str:
    """Changes with the files, so that a browser never mixes an old script with a new page."""
    files = sorted(path for path in STATIC.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


async def _full_report(state: ServerState) -> dict[str, Any]:
    return await asyncio.to_thread(state.full_report)


@router.get("/")
async def root() -> Response:
    return RedirectResponse("/dashboard")


@router.get("/dashboard")
async def page(request: Request) -> Response:
    state = server_state(request)
    needs_key = bool(state.config.api_keys)
    is_open = not needs_key or state.sessions.allows(request.scope)
    report = await _full_report(state) if is_open else None
    theme = request.cookies.get("hotneuron-theme")
    text = _render(
        request,
        "dashboard.html",
        report=report,
        can_sign_out=needs_key,
        refused="refused" in request.query_params,
        theme=theme if theme in ("light", "dark") else None,
    )
    return HTMLResponse(text, headers=HEADERS)


@router.post("/dashboard/login")
async def login(request: Request) -> Response:
    state = server_state(request)
    fields = parse_qs((await request.body()).decode("utf-8", "replace"))
    key = fields.get("key", [""])[0].strip()
    if not state.api_keys.know(key):
        return RedirectResponse("/dashboard?refused", 303, HEADERS)
    response = RedirectResponse("/dashboard", 303, HEADERS)
    state.sessions.start(response, is_https=request.url.scheme == "https")
    return response


@router.post("/dashboard/logout")
async def logout(request: Request) -> Response:
    response = RedirectResponse("/dashboard", 303, HEADERS)
    server_state(request).sessions.end(response)
    return response


@router.get("/dashboard/stream")
async def stream(request: Request) -> Response:
    return EventStream(_news(request), on_close=lambda: None)


async def _news(request: Request) -> AsyncIterator[str]:
    """Server-sent events: the history once, then each sample, and the panels that changed.

    Ends when the server drains: an open page must not hold up its end.
    """
    state = server_state(request)
    state.history.start()
    gateway: Gateway | None = getattr(request.state, "gateway", None)
    report = await _full_report(state)
    yield _event("history", report["history"])
    last = _samples(report)[-1:]
    shown: dict[str, str] = {}
    number = 0
    while gateway is None or gateway.phase is not Phase.DRAINING:
        if number % PANEL_SAMPLES == 0:
            names = PANELS if number % (PANEL_SAMPLES * SLOW_SAMPLES) == 0 else FAST_PANELS
            fresh = _panels(request, names, report)
            yield _event("panels", {k: v for k, v in fresh.items() if shown.get(k) != v})
            shown |= fresh
        await state.history.next()
        report = await _full_report(state)
        for sample in _samples(report):
            if not last or sample["at"] > last[0]["at"]:
                yield _event("sample", sample)
                last = [sample]
        number += 1


def _samples(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    columns = report["history"]
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _panels(request: Request, names: tuple[str, ...], report: Mapping[str, Any]) -> dict[str, str]:
    shown = [name for name in names if name != "replicas" or report["replicas"]]
    return {name: _render(request, f"panels/{name}.html", report=report) for name in shown}


def _event(name: str, data: Any) -> str:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"


class BenchmarkRequest(BaseModel):
    """POST /dashboard/benchmark."""

    model_config = ConfigDict(extra="forbid")
    batch: int = Field(default=1, ge=1)


@router.post("/dashboard/benchmark", status_code=202)
async def benchmark(
    body: BenchmarkRequest,
    request: Request,
    page_header: Annotated[str | None, Header(alias=PAGE_HEADER)] = None,
) -> Response:
    """Begin to measure this mode against dense; it runs when no request does."""
    if page_header is None:
        raise ApiError(403, f"Send the header {PAGE_HEADER}: 1.", code="page_header_missing")
    state = server_state(request)
    most = state.engine.config.max_batch
    if body.batch > most:
        raise ApiError(
            400, f"batch must be at most {most} (--max-batch)", param="batch", code="invalid_value"
        )
    try:
        state.engine.compare_speed(
            body.batch, BENCHMARK_ROUNDS, BENCHMARK_TOKENS, BENCHMARK_SECONDS
        )
    except InvalidRequest as error:
        raise ApiError(409, str(error), code="benchmark_running") from error
    return JSONResponse({"status": "started"}, 202, HEADERS)


@router.get("/dashboard/report.json")
async def report_json(request: Request) -> Response:
    return JSONResponse(await _full_report(server_state(request)), headers=HEADERS)


@router.get("/dashboard/report.md")
async def report_md(request: Request) -> Response:
    text = report_markdown(await _full_report(server_state(request)))
    return PlainTextResponse(text, headers=HEADERS, media_type="text/markdown")


@router.get("/dashboard/report.html")
async def report_html(request: Request) -> Response:
    """One file that needs no other: styles and drawings are in it."""
    style = (STATIC / "dashboard.css").read_text(encoding="utf-8")
    report = await _full_report(server_state(request))
    text = _render(request, "report.html", report=report, style=style)
    digest = b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'"
    name = "hotneuron-report.html"
    headers = {"content-disposition": f'inline; filename="{name}"'}
    return HTMLResponse(text, headers={**HEADERS, **headers, "content-security-policy": policy})


def _render(request: Request, template: str, **values: object) -> str:
    pages: jinja2.Environment = request.app.state.pages
    return pages.get_template(template).render(**values)
