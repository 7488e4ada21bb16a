"""GET /dashboard: the page, its live part, and the report as JSON and Markdown.

Every number comes from `engine.report()`. The live part is rendered here (`panels.html`), so the
page reads without scripts, and the script only fetches it again each second.

With API keys set the page itself stays open but holds no data: it asks for a key, keeps it for the
browser tab alone, and sends it in the Authorization header of its fetches.
"""

import asyncio
import hashlib
from pathlib import Path

import jinja2
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, RedirectResponse
from fastapi.staticfiles import StaticFiles

from . import report_format
from .config import package_version
from .state import server_state

HERE = Path(__file__).parent
STATIC = HERE / "static"
HEADERS = {
    "content-security-policy": "default-src 'self'; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'; object-src 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}
router = APIRouter(include_in_schema=False)


def install(app: FastAPI) -> None:
    pages = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters.update(report_format.FORMATTERS)
    pages.globals.update(
        time_shares=report_format.time_shares,
        guard_notes=report_format.guard_notes,
        settings=report_format.settings,
        scale_start=report_format.scale_start,
        version=package_version(),
        assets_version=_assets_version(),
    )
    app.state.pages = pages
    app.include_router(router)
    app.mount("/dashboard/static", StaticFiles(directory=STATIC), name="static")


def _assets_version() -> str:
    """Changes with the files, so that a browser never mixes an old script with a new page."""
    content = b"".join(path.read_bytes() for path in sorted(STATIC.iterdir()))
    return hashlib.sha256(content).hexdigest()[:12]


@router.get("/")
async def root() -> Response:
    return RedirectResponse("/dashboard")


@router.get("/dashboard")
async def page(request: Request) -> Response:
    state = server_state(request)
    needs_key = bool(state.config.api_keys)
    report = None if needs_key else await asyncio.to_thread(state.engine.report)
    return _html(request, "dashboard.html", needs_key=needs_key, report=report)


@router.get("/dashboard/panels")
async def panels(request: Request) -> Response:
    report = await asyncio.to_thread(server_state(request).engine.report)
    return _html(request, "panels.html", report=report)


@router.get("/dashboard/report.json")
async def report_json(request: Request) -> Response:
    report = await asyncio.to_thread(server_state(request).engine.report)
    return JSONResponse(report, headers=HEADERS)


@router.get("/dashboard/report.md")
async def report_md(request: Request) -> Response:
    report = await asyncio.to_thread(server_state(request).engine.report)
    text = report_format.report_markdown(report)
    return PlainTextResponse(text, headers=HEADERS, media_type="text/markdown")


def _html(request: Request, template: str, **values: object) -> Response:
    text = request.app.state.pages.get_template(template).render(**values)
    return HTMLResponse(text, headers=HEADERS)
