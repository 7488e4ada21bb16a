"""OpenTelemetry traces, off unless asked for: one span per request, and in it those of its answers.

An answer's span has the children `queue`, `prefill` and `decode`. The caller's `traceparent` is the
parent of all. Only whoever turns tracing on needs the package (the extra `otel`).
"""

import time
from typing import TYPE_CHECKING

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .answer_times import AnswerTimes, EndedAnswer
from .config import package_version

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer, TracerProvider

NANO = 1_000_000_000


class Tracing:
    """Observes answers and wraps the app. Owns no provider: whoever made it shuts it down."""

    def __init__(self, provider: "TracerProvider", model_name: str) -> None:
        self.tracer: Tracer = provider.get_tracer("hotneuron", package_version())
        self._model_name = model_name
        # Spans carry the time of day, our clock counts from some start.
        self._clock_start = time.time() - time.perf_counter()

    def token_came(self, times: AnswerTimes, at: float) -> None:
        """Single tokens are no spans."""

    def answer_ended(self, answer: EndedAnswer) -> None:
        """Spans of what is over; their parent is the request of the current task."""
        from opentelemetry.trace import Status, StatusCode, set_span_in_context

        times = answer.times
        span = self.tracer.start_span(
            "answer",
            start_time=self._nanoseconds(times.submitted),
            attributes={
                "gen_ai.operation.name": "text_completion",
                "gen_ai.request.model": self._model_name,
                "gen_ai.response.id": answer.request_id,
                "gen_ai.response.finish_reasons": [answer.reason],
                "gen_ai.usage.input_tokens": answer.num_prompt_tokens,
                "gen_ai.usage.output_tokens": answer.num_tokens,
            },
        )
        for name, (start, end) in times.phases().items():
            child = self.tracer.start_span(
                name, set_span_in_context(span), start_time=self._nanoseconds(start)
            )
            child.end(self._nanoseconds(end))
        if answer.reason == "error":
            span.set_status(Status(StatusCode.ERROR))
        span.end(self._nanoseconds(times.ended or time.perf_counter()))

    def _nanoseconds(self, clock: float) -> int:
        return int((self._clock_start + clock) * NANO)


class TracingMiddleware:
    """A span around each request for work, child of the caller's if it sent one."""

    def __init__(self, app: ASGIApp, *, tracing: Tracing) -> None:
        self.app = app
        self._tracer = tracing.tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self.app(scope, receive, send)
        from opentelemetry.propagate import extract
        from opentelemetry.trace import SpanKind

        with self._tracer.start_as_current_span(
            f"POST {scope['path']}",
            context=extract(dict(Headers(scope=scope))),
            kind=SpanKind.SERVER,
            attributes={"hotneuron.request_id": scope["request_id"]},
        ) as span:

            async def send_noting_status(message: Message) -> None:
                if message["type"] == "http.response.start":
                    span.set_attribute("http.response.status_code", message["status"])
                await send(message)

            return await self.app(scope, receive, send_noting_status)
