"""POST /v1/responses: OpenAI's other way to ask for an answer. No memory between requests."""

from .routes import router

__all__ = ["router"]
