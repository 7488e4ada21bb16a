"""Who is signed in to the dashboard: a key is given once and becomes a cookie, in no URL or log.

The cookie holds a random name for the session and no key. It is HttpOnly and SameSite=Strict, and
whatever changes something also needs the page's own header, which no other site can send.
"""

import hashlib
import secrets
import time
from collections.abc import Callable
from http.cookies import CookieError, SimpleCookie

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Scope

COOKIE = "hotneuron-session"
PAGE_HEADER = "x-hotneuron-page"
LIFETIME_SECONDS = 12 * 3600
MAX_SESSIONS = 1000
SAFE_METHODS = {"GET", "HEAD"}


class Sessions:
    """One per app, in memory: a restart signs everyone out."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._ends: dict[str, float] = {}  # by digest of the session's name, oldest first

    def start(self, response: Response, *, is_https: bool) -> None:
        """Begin a session and give the response its cookie."""
        name = secrets.token_urlsafe(32)
        self._drop_old()
        self._ends[_digest(name)] = self._clock() + LIFETIME_SECONDS
        response.set_cookie(
            COOKIE, name, LIFETIME_SECONDS, path="/", httponly=True, samesite="strict",
            secure=is_https,
        )  # fmt: skip

    def end(self, scope: Scope, response: Response) -> None:
        self._ends.pop(_digest(_name(scope)), None)
        response.delete_cookie(COOKIE, path="/", httponly=True, samesite="strict")

    def allows(self, scope: Scope) -> bool:
        """Whether the request comes from a page that is signed in."""
        end = self._ends.get(_digest(_name(scope)))
        if end is None or end < self._clock():
            return False
        return scope["method"] in SAFE_METHODS or PAGE_HEADER in Headers(scope=scope)

    def _drop_old(self) -> None:
        now = self._clock()
        kept = [item for item in self._ends.items() if item[1] >= now]
        self._ends = dict(kept[-(MAX_SESSIONS - 1) :])


def _name(scope: Scope) -> str:
    try:
        cookies = SimpleCookie(Headers(scope=scope).get("cookie", ""))
    except CookieError:
        return ""
    return cookies[COOKIE].value if COOKIE in cookies else ""


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()
