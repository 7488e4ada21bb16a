"""The listening socket, and the HTTP server on it in a thread of its own.

The main thread keeps the signals, the loading and the end of the process.
"""

import errno
import socket
import ssl
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn

from .console import UserError

if TYPE_CHECKING:
    from starlette.types import ASGIApp

BACKLOG = 2048
CLOSE_SECONDS = 2  # for answers to reach their clients when nothing is computed any more


def bind(host: str, port: int) -> socket.socket:
    """Take the address now, so that a port in use shows before a model is loaded."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Only of sockets that name their protocol does asyncio turn off the waiting for more to send,
    # which holds up every piece of an answer behind the first by 40 ms.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(BACKLOG)
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


class HttpServer:
    """Serves `app` on the listener between `with` and its end."""

    def __init__(
        self,
        app: "ASGIApp",
        listener: socket.socket,
        *,
        tls_cert: Path | None = None,
        tls_key: Path | None = None,
    ) -> None:
        config = uvicorn.Config(
            app,
            log_config=None,  # the process's own logging
            log_level="warning",
            access_log=False,  # written by the app, with request ids
            lifespan="on",
            server_header=False,
            timeout_graceful_shutdown=CLOSE_SECONDS,
            ssl_certfile=tls_cert,
            ssl_keyfile=tls_key,
        )
        try:
            config.load()
        except (ssl.SSLError, OSError) as error:
            raise UserError(
                f"--tls-cert {tls_cert} and --tls-key {tls_key} cannot be used ({error}): they "
                "take PEM files of a certificate (with its chain) and of its unencrypted key"
            ) from error
        self._server = uvicorn.Server(config)
        self._listener = listener
        self._thread = threading.Thread(target=self._run, name="http", daemon=True)

    def __enter__(self) -> "HttpServer":
        self._thread.start()
        while not self._server.started:
            if not self._thread.is_alive():
                raise RuntimeError("the HTTP server ended before it started; its log has the cause")
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join()

    def _run(self) -> None:
        self._server.run(sockets=[self._listener])
