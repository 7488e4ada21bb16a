"""Pure-ASGI middlewares: request id, body limit, API key. They see headers, never the API's types.

Pure ASGI, because a `BaseHTTPMiddleware` hides the client's disconnect from the routes.
"""

import hashlib
import hmac
import uuid
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError, body_too_large

OPEN_PATHS = {"/health", "/ready"}
# The page without any data in it: with API keys set it asks for one and sends it with each fetch.
SHELL_PATHS = {"/", "/dashboard"}
SHELL_PREFIX = "/dashboard/static/"
MAX_REQUEST_ID = 128


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

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        return await self.app(scope, receive, send_with_id)


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


class ApiKeyMiddleware:
    """Asks for a key (`Authorization: Bearer` or `x-api-key`) on all but the open paths."""

    def __init__(self, app: ASGIApp, *, api_keys: Sequence[str]) -> None:
        self.app = app
        self._digests = [_digest(key) for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._is_open(scope["path"]):
            return await self.app(scope, receive, send)
        headers = Headers(scope=scope)
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        if self._is_known(given):
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

    def _is_known(self, given: str) -> bool:
        """Compares with every key, so that the time taken says nothing."""
        digest = _digest(given)
        return sum(hmac.compare_digest(digest, known) for known in self._digests) > 0


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
