"""`create_app`: puts routes, middlewares and error handlers together around an engine.

Owns no engine: who made it starts and stops it.
"""

from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from . import dashboard, info_routes, responses, routes
from .activity import Activity
from .answer_times import AnswerObserver
from .config import ServerConfig, package_version
from .errors import install_error_handlers
from .grammars import LLGuidance
from .history import History
from .metrics import Metrics
from .middleware import (
    AccessLogMiddleware,
    ApiKeyMiddleware,
    BodyLimitMiddleware,
    HostMiddleware,
    RequestIdMiddleware,
    SafeHeadersMiddleware,
)
from .state import EngineLike, ServerState
from .text import TextCodec
from .tracing import Tracing, TracingMiddleware


def create_app(
    engine: EngineLike,
    tokenizer: Any,
    config: ServerConfig,
    *,
    tracing: Tracing | None = None,
) -> FastAPI:
    """The ASGI app. `tokenizer` is a fast `transformers` tokenizer (see `load_tokenizer`)."""
    codec, report = TextCodec(tokenizer), engine.report()
    metrics, activity = Metrics(config.model_name, engine.report), Activity()
    observers: list[AnswerObserver] = [metrics, activity]
    if tracing is not None:
        observers.append(tracing)
    state = ServerState(
        engine=engine,
        codec=codec,
        grammars=LLGuidance(codec.tokenizer_json, engine.eos_token_ids),
        grammar_threads=ThreadPoolExecutor(4, thread_name_prefix="grammar"),
        config=config,
        metrics=metrics,
        activity=activity,
        history=History(engine.report, activity),
        observers=observers,
        mode=report["mode"],
        model_fingerprint=str(report["model"].get("fingerprint") or "unknown"),
    )

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, ServerState]]:
        async with state.history.running():
            try:
                yield {"server": state}
            finally:
                state.grammars.close()
                state.grammar_threads.shutdown()

    middleware = [
        Middleware(RequestIdMiddleware),
        Middleware(AccessLogMiddleware),
        Middleware(SafeHeadersMiddleware),
    ]
    if config.allowed_hosts:
        middleware.append(Middleware(HostMiddleware, allowed=config.allowed_hosts))
    if config.cors_origins:
        # Outside the keys: a browser asks for leave without one.
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=config.cors_origins,
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
                expose_headers=["x-request-id", "retry-after"],
            )
        )
    if config.api_keys:
        middleware.append(
            Middleware(ApiKeyMiddleware, api_keys=state.api_keys, sessions=state.sessions)
        )
    if tracing is not None:
        middleware.append(Middleware(TracingMiddleware, tracing=tracing))
    middleware.append(Middleware(BodyLimitMiddleware, max_bytes=config.max_body_bytes))
    app = FastAPI(
        title="hotneuron",
        version=package_version(),
        lifespan=lifespan,
        middleware=middleware,
        docs_url=None,  # FastAPI's pages load their scripts from a CDN
        redoc_url=None,
    )
    app.state.server = state
    install_error_handlers(app)
    app.include_router(routes.router)
    app.include_router(responses.router)
    app.include_router(info_routes.router)
    dashboard.install(app)
    return app
