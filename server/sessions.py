"""Who is signed in to the dashboard: a key is given once and becomes a cookie, in no URL or log.

The cookie holds when it ends, signed with a secret made of the server's keys; no key, and nothing
is kept here. So it holds for all replicas and over restarts, until it ends or the keys change. It
is HttpOnly and SameSite=Strict, and whatever changes something also needs the page's own header,
which no other site can send.
"""

import hashlib
import hmac
import time
from collections.abc import Callable, Sequence
from http.cookies import CookieError, SimpleCookie

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Scope

COOKIE = "hotneuron-session"
PAGE_HEADER = "x-hotneuron-page"
LIFETIME_SECONDS = 12 * 3600
SAFE_METHODS = {"GET", "HEAD"}
# Slow on purpose: nobody shall find a key by trying which one signs a cookie.
SCRYPT = {"n": 1 << 14, "r": 8, "p": 1}


class Sessions:
    """One per app. Without keys there are none."""

    def __init__(self, api_keys: Sequence[str], clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._secret = b""
        if api_keys:
            keys = "\n".join(sorted(api_keys)).encode()
            self._secret = hashlib.scrypt(keys, salt=b"hotneuron session", **SCRYPT)

    def start(self, response: Response, *, is_https: bool) -> None:
        """Give the response the cookie of a new session."""
        assert self._secret, "there are keys where somebody signs in"
        end = str(int(self._clock()) + LIFETIME_SECONDS)
        response.set_cookie(
            COOKIE, f"{end}.{self._sign(end)}", LIFETIME_SECONDS, path="/", httponly=True,
            samesite="strict", secure=is_https,
        )  # fmt: skip

    def end(self, response: Response) -> None:
        response.delete_cookie(COOKIE, path="/", httponly=True, samesite="strict")

    def allows(self, scope: Scope) -> bool:
        """Whether the request comes from a page that is signed in."""
        end, _, signature = _cookie(scope).partition(".")
        if not self._secret or not end.isascii() or not end.isdecimal():
            return False
        is_ours = hmac.compare_digest(signature.encode(), self._sign(end).encode())
        if not is_ours or int(end) < self._clock():
            return False
        return scope["method"] in SAFE_METHODS or PAGE_HEADER in Headers(scope=scope)

    def _sign(self, end: str) -> str:
        return hmac.new(self._secret, end.encode(), hashlib.sha256).hexdigest()


def _cookie(scope: Scope) -> str:
    try:
        cookies = SimpleCookie(Headers(scope=scope).get("cookie", ""))
    except CookieError:
        return ""
    return cookies[COOKIE].value if COOKIE in cookies else ""
