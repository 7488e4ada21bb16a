"""The listening socket and the uvicorn server on it."""

import errno
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

from .console import UserError

if TYPE_CHECKING:
    from fastapi import FastAPI

BACKLOG = 2048


def bind(host: str, port: int) -> socket.socket:
    """Take the address now, so that a port in use shows before a model is loaded."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise _cannot_listen(error, host, port) from error
    return listener


def _cannot_listen(error: OSError, host: str, port: int) -> UserError:
    if error.errno == errno.EADDRINUSE:
        return UserError(
            f"port {port} on {host} is in use: choose another with --port (0 takes any free one), "
            "or stop the program that has it"
        )
    if error.errno == errno.EACCES:
        return UserError(f"port {port} needs privileges: choose one above 1023 with --port")
    return UserError(f"cannot listen on {host}:{port} ({error}): check --host")


def run_server(
    app: "FastAPI",
    listener: socket.socket,
    *,
    log_level: str,
    drain_seconds: float,
    on_ready: Callable[[], None],
) -> None:
    """Serve until SIGINT or SIGTERM; open answers get `drain_seconds` to end."""
    import uvicorn

    try:
        # Only now: clients that come while the model loads are refused at once, and do not hang.
        # Another server may have bound the port meanwhile, if neither was listening.
        listener.listen(BACKLOG)
    except OSError as error:
        raise _cannot_listen(error, *listener.getsockname()[:2]) from error

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            on_ready()

    config = uvicorn.Config(
        app,
        log_level=log_level,
        access_log=log_level == "debug",
        timeout_graceful_shutdown=max(1, round(drain_seconds)),
    )
    Server(config).run(sockets=[listener])
