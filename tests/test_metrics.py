"""Traces and logs of the server."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.sampling import DEFAULT_ON, Decision, StaticSampler
from tritonclient.grpc import InferenceServerClient, InferenceServerException, InferInput

from aisle.client import Classifier, InvalidText
from aisle.client.tracing import request_span
from aisle.deploy.server.logs import as_json
from aisle.deploy.server.triton import free_ports
from aisle.preprocess.clean import MAX_BYTES

from .conftest import wait_for

STEPS = {"product_classifier", "tokenizer", "encoder"}
SECRET = "geheimnis4711"


@dataclass(frozen=True)
class Span:
    name: str
    trace: str
    id: str
    parent: str


class Collector(ThreadingHTTPServer):
    """An OpenTelemetry collector for spans over OTLP/HTTP: protobuf from Python's SDK, JSON from Triton."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Receiver)
        self.spans: list[Span] = []
        self.bodies: list[bytes] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1/traces"

    def of_trace(self, number: str, names: set[str]) -> dict[str, Span]:
        """Wait until all `names` of a trace have come; return its spans by name."""

        def found() -> dict[str, Span]:
            return {span.name: span for span in list(self.spans) if span.trace == number}

        wait_for(lambda: names <= found().keys())
        return found()


class Receiver(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.bodies.append(body)
        self.server.spans += spans_of(body, self.headers["Content-Type"])
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


def spans_of(body: bytes, kind: str) -> list[Span]:
    if kind == "application/json":
        found = [
            span
            for resource in json.loads(body)["resourceSpans"]
            for scope in resource["scopeSpans"]
            for span in scope["spans"]
        ]
        return [Span(span["name"], span["traceId"], span["spanId"], span.get("parentSpanId", "")) for span in found]
    message = ExportTraceServiceRequest.FromString(body)
    decoded = [span for resource in message.resource_spans for scope in resource.scope_spans for span in scope.spans]
    return [Span(s.name, s.trace_id.hex(), s.span_id.hex(), s.parent_span_id.hex()) for s in decoded]


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector() as each:
        threading.Thread(target=each.serve_forever, daemon=True).start()
        yield each
        each.shutdown()


@dataclass
class Observed:
    """`aisle serve` and its log."""

    url: str
    process: subprocess.Popen[str]
    log: list[str] = field(default_factory=list)

    def stop(self) -> list[str]:
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(60) == 0
        return self.log


@pytest.fixture(scope="module")
def observed(repository: Path, collector: Collector) -> Iterator[Observed]:
    grpc, http, metrics = map(str, free_ports(3))
    command = [sys.executable, "-m", "aisle", "serve", "--repository", str(repository), "--log-json"]
    command += ["--grpc-port", grpc, "--http-port", http, "--metrics-port", metrics, "--trace-url", collector.url]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    server = Observed(f"localhost:{grpc}", process)
    for line in process.stderr:
        server.log.append(line)
        if json.loads(line)["message"].startswith("ready: "):
            break
    reader = threading.Thread(target=lambda stderr: server.log.extend(stderr), args=(process.stderr,))
    reader.start()
    yield server
    process.terminate()
    reader.join(60)


@contextmanager
def tracing(url: str, sampled: bool = True) -> Iterator[trace.Tracer]:
    """Set up tracing for this process, like an application that uses the client."""
    provider = TracerProvider(sampler=DEFAULT_ON if sampled else StaticSampler(Decision.DROP))
    provider.add_span_processor(SimpleSpanProcessor(OTLPSpanExporter(url)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace, "_TRACER_PROVIDER", provider)  # the API allows this only once
        yield trace.get_tracer("shop")
    provider.shutdown()


def test_one_trace_holds_the_caller_the_client_and_every_step(observed: Observed, collector: Collector) -> None:
    with tracing(collector.url) as tracer, Classifier(observed.url) as classifier:
        classifier.classify(["warm"])
        with tracer.start_as_current_span("search page") as page:
            classifier.classify([f"蓝牙耳机 {i}" for i in range(100)])  # two requests, in threads of the client
        number = f"{page.get_span_context().trace_id:032x}"
        spans = collector.of_trace(number, {"search page", "aisle.classify", "InferRequest", *STEPS})
    assert spans["aisle.classify"].parent == spans["search page"].id
    assert sum(span.name == "aisle.classify" and span.trace == number for span in collector.spans) == 2
    parents = {span.id: span for span in collector.spans if span.trace == number}
    for step in STEPS - {"product_classifier"}:
        assert parents[spans[step].parent].name == "product_classifier"
    assert parents[parents[spans["product_classifier"].parent].parent].name == "aisle.classify"


def test_unsampled_requests_are_not_traced(observed: Observed, collector: Collector) -> None:
    with tracing(collector.url, sampled=False), Classifier(observed.url) as classifier:
        with request_span(1) as headers:
            assert headers == {}
        classifier.classify(["不采样"])
    with tracing(collector.url) as tracer, Classifier(observed.url) as classifier:
        later: set[str] = set()

        def later_call_is_traced() -> bool:
            with tracer.start_as_current_span("later") as span:
                classifier.classify(["采样"])
            later.add(f"{span.get_span_context().trace_id:032x}")
            return any(span.name == "InferRequest" and span.trace in later for span in list(collector.spans))

        wait_for(later_call_is_traced)  # by then, spans of the earlier call would have come
    assert all(span.parent for span in collector.spans if span.name == "InferRequest")  # each is of a sampled caller
    calls = {span.trace for span in collector.spans if span.name == "aisle.classify"}
    assert {span.trace for span in collector.spans if span.name == "InferRequest"} <= calls


def test_every_line_of_the_log_is_json_and_none_holds_a_text(observed: Observed, collector: Collector) -> None:
    with Classifier(observed.url) as classifier, tracing(collector.url):
        classifier.classify([SECRET])
        for bad in (SECRET * (MAX_BYTES // 10), SECRET.encode() + b"\xff"):
            with pytest.raises(InvalidText):
                classifier.classify([bad])
        with pytest.raises(InvalidText):
            classifier.classify([SECRET], top_k=10_000)
    flat = InferInput("text", [1], "BYTES")
    flat.set_data_from_numpy(np.array([SECRET.encode()], np.object_))
    with InferenceServerClient(observed.url) as raw, pytest.raises(InferenceServerException):
        raw.infer("product_classifier", [flat])
    log = observed.stop()
    assert len(log) > 20
    for line in log:
        assert json.loads(line).keys() == {"time", "level", "source", "message"}
        assert SECRET not in line
    levels = {json.loads(line)["level"] for line in log}
    assert {"info", "warning"} <= levels <= {"info", "warning", "error"}
    assert not any(SECRET.encode() in body for body in collector.bodies)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (r'E1124 08:24:28.58 7 model.cc:12] "a \"b\"\nc"', ("error", "model.cc:12", 'a "b"\nc')),
        ("W1124 08:24:28.58 7 model.cc:12] unquoted", ("warning", "model.cc:12", "unquoted")),
        ('I1124 08:24:28.58 7 model.cc:12] "torn', ("info", "model.cc:12", '"torn')),
        ("[Error] File: /x/otlp_http_client.cc:225 no answer", ("error", "otlp_http_client.cc:225", "no answer")),
        ("Signal (15) received.", ("info", "stderr", "Signal (15) received.")),
    ],
)
def test_log_lines_of_every_kind(line: str, expected: tuple[str, str, str]) -> None:
    entry = json.loads(as_json(line))
    assert (entry["level"], entry["source"], entry["message"]) == expected
    assert entry["time"].endswith("Z")
