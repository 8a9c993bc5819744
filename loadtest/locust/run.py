"""Run Locust in one or more processes; read its figures, find the knee, write the page, compare with h2load."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from aisle.client import Classifier
from aisle.client.protocol import MODEL
from aisle.errors import InputError, ServerError
from aisle.loadtest.bench.machine import describe, machine
from aisle.loadtest.generator import percentile_of_counts
from aisle.palette import BLACK, GREY, SERIES
from aisle.plots import legend, log_axis
from aisle.preprocess.clean import prepare
from aisle.preprocess.tables.table import read_labelled
from aisle.preprocess.values import TextError
from aisle.report import Page

LOCUSTFILE = Path(__file__).with_name("locustfile.py")
PERCENTILES = (50, 95, 99, 99.9)
MIN_ANSWERED = 0.95  # below its knee, a server answers at least this share of the offered load
MAX_SLOWDOWN = 5.0  # below its knee, its p99 is at most this many times the p99 of the lightest load
COLUMNS = {
    "load": "load",
    "offered": "offered/s",
    "texts_per_second": "texts/s",
    **{f"p{p:g}_ms": f"p{p:g}, ms" for p in PERCENTILES},
    "failures": "failed",
}


@dataclass(frozen=True)
class Steps:
    """The loads of a test, in order."""

    callers: Sequence[int] = (1, 8, 64)  # closed loads
    # Open loads, as shares of the closed throughput.
    shares: Sequence[float] = (0.1, 0.25, 0.5, 0.7, 0.8, 0.9, 1.0, 1.1)
    seconds: float = 10.0  # counted seconds of each load
    warm_up: float = 2.0  # seconds before them that are not counted
    zipf: float | None = None  # the exponent of Zipf traffic; None sends all texts equally often


def label(kind: str, size: float) -> str:
    """Return the name of a load in Locust's statistics."""
    return f"{size:g} at once" if kind == "closed" else f"{size:g} a second"


def loadtest(
    data: Path, text_column: str, url: str, steps: Steps, report: Path, workers: int = 0, web: bool = False
) -> dict[str, Any]:
    """Run the loads against a running server and write the page and its .json.

    Args:
        workers: the number of worker processes; 0 for a single process.
        web: serve Locust's own page until Ctrl-C. Loads are started there, and the last one is reported.

    Raises:
        InputError: the table cannot be read or is empty, or no load was started on the page.
        ServerError: Locust failed, or no call was answered.
    """
    if next(read_labelled(data, text_column, text_column), None) is None:
        raise InputError(f"{data} has no rows")
    _check_server(url)
    environment = {
        **os.environ,
        "AISLE_DATA": str(data.resolve()),
        "AISLE_TEXT_COLUMN": text_column,
        "AISLE_STEPS": json.dumps(asdict(steps)),
    }
    output = _run_locust(url, environment, workers, web)
    rows = [row for row in map(_row(steps), _entries(output)) if row is not None]
    if web and not rows:
        raise InputError("no load was started on Locust's page, so there is nothing to report")
    if not any(row["texts_per_second"] for row in rows):
        raise ServerError(f"no call to {url} was answered; is the server up?")
    rows.sort(key=lambda row: (row["offered"] is not None, row["size"]))
    result = {
        "locust": version("locust"),
        "machine": machine(),
        "workers": workers,
        **asdict(steps),
        "rows": rows,
        "knee": knee(rows, steps.seconds),
        "peak_texts_per_second": max(row["texts_per_second"] for row in rows),
    }
    _page(result, url, data).write(report, result)
    return {**result, "report": str(report)}


def _check_server(url: str) -> None:
    """Report a missing server before the load starts.

    Raises:
        ServerError: no server answers.
    """
    try:
        with Classifier.from_environment(url) as classifier:
            classifier.probe()
    except ServerError as error:
        raise ServerError(f"no call to {url} was answered; is the server up? {error}") from None


def _run_locust(url: str, environment: dict[str, str], workers: int, web: bool) -> str:
    """Run Locust with its worker processes and return its output."""
    command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--host", url]
    processes = [subprocess.Popen([*command, "--worker"], env=environment, stdout=sys.stderr) for _ in range(workers)]
    if workers:
        command += ["--master", "--expect-workers", str(workers)]
    command += ["--json"] if web else ["--json", "--headless", "--only-summary"]
    try:
        return _output(command, environment, until_stopped=web)
    finally:
        for process in processes:
            process.terminate()
            process.wait()


