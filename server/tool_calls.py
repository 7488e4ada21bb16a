"""Reads tool calls out of a growing answer: what is text, and the calls piece by piece.

The grammar of `tools.py` has written them, so their form is known to the letter; an answer that
was cut (by its length, by a stop string) ends in the middle of one.
"""

import re
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from .text import longest_open_end
from .tools import CLOSING, OPENING

HEAD = re.compile(r'\s*\{"name": "([^"]*)", "arguments": ')


@dataclass(frozen=True)
class CallDelta:
    """News of one call. Its first one names it and has no arguments yet."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


def whole_calls(deltas: Iterable[CallDelta]) -> list[CallDelta]:
    """The calls of one answer, each with all its arguments."""
    calls: dict[int, CallDelta] = {}
    for delta in deltas:
        first = calls.setdefault(delta.index, delta)
        if first is not delta:
            arguments = first.arguments + delta.arguments
            calls[delta.index] = replace(first, arguments=arguments)
    return list(calls.values())


class ToolCallReader:
    """Text in, text and calls out. What may become the start of a call is held back."""

    def __init__(self) -> None:
        self.num_calls = 0
        self._held = ""
        self._arguments: _JsonObject | None = None  # of the call that is being written
        self._is_open = False  # between <tool_call> and </tool_call>

    def feed(self, text: str) -> tuple[str, list[CallDelta]]:
        """(text that belongs to no call, news of calls)."""
        self._held += text
        shown: list[str] = []
        calls: list[CallDelta] = []
        for piece in self._pieces():
            if isinstance(piece, str):
                shown.append(piece)
            else:
                calls.append(piece)
        return "".join(shown), calls

    def finish(self) -> str:
        """What was held back and became no call."""
        held, self._held = self._held, ""
        return "" if self._is_open or self.num_calls else held

    def _pieces(self) -> Iterator[str | CallDelta]:
        """Takes what can be told apart from `_held` until nothing can."""
        while self._held:
            before = self._held
            if self._arguments is not None:
                yield from self._take_arguments(self._arguments)
            elif self._is_open:
                yield from self._take_head_or_end()
            else:
                yield from self._take_text()
            if self._held == before:
                return

    def _take_text(self) -> Iterator[str]:
        text, opening, rest = self._held.partition(OPENING)
        if opening:
            self._is_open, self._held = True, rest
        else:
            keep = longest_open_end(text, (OPENING,))
            self._held = text[len(text) - keep :]
            text = text[: len(text) - keep]
        if text and not self.num_calls:  # between calls and after them there is only white space
            yield text

    def _take_head_or_end(self) -> Iterator[CallDelta]:
        if head := HEAD.match(self._held):
            self._held = self._held[head.end() :]
            self._arguments = _JsonObject()
            name, call_id = head[1], f"call_{uuid.uuid4().hex[:24]}"
            yield CallDelta(self.num_calls, call_id, name)
            self.num_calls += 1
        elif CLOSING in self._held:
            self._held = self._held.partition(CLOSING)[2]
            self._is_open = False

    def _take_arguments(self, arguments: "_JsonObject") -> Iterator[CallDelta]:
        size = arguments.feed(self._held)
        fragment, self._held = self._held[:size], self._held[size:]
        if arguments.is_over:
            self._arguments = None
        if fragment:
            yield CallDelta(self.num_calls - 1, arguments=fragment)


class _JsonObject:
    """Finds the end of a JSON object in text that comes in pieces."""

    def __init__(self) -> None:
        self.is_over = False
        self._depth = 0
        self._in_string = False
        self._is_escaped = False

    def feed(self, text: str) -> int:
        """How many characters of `text` belong to the object."""
        for i, char in enumerate(text):
            self._step(char)
            if self.is_over:
                return i + 1
        return len(text)

    def _step(self, char: str) -> None:
        if self._is_escaped:
            self._is_escaped = False
        elif self._in_string:
            self._is_escaped = char == "\\"
            self._in_string = char != '"'
        elif char == '"':
            self._in_string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
            self.is_over = self._depth == 0
