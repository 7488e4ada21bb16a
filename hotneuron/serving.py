"""From settings to a loaded service, and from a ready one to its end."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from .console import note, warn
from .loading import load_engine, measure_speeds
from .signals import StopSignals

if TYPE_CHECKING:
    from fastapi import FastAPI

    from runtime import Engine, EngineConfig
    from server import Gateway, ServerConfig
    from server.tracing import Tracing

POLL_SECONDS = 0.1
CRASH_SECONDS = 5.0  # after a crash: for waiting clients and probes to be told
STOPPED, CRASHED = 0, 1  # exit statuses


def load_service(
    engine_config: "EngineConfig",
    server_config: "ServerConfig",
    *,
    measure: bool,
    say: Callable[[str], None],
    tracing: "Tracing | None" = None,
) -> tuple["Engine", "FastAPI"]:
    """The engine, not started yet, and the app around it. `say` is told what is being done."""
    from server import create_app, load_tokenizer, read_default_sampling

    folder = engine_config.model_dir
    say("loading the tokenizer")
    tokenizer = load_tokenizer(folder)
    say("loading the weights")
    engine = load_engine(engine_config)
    sampling = read_default_sampling(folder)
    server_config = replace(server_config, default_sampling=sampling)
    app = create_app(engine, tokenizer, server_config, tracing=tracing)
    if measure:
        say("measuring the decode speed")
        measure_speeds(engine)
    return engine, app


def serve_until_stopped(
    engine: "Engine", gateway: "Gateway", signals: StopSignals, shutdown_timeout: float
) -> int:
    """Wait for a signal, then for the answers under way, at most `shutdown_timeout` seconds.

    Returns the exit status. An engine that dies ends the process, so that a supervisor starts it
    anew: whoever waits has been answered with the error by then.
    """
    while signals.received is None:
        if not engine.is_alive() and not engine.is_recovering:
            warn("the engine has stopped, see the log above; the server ends")
            time.sleep(CRASH_SECONDS)
            return CRASHED
        time.sleep(POLL_SECONDS)
    gateway.drain()
    note(f"{signals.received.name}: {gateway.num_open} requests have {shutdown_timeout:g} s to end")
    deadline = time.monotonic() + shutdown_timeout
    while gateway.num_open and engine.is_alive() and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    if gateway.num_open:
        warn(f"{gateway.num_open} requests are ended now")
    return STOPPED if engine.is_alive() else CRASHED
