"""Token ids in, token ids out. Knows nothing of text or HTTP.

`Engine` and `Model` are loaded on first use, so that the light names cost no torch import.
"""

from typing import TYPE_CHECKING, Any

from .config import EngineConfig, ModelConfig
from .sequence import Request, SamplingParams, TokenEvent

if TYPE_CHECKING:
    from .engine import Engine

__all__ = ["Engine", "EngineConfig", "ModelConfig", "Request", "SamplingParams", "TokenEvent"]


def __getattr__(name: str) -> Any:
    if name == "Engine":
        from .engine import Engine

        return Engine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
