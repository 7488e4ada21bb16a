"""Sends traces to an OpenTelemetry collector; for `serve --otlp-endpoint`."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from .console import UserError

if TYPE_CHECKING:
    from server.tracing import Tracing


def otlp_tracing(endpoint: str, model_name: str) -> tuple["Tracing", Callable[[], None]]:
    """Traces to `endpoint` (OTLP over HTTP), and the function that sends the last of them."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise UserError(
            f"--otlp-endpoint needs OpenTelemetry ({error}): pip install 'hotneuron[otel]'"
        ) from error
    from server.tracing import Tracing

    provider = TracerProvider(resource=Resource.create({"service.name": "hotneuron"}))
    exporter = OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces")
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return Tracing(provider, model_name), provider.shutdown
