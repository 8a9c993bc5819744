"""Measure host costs: the service with an engine that computes nothing, beside a bare Triton that echoes a string."""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import grpc
from matplotlib.figure import Figure

from aisle.build.engine import EngineSpec
from aisle.build.repository import TEMPLATE, new_version
from aisle.client import AsyncClassifier, Classifier, Failure
from aisle.client.protocol import MODEL
from aisle.client.wire import INFER, Wanted, request_of
from aisle.console import say, track
from aisle.deploy.server import served_repository, triton
from aisle.deploy.server.installation import triton_command
from aisle.deploy.server.triton import ServerOptions, free_ports, running
from aisle.errors import ServerError
from aisle.files import write_json
from aisle.loadtest.bench.paired import Paired, ratios
from aisle.loadtest.generator import Load, checked, closed, closed_blocking, percentile, streamed
from aisle.loadtest.locust.run import frame, read_h2load
from aisle.loadtest.processes import all_paused, awake, cpu_of_steps, pause, resume
from aisle.plots import legend
from aisle.preprocess import fast
from aisle.report import Page
from aisle.train.core.checkpoint import Checkpoint

OURS, ECHO = "Aisle", "bare echo"
LABELS = 10
BATCH = 64  # texts per request of a file
ASYNCIO_CALLS = 64  # concurrent calls of the Python client
H2LOAD_CALLS = (64, 256)  # concurrent calls of h2load
ECHO_CONFIG = f"""name: "{MODEL}"
backend: "python"
max_batch_size: 64
input [ {{ name: "text" data_type: TYPE_STRING dims: [ 1 ] }} ]
output [ {{ name: "category" data_type: TYPE_STRING dims: [ 1 ] }} ]
instance_group [ {{ count: 1 kind: KIND_CPU }} ]
dynamic_batching {{ }}
"""
ECHO_CODE = """import triton_python_backend_utils as pb
class TritonPythonModel:
    def execute(self, requests):
        texts = [pb.get_input_tensor_by_name(each, "text").as_numpy() for each in requests]
        return [pb.InferenceResponse([pb.Tensor("category", text)]) for text in texts]
"""
# Inserted into the bench's copy of the encoder step: its engine packs texts and computes nothing.
INSTANT_ENGINE = f"""import numpy
from aisle.build import engine
RAMP = numpy.linspace(0, 1, {LABELS}, dtype=numpy.float32)
engine.openvino_runner = lambda model, spec: lambda packed: packed.cls_index[:, None].astype("f4") * RAMP
"""


@dataclass(frozen=True)
class Service:
    """A running server: its address and its process."""

    name: str
    url: str
    pid: int


def measure(checkpoint: Path, texts: Sequence[str], work: Path, seconds: float, rounds: int) -> dict[str, Any]:
    """Measure both servers in turn under each load, in slices of `seconds`, round after round; return the medians.

    The other server is paused.

    Raises:
        ServerError: a server did not start, or a call failed.
    """
    rows: defaultdict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    with ExitStack() as stack:
        services = [_paused(stack, aisle(checkpoint, texts, work)), _paused(stack, echo(work))]
        for _ in track(range(rounds), "loads, in turn", rounds):
            for workload, service in itertools.product(workloads(texts, seconds), services):
                if service.name == OURS or workload.echo_too:
                    others = [other.pid for other in services if other is not service]
                    with all_paused(others), awake(service.pid):
                        rows[service.name, workload.name].append(workload.run(service))
    found = [_median(system, load, slices) for (system, load), slices in rows.items()]
    return {"rows": found, "seconds": seconds, "rounds": rounds, "ratios": _ratios(rows)}


def _paused(stack: ExitStack, starting: AbstractContextManager[Service]) -> Service:
    """Start a server and pause it; it is resumed before it is stopped."""
    service = stack.enter_context(starting)
    stack.callback(resume, service.pid)
    pause(service.pid)
    return service


@dataclass(frozen=True)
class Workload:
    """One way to send texts."""

    name: str
    send: Callable[[Service], dict[str, Any]]  # returns at least `requests` (all that were sent) and `per_second`
    echo_too: bool = True  # whether the echo server can answer it

    def run(self, service: Service) -> dict[str, Any]:
        """Send to a server; return the figures, and the CPU time of each process per request, in microseconds."""
        before, own = cpu_of_steps(service.pid), time.process_time()
        found = self.send(service)
        count = found["requests"]
        cpu = {name: 1e6 * (used - before.get(name, 0.0)) / count for name, used in cpu_of_steps(service.pid).items()}
        cpu["client"] = found.pop("client_us", 1e6 * (time.process_time() - own) / count)
        return {**found, "cpu_us": cpu}


