"""Traces of requests, as an exporter gets them."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from server import load_tokenizer
from server.tracing import Tracing
from tests.fake_engine import CHAT, HI, FakeEngine, serving, wait_until

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path) -> Any:
    return load_tokenizer(tiny_model_dir)


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def tracing(exporter: InMemorySpanExporter) -> Tracing:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return Tracing(provider, "tiny")


def children_of(parent: ReadableSpan, spans: tuple[ReadableSpan, ...]) -> list[ReadableSpan]:
    return [span for span in spans if span.parent and span.parent.span_id == parent.context.span_id]


@pytest.mark.parametrize("stream", [True, False])
def test_a_request_its_answers_and_their_phases(
    tokenizer: Any, tracing: Tracing, exporter: InMemorySpanExporter, stream: bool
) -> None:
    engine = FakeEngine()
    engine.step_seconds = 0.01
    with serving(engine, tokenizer, tracing=tracing) as live:
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "mine"}
        body = {"messages": HI, "n": 2, "max_tokens": 4, "stream": stream}
        live.http.post(CHAT, json=body, headers=headers)
        live.http.get("/v1/models")
        assert wait_until(lambda: len(exporter.get_finished_spans()) >= 9)
    spans = exporter.get_finished_spans()
    assert {format(span.context.trace_id, "032x") for span in spans} == {TRACE}
    (request,) = [span for span in spans if span.name == f"POST {CHAT}"]
    assert format(request.parent.span_id, "016x") == PARENT  # type: ignore[union-attr]
    assert request.attributes is not None
    assert request.attributes["hotneuron.request_id"] == "mine"
    assert request.attributes["http.response.status_code"] == 200
    answers = children_of(request, spans)
    assert [span.name for span in answers] == ["answer", "answer"]
    for answer in answers:
        assert answer.attributes is not None
        assert answer.attributes["gen_ai.usage.output_tokens"] == 4
        assert answer.attributes["gen_ai.response.finish_reasons"] == ("length",)
        phases = children_of(answer, spans)
        assert [span.name for span in phases] == ["queue", "prefill", "decode"]
        assert phases[0].start_time == answer.start_time
        assert phases[-1].end_time == answer.end_time
        for before, after in pairwise(phases):
            assert before.end_time == after.start_time
        decode = phases[-1]
        assert decode.end_time - decode.start_time > 25e6  # type: ignore[operator]


def test_a_failed_answer(tokenizer: Any, tracing: Tracing, exporter: InMemorySpanExporter) -> None:
    engine = FakeEngine()
    engine.fail_with = "the step failed"
    with serving(engine, tokenizer, tracing=tracing) as live:
        live.http.post(CHAT, json={"messages": HI})
    (answer,) = [span for span in exporter.get_finished_spans() if span.name == "answer"]
    assert not answer.status.is_ok
