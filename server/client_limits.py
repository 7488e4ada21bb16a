"""How many answers one client may wait for at a time, so that none takes the whole queue.

A client is an API key, or an address where there are no keys (`client_of`). Used on the event loop
only.
"""

from collections import Counter

from .errors import CLIENT_LIMIT, ApiError


class ClientLimits:
    """Counts the unfinished answers of each client; `most` None: no limit."""

    def __init__(self, most: int | None) -> None:
        self._most = most
        self._held: Counter[str] = Counter()

    def check(self, client: str, count: int) -> None:
        """Raises ApiError 429 where `count` answers more would be too many."""
        held = self._held[client]
        if self._most is not None and held + count > self._most:
            raise ApiError(
                429,
                f"{held} answers for this client (its API key, or its address) are running or "
                f"waiting, and this request asks for {count} more: {self._most} at a time is the "
                "most (--max-per-client). Try again when one has ended.",
                code=CLIENT_LIMIT,
            )

    def take(self, client: str, count: int) -> None:
        """Before `count` answers begin. Raises as `check`."""
        self.check(client, count)
        self._held[client] += count

    def give_back(self, client: str, count: int) -> None:
        """When they have ended, whichever end it was."""
        self._held[client] -= count
        if not self._held[client]:
            del self._held[client]
