"""How the server behaves, and which sampling values the model's author recommends."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from ipaddress import ip_address
from pathlib import Path
from typing import Any

SAMPLING_DEFAULTS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


class InvalidSetting(ValueError):
    """A setting of the server is out of range; the text names the flag."""


def package_version() -> str:
    """The installed version; a bare checkout that was never installed has none."""
    try:
        return version("hotneuron")
    except PackageNotFoundError:
        return "0+unknown"


def _is_host(text: str) -> bool:
    """Whether it is a name or an address, without scheme, port or brackets."""
    try:
        ip_address(text)
    except ValueError:
        return re.fullmatch(r"[^\s/:\[\]]+", text) is not None
    return True


@dataclass(frozen=True)
class ServerConfig:
    """Settings of the HTTP side. The engine has its own `EngineConfig`."""

    model_name: str
    """Name clients send as `model`, and see in /v1/models."""
    api_keys: tuple[str, ...] = ()
    """Any of these opens the API; none given: no authentication."""
    max_body_bytes: int = 4 << 20
    """Larger request bodies are refused with 413."""
    max_messages: int = 2048
    """Conversations of more messages are refused."""
    max_message_chars: int = 1 << 20
    """Messages with more characters are refused before they are tokenized."""
    cors_origins: tuple[str, ...] = ()
    """Web pages from these origins may call the API; "*": all. Off by default."""
    allowed_hosts: tuple[str, ...] = ()
    """Names that the Host header may have, without port; none given: any."""
    accept_any_model: bool = False
    """Answer whatever name `model` holds, instead of 404 for unknown ones."""
    default_sampling: Mapping[str, float] = field(default_factory=dict)
    """What a request gets that leaves a value out; see `read_default_sampling`."""
    max_per_client: int | None = None
    """Most unfinished answers of one client (API key, or address without keys); None: no limit."""
    max_n: int = 16
    """Most answers (`n`) for one prompt."""
    ping_seconds: float = 15.0
    """A silent stream gets a comment line this often, so that proxies keep it open."""

    def __post_init__(self) -> None:
        if any(not key or not key.isascii() for key in self.api_keys):
            raise InvalidSetting("an API key must be non-empty ASCII text; check --api-key")
        for name in (
            "max_body_bytes", "max_messages", "max_message_chars", "max_per_client", "max_n",
            "ping_seconds",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise InvalidSetting(f"{name} must be above 0, got {value}")
        for origin in self.cors_origins:
            if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/]+", origin):
                raise InvalidSetting(
                    f"--cors-origin takes origins such as https://example.org (no path), or *; "
                    f"got {origin!r}"
                )
        for host in self.allowed_hosts:
            if not _is_host(host):
                raise InvalidSetting(
                    f"--allowed-host takes names such as llm.example.org (no scheme, no port), or "
                    f"*; got {host!r}"
                )
        unknown = set(self.default_sampling) - set(SAMPLING_DEFAULTS)
        if unknown:
            raise InvalidSetting(
                f"default_sampling knows {', '.join(SAMPLING_DEFAULTS)}; got {', '.join(unknown)}"
            )

    def shown(self) -> dict[str, Any]:
        """All settings but the keys, of which only their number is told."""
        values = asdict(self)
        values["api_keys"] = len(self.api_keys)
        return values


def read_default_sampling(model_dir: Path) -> dict[str, float]:
    """Sampling values of the folder's generation_config.json; {} where it names none."""
    path = model_dir / "generation_config.json"
    if not path.is_file():
        return {}
    values = json.loads(path.read_text(encoding="utf-8"))
    return {name: values[name] for name in SAMPLING_DEFAULTS if values.get(name) is not None}