def _output(command: list[str], environment: dict[str, str], *, until_stopped: bool) -> str:
    """Return Locust's output. With `until_stopped`, Ctrl-C ends Locust but not this process."""
    # A file, not a pipe: Ctrl-C during a read from a pipe loses the output.
    with tempfile.TemporaryFile("w+") as output:
        with subprocess.Popen(command, env=environment, stdout=output) as process:
            try:
                process.wait()
            except KeyboardInterrupt:
                if not until_stopped:
                    raise
                process.wait()
        output.seek(0)
        return output.read()


def _entries(output: str) -> list[dict[str, Any]]:
    """Return Locust's statistics, the JSON list in its output; an empty list if there is none."""
    found = re.search(r"^\[\s*[{\]]", output, re.M)
    return list(json.JSONDecoder().raw_decode(output[found.start() :])[0]) if found else []


def _row(steps: Steps) -> Any:
    def row(entry: dict[str, Any]) -> dict[str, Any] | None:
        found = re.fullmatch(r"(\d+) (at once|a second)", entry["name"])
        if found is None:  # the warm-up
            return None
        # Locust rounds times above 100 ms to two digits.
        counts = {float(ms): count for ms, count in entry["response_times"].items()}
        answered = entry["num_requests"] - entry["num_failures"]
        return {
            "load": entry["name"],
            "size": int(found.group(1)),
            "offered": int(found.group(1)) if found.group(2) == "a second" else None,
            "texts": entry["num_requests"],
            "failures": entry["num_failures"],
            "texts_per_second": answered / steps.seconds,
            **{f"p{p:g}_ms": percentile_of_counts(counts, p) for p in PERCENTILES},
        }

    return row


def knee(rows: Sequence[dict[str, Any]], seconds: float) -> int | None:
    """Return the highest offered load up to which all loads are answered in time; None if the lightest is not.

    In time means: at least 95 % of the offered calls are answered while the load lasts, minus two standard deviations
    of their random number, and p99 is at most 5 times the p99 of the lightest load.
    """
    offered = [row for row in rows if row["offered"] is not None]
    best: int | None = None
    for row in offered:
        least = MIN_ANSWERED * row["offered"] - 2 * math.sqrt(row["offered"] / seconds)
        if row["texts_per_second"] < least or row["p99_ms"] > MAX_SLOWDOWN * offered[0]["p99_ms"]:
            break
        best = row["offered"]
    return best


def second_opinion(data: Path, text_column: str, url: str, callers: int, seconds: int) -> dict[str, Any]:
    """Compare Locust with h2load, nghttp2's load generator: both send one text in `callers` concurrent calls.

    A gRPC message is an HTTP/2 body with five bytes before it, so h2load can send a prepared message. It always sends
    the same one. So the server's response cache must be off (`aisle serve --cache-mb 0`), or the cache is measured.

    Raises:
        InputError: h2load is not installed, or the table has no text that can be classified.
        ServerError: no call was answered.
    """
    tool = shutil.which("h2load")
    if tool is None:
        raise InputError("h2load is not installed: apt-get install nghttp2-client")
    text = _median_text(data, text_column)
    with tempfile.TemporaryDirectory(prefix="aisle-loadtest-") as folder:
        body, table = Path(folder, "body"), Path(folder, "text.jsonl")
        body.write_bytes(frame(text))
        table.write_text(json.dumps({"text": text}) + "\n", "utf-8")
        theirs = _run_h2load(tool, url, callers, seconds, body)
        report = Path(folder, "report.html")
        (ours,) = loadtest(table, "text", url, Steps((callers,), (), float(seconds)), report)["rows"]
    return {
        "text": text,
        "callers": callers,
        "h2load_texts_per_second": theirs,
        "locust_texts_per_second": ours["texts_per_second"],
        "ratio": ours["texts_per_second"] / theirs,
    }


