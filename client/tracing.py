"""A span for each request, where opentelemetry-api is installed; the server's own spans follow under it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

try:
    from opentelemetry import propagate, trace
except ModuleNotFoundError:  # without the extra `otel`, nothing is traced
    trace = None

# OpenTelemetry's semantic conventions for RPC.
CALL = {"rpc.system": "grpc", "rpc.service": "inference.GRPCInferenceService", "rpc.method": "ModelInfer"}


@contextmanager
def request_span(texts: int) -> Iterator[dict[str, str]]:
    """Open the span of a request with all its tries; give the headers that carry it on (W3C Trace Context).

    The span tells how many texts there are, never which. Whether and where it is exported is for the application to
    say, by OpenTelemetry's SDK; until then it costs next to nothing.
    """
    headers: dict[str, str] = {}
    if trace is None:
        yield headers
        return
    tracer = trace.get_tracer("aisle.client")
    with tracer.start_as_current_span(
        "aisle.classify", kind=trace.SpanKind.CLIENT, attributes={**CALL, "aisle.texts": texts}
    ):
        # Triton traces whatever comes with a context, sampled or not: so only sampled ones are sent.
        if trace.get_current_span().get_span_context().trace_flags.sampled:
            propagate.inject(headers)
        yield headers
