"""The outermost app: it answers while the model loads and while the server drains.

One port from the first second to the last. `open` puts the API behind it, `drain` refuses new work
while answers under way go on; /health says alive all along, /ready only in between.
"""

import asyncio
import time
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from enum import StrEnum
from typing import Any

from fastapi import FastAPI
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from .errors import ApiError
from .middleware import RequestIdMiddleware

RETRY_WHILE_LOADING = "5"  # seconds
RETRY_WHILE_DRAINING = "1"  # another replica, or the next process, answers then


class Phase(StrEnum):
    """What the server is doing."""

    LOADING = "loading"
    SERVING = "serving"
    DRAINING = "draining"


class Gateway:
    """An ASGI app with a lifespan. `say`, `open` and `drain` may be called from any thread."""

    def __init__(self) -> None:
        self.phase = Phase.LOADING
        self._doing = "starting"
        self._since = time.monotonic()
        self._app: FastAPI | None = None
        self._app_state: dict[str, Any] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lifespans = AsyncExitStack()
        self._num_open = 0

    def say(self, doing: str) -> None:
        """What the start is at, for those who ask /ready."""
        self._doing = doing

    def open(self, app: FastAPI) -> None:
        """Serve `app` from now on; returns when its lifespan has begun."""
        assert self._loop is not None, "open() needs a running server"
        asyncio.run_coroutine_threadsafe(self._open(app), self._loop).result()

    async def _open(self, app: FastAPI) -> None:
        lifespan: AbstractAsyncContextManager[Any] = app.router.lifespan_context(app)
        state: Mapping[str, Any] | None = await self._lifespans.enter_async_context(lifespan)
        self._app_state = dict(state or {})
        self._app = app
        self.phase = Phase.SERVING

    def drain(self) -> None:
        """Refuse new work; what is under way goes on."""
        self.phase = Phase.DRAINING

    @property
    def num_open(self) -> int:
        """Requests for work that are not answered to the end. Pages and reports do not count."""
        return self._num_open

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self._lifespan(receive, send)
        if scope["type"] != "http":
            return None
        if answer := self._own_answer(scope["path"], scope["method"]):
            return await RequestIdMiddleware(answer)(scope, receive, send)
        assert self._app is not None, "without an app every answer is the gateway's own"
        is_work = scope["method"] == "POST"
        self._num_open += is_work
        try:
            scope["state"] = {**self._app_state, "gateway": self}
            await self._app(scope, receive, send)
        finally:
            self._num_open -= is_work

    def _own_answer(self, path: str, method: str) -> ASGIApp | None:
        """What is answered here; None leaves it to the app."""
        if self.phase is Phase.LOADING:
            if path == "/health":
                return JSONResponse({"status": "loading"})
            seconds = round(time.monotonic() - self._since)
            return ApiError(
                503,
                f"The server is starting: {self._doing} ({seconds} s so far).",
                code="model_loading",
                headers={"retry-after": RETRY_WHILE_LOADING},
            ).response()
        if self.phase is Phase.DRAINING and (path == "/ready" or method == "POST"):
            return ApiError(
                503,
                "The server is shutting down and takes no new requests.",
                code="server_shutting_down",
                headers={"retry-after": RETRY_WHILE_DRAINING, "connection": "close"},
            ).response()
        return None

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        self._loop = asyncio.get_running_loop()
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self._lifespans.aclose()
        await send({"type": "lifespan.shutdown.complete"})