def workloads(texts: Sequence[str], seconds: float) -> list[Workload]:
    """Return the workloads, all with the same texts. Those of h2load need it to be installed."""
    found = [Workload("one call at a time", lambda service: _one_at_a_time(service, texts, seconds))]
    if shutil.which("h2load"):
        for calls in H2LOAD_CALLS:
            found.append(Workload(f"{calls} calls, h2load", lambda s, n=calls: _h2load(s, texts, n, seconds)))  # type: ignore[misc]
    else:
        say("h2load is not installed (apt-get install nghttp2-client): its loads are left out")
    found.append(
        Workload(f"{ASYNCIO_CALLS} calls, asyncio", lambda s: asyncio.run(_asyncio(s, texts, seconds)), echo_too=False)
    )
    found.append(
        Workload(f"files, {BATCH} per request", lambda service: _files(service, texts, seconds), echo_too=False)
    )
    return found


def _one_at_a_time(service: Service, texts: Sequence[str], seconds: float) -> dict[str, Any]:
    """Send one text after the other over gRPC, as prepared messages, so that the client costs little."""
    messages = itertools.cycle([request_of([text.encode()], Wanted(), "").SerializeToString() for text in texts[:2000]])
    with grpc.insecure_channel(service.url) as channel:
        infer = channel.unary_unary(INFER)
        load = checked(closed_blocking(lambda message: infer(message, timeout=60), messages, 1, seconds))
    return {**_counted(load), "p50_ms": 1e3 * percentile(load.latencies, 50)}


def _counted(load: Load) -> dict[str, Any]:
    """Return the number of all requests, the uncounted ones included, and the rate of the counted ones."""
    return {"requests": load.sent, "per_second": load.texts_per_second}


