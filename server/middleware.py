"""Pure-ASGI middlewares: request id, access log, safe headers, host name, body limit, API key.

They see headers, never the API's types. Pure ASGI, because a `BaseHTTPMiddleware` hides the
client's disconnect from the routes.
"""

import hashlib
import hmac
import logging
import re
import time
import uuid
from collections.abc import Sequence
from contextvars import ContextVar

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError, body_too_large
from .sessions import Sessions

OPEN_PATHS = {"/health", "/ready"}
# The page without any data in it: with API keys set it asks for one (see sessions.py).
SHELL_PATHS = {"/", "/dashboard", "/dashboard/login", "/dashboard/logout"}
SHELL_PREFIX = "/dashboard/static/"
MAX_REQUEST_ID = 128
MAX_HOST = 253  # characters of a name, as the DNS has it
# Asked every few seconds by machines and by the open page: logged at debug level.
QUIET_PATHS = {"/health", "/ready", "/metrics"}
QUIET_PREFIX = "/dashboard"
CLIENT_GONE = 499
SAFE_HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
}

request_id_var: ContextVar[str] = ContextVar("request_id", default="-")
"""The request that the current task works for; log records carry it."""
access_log = logging.getLogger("hotneuron.access")


class RequestIdMiddleware:
    """Echoes the client's x-request-id, or makes one; routes find it in scope["request_id"]."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        given = Headers(scope=scope).get("x-request-id", "")
        is_usable = 0 < len(given) <= MAX_REQUEST_ID and given.isascii() and given.isprintable()
        request_id = scope["request_id"] = given if is_usable else f"req_{uuid.uuid4().hex}"
        request_id_var.set(request_id)  # a server runs each request in a context of its own

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        return await self.app(scope, receive, send_with_id)


class AccessLogMiddleware:
    """One log record for each request: no query, no header, no body, for they may hold secrets."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        start, status = time.monotonic(), CLIENT_GONE

        async def send_noting_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, send_noting_status)
        except Exception:
            status = 500  # answered further out
            raise
        finally:
            seconds = time.monotonic() - start
            path, method = scope["path"], scope["method"]
            is_quiet = path in QUIET_PATHS or path.startswith(QUIET_PREFIX)
            fields = {
                "method": method,
                "path": path,
                "status": status,
                "seconds": round(seconds, 4),
                "client": client_of(scope),
            }
            access_log.log(
                logging.DEBUG if is_quiet else logging.INFO,
                "%s %s %d %.3f s",
                method,
                path.encode("unicode_escape").decode(),  # a line break would forge a record
                status,
                seconds,
                extra=fields,
            )


class SafeHeadersMiddleware:
    """Nothing is sniffed, framed or run in a browser, unless a page's own headers allow it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in SAFE_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await self.app(scope, receive, send_safely)


class HostMiddleware:
    """Refuses requests for a name that is not this server's: such a name is in the address bar of
    a web page that was made to lead here (DNS rebinding)."""

    def __init__(self, app: ASGIApp, *, allowed: Sequence[str]) -> None:
        self.app = app
        self._allowed = {name.lower().rstrip(".") for name in allowed}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        name = _host_name(Headers(scope=scope).get("host", ""))
        if name in self._allowed:
            return await self.app(scope, receive, send)
        refusal = ApiError(
            403,
            f"This server does not answer to the name {name[:MAX_HOST]!r} (the Host header). If it "
            "should, start it with --allowed-host NAME.",
            param="host",
            code="host_not_allowed",
        )
        return await refusal.response()(scope, receive, send)


class BodyLimitMiddleware:
    """Refuses bodies over the limit: by Content-Length at once, otherwise while reading."""

    def __init__(self, app: ASGIApp, *, max_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        refusal = body_too_large(self.max_bytes)
        length = Headers(scope=scope).get("content-length", "")
        if length.isdecimal() and int(length) > self.max_bytes:
            return await refusal.response()(scope, receive, send)
        seen = 0

        async def receive_counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.max_bytes:
                raise refusal
            return message

        return await self.app(scope, receive_counted, send)


class ApiKeys:
    """The keys that open the API, as digests."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [_digest(key) for key in keys]

    def know(self, given: str) -> bool:
        """Compares with every key, so that the time taken says nothing."""
        digest = _digest(given)
        return sum(hmac.compare_digest(digest, known) for known in self._digests) > 0


class ApiKeyMiddleware:
    """Asks for a key (`Authorization: Bearer` or `x-api-key`), or for a page that is signed in, on
    all but the open paths."""

    def __init__(self, app: ASGIApp, *, api_keys: ApiKeys, sessions: Sessions) -> None:
        self.app = app
        self._api_keys, self._sessions = api_keys, sessions

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._is_open(scope["path"]):
            return await self.app(scope, receive, send)
        headers = Headers(scope=scope)
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        if self._api_keys.know(given):
            scope["client_id"] = f"key-{_digest(given).hex()[:12]}"
            return await self.app(scope, receive, send)
        if self._sessions.allows(scope):
            return await self.app(scope, receive, send)
        refusal = ApiError(
            401,
            "Incorrect API key provided."
            if given
            else "You didn't provide an API key; send it as `Authorization: Bearer KEY`.",
            code="invalid_api_key",
            headers={"www-authenticate": 'Bearer realm="hotneuron"'},
        )
        return await refusal.response()(scope, receive, send)

    def _is_open(self, path: str) -> bool:
        return path in OPEN_PATHS or path in SHELL_PATHS or path.startswith(SHELL_PREFIX)


def client_of(scope: Scope) -> str:
    """Whose request it is, for fair queueing and logs: a hash of the API key, or the address."""
    if client_id := scope.get("client_id"):
        return str(client_id)
    address = scope.get("client")
    return str(address[0]) if address else "local"


def _host_name(header: str) -> str:
    """The name or address in a Host header, without port and brackets; "" if there is none."""
    found = re.fullmatch(r"(\[[^\[\]]+\]|[^:]*)(:\d*)?", header.strip().lower())
    return found[1].strip("[]").rstrip(".") if found else ""


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
