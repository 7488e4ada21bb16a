"""What all clients ask, so that each can check that it got the same answer."""

from typing import Any

QUESTION = "What is the capital of France?"
ASKED: list[Any] = [{"role": "user", "content": QUESTION}]
