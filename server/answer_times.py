"""When what happened to one answer, told to whoever counts or traces it.

All times are `time.perf_counter()` readings of this process.
"""

from dataclasses import dataclass
from typing import Protocol


@dataclass
class AnswerTimes:
    """Filled in as the answer goes on; None is what it did not come to."""

    submitted: float
    admitted: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    ended: float | None = None

    def phases(self) -> dict[str, tuple[float, float]]:
        """(start, end) of `queue`, `prefill` and `decode`, as far as the answer came."""
        end = self.ended or self.last_token or self.submitted
        found = {"queue": (self.submitted, self.admitted or end)}
        if self.admitted is not None:
            found["prefill"] = (self.admitted, self.first_token or end)
        if self.first_token is not None:
            found["decode"] = (self.first_token, end)
        return found


@dataclass(frozen=True)
class EndedAnswer:
    """What is known of an answer at its end, but for its text."""

    request_id: str
    mode: str
    reason: str  # stop, length, abort or error
    num_prompt_tokens: int
    num_tokens: int
    max_tokens: int | None
    times: AnswerTimes


class AnswerObserver(Protocol):
    """Is told of every token and every answer's end, on the event loop: must return at once."""

    def token_came(self, times: AnswerTimes, at: float) -> None:
        """`times` are those before this token."""

    def answer_ended(self, answer: EndedAnswer) -> None: ...