def _h2load(service: Service, texts: Sequence[str], calls: int, seconds: float) -> dict[str, Any]:
    """Send a text of median length with h2load, nghttp2's load generator."""
    text = sorted(texts[:1001], key=len)[len(texts[:1001]) // 2]
    with tempfile.NamedTemporaryFile() as body:
        body.write(frame(text))
        body.flush()
        command = ["h2load", "-c4", "-t1", f"-m{calls // 4}", f"-D{max(1, round(seconds))}", "-d", body.name]
        command += ["-H", "content-type: application/grpc", "-H", "te: trailers"]
        before = os.times()
        done = subprocess.run([*command, f"http://{service.url}{INFER}"], capture_output=True, text=True, check=False)
        after = os.times()
    speed = read_h2load(done.stdout)
    count = max(1, round(speed * max(1, round(seconds))))
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return {"requests": count, "per_second": speed, "client_us": 1e6 * used / count}


async def _asyncio(service: Service, texts: Sequence[str], seconds: float) -> dict[str, Any]:
    async with AsyncClassifier(service.url, timeout=60) as classifier:

        async def call(text: str) -> None:
            await classifier.classify([text])

        return _counted(checked(await closed(call, itertools.cycle(texts), ASYNCIO_CALLS, seconds)))


def _files(service: Service, texts: Sequence[str], seconds: float) -> dict[str, Any]:
    """Stream texts, as for a file. Here each text counts as a request."""
    with Classifier(service.url, timeout=60) as classifier:
        load = streamed(classifier.stream, texts, 1, seconds, BATCH, lambda answer: isinstance(answer, Failure))
    return _counted(checked(load))


@contextmanager
def aisle(checkpoint: Path, texts: Sequence[str], work: Path) -> Iterator[Service]:
    """Serve a checkpoint's tokenizer with an engine that computes nothing, without the response cache."""
    repository, steps = work / "host", work / "host-steps"
    for folder in (repository, steps):
        shutil.rmtree(folder, ignore_errors=True)
    install(checkpoint, texts, repository)
    shutil.copytree(TEMPLATE, steps)
    code = (steps / "encoder" / "model.py").read_text("utf-8")
    start = "from __future__ import annotations\n"
    (steps / "encoder" / "model.py").write_text(code.replace(start, start + INSTANT_ENGINE), "utf-8")
    port, metrics = free_ports(2)
    options = ServerOptions(repository, grpc_port=port, metrics_port=metrics, cache_mb=0)
    with (
        patch.object(served_repository, "TEMPLATE", steps.resolve()),
        (work / "host.log").open("wb") as log,
        running(options, log) as process,
    ):
        yield Service(OURS, f"127.0.0.1:{port}", process.pid)


def install(checkpoint: Path, texts: Sequence[str], repository: Path) -> None:
    """Write a version without an engine."""
    tokenizer = Checkpoint(checkpoint).tokenizer
    spec = EngineSpec("openvino", "fp32", tokenizer.max_tokens, LABELS, "an engine that computes nothing")
    gate = {"least_agreement": 0.0, "largest_f1_loss": 1.0, "loosened": True}
    report = {"agreement": 1.0, "f1_loss": 0.0, "gate": gate, "precision": "fp32", "target": "openvino"}
    with new_version(repository) as (_, folders):
        spec.save(folders["encoder"])
        write_json(folders["encoder"] / "report.json", report)
        write_json(folders["encoder"] / "labels.json", [f"category {number}" for number in range(LABELS)])
        tokenizer.save(folders["tokenizer"] / "tokenizer.json")
        write_json(folders["tokenizer"] / fast.DECISION, tokenizer.decide_fast(texts[:2000]))


@contextmanager
def echo(work: Path) -> Iterator[Service]:
    """Serve a Python-backend model that returns each text, in a Triton without any of Aisle's code."""
    port, metrics = free_ports(2)
    with tempfile.TemporaryDirectory(prefix="aisle-echo-") as home, (work / "echo.log").open("wb") as log:
        model = Path(home, "models", MODEL)
        (model / "1").mkdir(parents=True)
        (model / "config.pbtxt").write_text(ECHO_CONFIG)
        (model / "1" / "model.py").write_text(ECHO_CODE)
        command, environment = triton_command(Path(home))
        command += [f"--model-repository={model.parent}", "--grpc-address=127.0.0.1", f"--grpc-port={port}"]
        command += [f"--metrics-port={metrics}", "--allow-http=false", "--disable-auto-complete-config"]
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            _wait_until_ready(process, f"127.0.0.1:{port}", Path(log.name))
            yield Service(ECHO, f"127.0.0.1:{port}", process.pid)
        finally:
            triton.stop(process)


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """Wait for the first answer of a server.

    Raises:
        ServerError: it ended, or does not answer in time.
    """
    with grpc.insecure_channel(url) as channel:
        infer, request = channel.unary_unary(INFER), request_of([b"x"], Wanted(), "").SerializeToString()
        deadline = time.monotonic() + triton.START_SECONDS
        while process.poll() is None:
            try:
                infer(request, timeout=5)
                return
            except grpc.RpcError:
                if time.monotonic() > deadline:
                    raise ServerError(f"the bare Triton did not start; see {log}") from None
                time.sleep(0.2)
    raise ServerError(f"the bare Triton ended; see {log}")


def _median(system: str, load: str, slices: Sequence[dict[str, Any]]) -> dict[str, Any]:
    steps = sorted({step for each in slices for step in each["cpu_us"]})
    return {
        "system": system,
        "load": load,
        "per_second": median(each["per_second"] for each in slices),
        "spread": [min(each["per_second"] for each in slices), max(each["per_second"] for each in slices)],
        "p50_ms": median(each["p50_ms"] for each in slices) if "p50_ms" in slices[0] else None,
        "cpu_us": {step: round(median(each["cpu_us"].get(step, 0.0) for each in slices), 1) for step in steps},
    }


def _ratios(rows: dict[tuple[str, str], list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Return the paired ratios of Aisle's rate to the echo's, for each load that both answer."""
    found: dict[str, dict[str, Any]] = {}
    for (system, load), ours in rows.items():
        theirs = rows.get((ECHO, load))
        if system == OURS and theirs:
            each = ratios([one["per_second"] for one in ours], [other["per_second"] for other in theirs])
            if each:
                found[load] = each.as_dict()
    return found


COLUMNS = {"system": "system", "load": "load", "per_second": "per second", "p50_ms": "p50, ms", "cpu": "CPU, µs"}


def display_rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows for a table."""
    return [{**row, "cpu": _cpu(row["cpu_us"])} for row in found["rows"]]


def add_to(page: Page, found: dict[str, Any]) -> None:
    page.heading("Host")
    page.text(
        "The service with an engine that computes nothing, and a bare Triton with a Python model that echoes a string. "
        f"Medians of {found['rounds']} rounds of {found['seconds']:g} s per load, in turn, while the other server is "
        "paused. CPU is the time of each process per request; for files, per text."
    )
    page.records(COLUMNS, display_rows(found))
    for load, ratio in found["ratios"].items():
        page.text(f"Ratio of Aisle's rate to the echo's, {load}: {Paired(**ratio)}.")
    names = [f"{row['system']}, {row['load']}" for row in found["rows"]]
    figure = Figure(figsize=(9, 0.5 * len(names) + 1), layout="constrained")
    axis = figure.subplots()
    left = [0.0] * len(names)
    for step in sorted({step for row in found["rows"] for step in row["cpu_us"]}):
        values = [row["cpu_us"].get(step, 0.0) for row in found["rows"]]
        axis.barh(names, values, left=left, label=step)
        left = [start + value for start, value in zip(left, values, strict=True)]
    axis.invert_yaxis()
    axis.set_xlabel("CPU, µs per request; for files, per text")
    legend(axis)
    page.plot(figure, "CPU time by step")


def _cpu(steps: dict[str, float]) -> str:
    return ", ".join(f"{step} {value:.0f}" for step, value in steps.items())