def _run_h2load(tool: str, url: str, callers: int, seconds: int, body: Path) -> float:
    """Return the requests per second that h2load measures.

    Raises:
        ServerError: h2load could not measure the server.
    """
    command = [tool, "-c1", "-t1", f"-m{callers}", f"-D{seconds}", "--warm-up-time=2", "-d", str(body)]
    command += ["-H", "content-type: application/grpc", "-H", "te: trailers"]
    command.append(f"http://{url}/inference.GRPCInferenceService/ModelInfer")
    return read_h2load(subprocess.run(command, capture_output=True, text=True, check=False).stdout)


def frame(text: str) -> bytes:
    """Return the body of a gRPC call that classifies a text."""
    from tritonclient.grpc import service_pb2

    request = service_pb2.ModelInferRequest(model_name=MODEL)
    tensor = request.inputs.add(name="text", datatype="BYTES", shape=[1, 1])
    tensor.contents.bytes_contents.append(text.encode())
    message: bytes = request.SerializeToString()
    return b"\0" + len(message).to_bytes(4, "big") + message


def read_h2load(output: str) -> float:
    """Return the requests per second from h2load's summary.

    Raises:
        ServerError: there is no summary, or calls failed.
    """
    speed = re.search(r"finished in [\d.]+\w+, ([\d.]+) req/s", output)
    failed = re.search(r"(\d+) failed, (\d+) errored, (\d+) timeout", output)
    if speed is None or failed is None or float(speed.group(1)) == 0 or any(map(int, failed.groups())):
        last = output.strip().splitlines()[-1:] or ["it printed nothing"]
        raise ServerError(f"h2load could not measure the server: {last[0]}")
    return float(speed.group(1))


def _median_text(data: Path, text_column: str) -> str:
    """Return the text of median length among the first thousand."""
    found = []
    for text, _ in read_labelled(data, text_column, text_column):
        try:
            found.append(prepare(text))
        except TextError:
            continue
        if len(found) == 1000:
            break
    if not found:
        raise InputError(f"{data}: no text that can be classified")
    return sorted(found, key=len)[len(found) // 2]


def _page(result: dict[str, Any], url: str, data: Path) -> Page:
    mix = "all equally often" if result["zipf"] is None else f"Zipf-distributed with exponent {result['zipf']:g}"
    page = Page(
        f"Load on {url}",
        f"Texts of {data.name}, {mix}, one per call, over one gRPC channel per process. Each load is measured for "
        f"{result['seconds']:g} s after a warm-up of {result['warm_up']:g} s. In open loads, calls arrive as a Poisson "
        f"process, and latency counts from the scheduled time. Sent by Locust {result['locust']} on "
        f"{describe(result['machine'])}.",
        {"data": data.name, **{name: result[name] for name in ("seconds", "warm_up", "zipf")}},
    )
    page.records(COLUMNS, result["rows"])
    offered = [row for row in result["rows"] if row["offered"] is not None]
    where = f"at {result['knee']} texts/s" if result["knee"] else "below the lightest load"
    page.text(
        f"The knee is {where}. Up to the knee the server answers {MIN_ANSWERED:.0%} of the offered load in time, and "
        f"the p99 stays within {MAX_SLOWDOWN:g} times the p99 of the lightest load."
    )
    if offered:
        page.plot(_figure(offered, result["knee"]), "Throughput and latency by offered load")
    return page


def _figure(offered: list[dict[str, Any]], knee: float | None) -> Figure:
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    throughput, latency = figure.subplots(1, 2)
    rates = [row["offered"] for row in offered]
    throughput.plot(rates, [row["texts_per_second"] for row in offered], "o-", color=SERIES[0], label="answered")
    throughput.plot(rates, rates, ":", color=GREY, label="offered")
    throughput.set(xlabel="offered load, texts/s", ylabel="texts/s", ylim=(0, None))
    for color, p in zip(SERIES, PERCENTILES, strict=False):
        latency.plot(rates, [row[f"p{p:g}_ms"] for row in offered], "o-", color=color, label=f"p{p:g}")
    latency.set(xlabel="offered load, texts/s", ylabel="latency, ms")
    log_axis(latency, "y")
    for axis in (throughput, latency):
        if knee:
            axis.axvline(knee, linestyle="--", color=BLACK, label="knee")
        axis.set_xlim(left=0)
        legend(axis, ncols=5)
    return figure
