"""Who may reach the server: API keys, and the names that it answers to."""

import re
from collections.abc import Sequence
from ipaddress import ip_address
from pathlib import Path

from .console import UserError, warn

LOOPBACK = ("localhost", "127.0.0.1", "::1")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_api_keys(given: list[str] | None, path: Path | None) -> tuple[str, ...]:
    """The keys of --api-key and of --api-key-file; a named file must hold at least one."""
    keys = list(given or [])
    if path is not None:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--api-key-file {path} cannot be read: {error}") from error
        found = [key for line in lines if (key := re.sub(r"(^|\s)#.*", "", line).strip())]
        if not found:
            raise UserError(f"--api-key-file {path} holds no key: write one per line")
        keys += found
    if any(not key.strip() or not key.isascii() for key in keys):
        raise UserError("an API key must be non-empty ASCII text")
    return tuple(dict.fromkeys(keys))


def allowed_hosts(
    host: str, given: Sequence[str] | None, api_keys: Sequence[str]
) -> tuple[str, ...]:
    """What the Host header may name, by --host, --allowed-host and the keys; () is anything.

    A web page can let its own name point to this machine (DNS rebinding) and so read what a server
    answers that only programs of this machine were meant to reach. It cannot know a key; and which
    names lead to an address that others reach is known to whoever sets it up.
    """
    if given:
        return () if "*" in given else (*LOOPBACK, host, *given)
    return (*LOOPBACK, host) if is_loopback(host) and not api_keys else ()


def warn_of_open_door(host: str) -> None:
    line = "!" * 78
    warn(
        f"{line}\nlistening on {host} without --api-key: anyone who can reach it can use the "
        "model.\nSet --api-key or --api-key-file, or listen on 127.0.0.1 (the default).\n"
        f"{line}"
    )
