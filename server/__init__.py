"""HTTP only: OpenAI-compatible API and dashboard around an engine. Knows no tensors."""

from .app import create_app
from .config import ServerConfig, read_default_sampling
from .gateway import Gateway
from .text import load_tokenizer

__all__ = ["Gateway", "ServerConfig", "create_app", "load_tokenizer", "read_default_sampling"]
