"""A span for each request if opentelemetry-api is installed. The server's spans are its children."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

try:
    from opentelemetry import context, propagate, trace
except ModuleNotFoundError:  # without the extra `otel`, nothing is traced
    trace = None

# OpenTelemetry's semantic conventions for RPC.
CALL = {"rpc.system": "grpc", "rpc.service": "inference.GRPCInferenceService", "rpc.method": "ModelInfer"}


@contextmanager
def request_span(texts: int) -> Iterator[dict[str, str]]:
    """Open the span of a request with all its attempts, and yield the headers that propagate it (W3C Trace Context).

    The span holds the number of texts, never the texts. The application decides by OpenTelemetry's SDK whether and
    where spans are exported; without the SDK, they cost almost nothing.
    """
    headers: dict[str, str] = {}
    if trace is None:
        yield headers
        return
    provider = trace.get_tracer_provider()
    if isinstance(provider, trace.ProxyTracerProvider):  # without the SDK, there is only the caller's context
        _inject(headers)
        yield headers
        return
    attributes = {**CALL, "aisle.texts": texts}
    with _tracer(provider).start_as_current_span("aisle.classify", kind=trace.SpanKind.CLIENT, attributes=attributes):
        _inject(headers)
        yield headers


@contextmanager
def continued(headers: Mapping[str, str]) -> Iterator[None]:
    """Within the context, requests belong to the trace that these headers of a caller name, if they name one."""
    if trace is None or "traceparent" not in headers:
        yield
        return
    previous = context.attach(propagate.extract(headers))
    try:
        yield
    finally:
        context.detach(previous)


@lru_cache(maxsize=1)
def _tracer(provider: Any) -> Any:
    return provider.get_tracer("aisle.client")


def _inject(headers: dict[str, str]) -> None:
    """Add the trace context, but only if it is sampled: Triton traces every request that has one."""
    if trace.get_current_span().get_span_context().trace_flags.sampled:
        propagate.inject(headers)
