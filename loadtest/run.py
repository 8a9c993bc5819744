"""Run Locust, alone or with workers; read its figures, find the knee, write the page, ask for a second opinion."""

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

from aisle.client.protocol import MODEL
from aisle.errors import InputError, ServerError
from aisle.loadtest.machine import describe, machine
from aisle.preprocess.clean import TextError, prepare
from aisle.preprocess.table import read_labelled
from aisle.report import Page

LOCUSTFILE = Path(__file__).with_name("locustfile.py")
PERCENTILES = (50, 95, 99, 99.9)
ANSWERED = 0.95  # share of the offered load that a server below its knee answers in time
SLOWER = 5.0  # times the p99 of the lightest load that its p99 there may be
COLUMNS = {
    "load": "load",
    "offered": "offered/s",
    "texts_per_second": "texts/s",
    **{f"p{p:g}_ms": f"p{p:g}, ms" for p in PERCENTILES},
    "failures": "failed",
}


@dataclass(frozen=True)
class Steps:
    """The load over time."""

    callers: Sequence[int] = (1, 8, 64)  # closed
    shares: Sequence[float] = (0.1, 0.25, 0.5, 0.7, 0.8, 0.9, 1.0, 1.1)  # open, of what the closed ones reached
    seconds: float = 10.0  # of each that count
    warm_up: float = 2.0  # of each that do not
    zipf: float | None = None  # the exponent of how often texts come; each as often as the others without it


def label(kind: str, much: float) -> str:
    """Return the name of a load in Locust's statistics."""
    return f"{much:g} at once" if kind == "closed" else f"{much:g} a second"


def loadtest(
    data: Path, text_column: str, url: str, steps: Steps, report: Path, workers: int = 0, web: bool = False
) -> dict[str, Any]:
    """Put the steps on a running server, with `workers` processes or in one; write the page and, beside it, the .json.

    With `web`, Locust's own page is served until it is stopped, and the load is started there.

    Raises:
        InputError: the table cannot be read or is empty.
        ServerError: Locust failed, or no call was answered.
    """
    if next(read_labelled(data, text_column, text_column), None) is None:
        raise InputError(f"{data} has no rows")
    environment = {
        **os.environ,
        "AISLE_DATA": str(data.resolve()),
        "AISLE_TEXT_COLUMN": text_column,
        "AISLE_STEPS": json.dumps(asdict(steps)),
    }
    command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--host", url]
    helpers = [subprocess.Popen([*command, "--worker"], env=environment, stdout=sys.stderr) for _ in range(workers)]
    if workers:
        command += ["--master", "--expect-workers", str(workers)]
    if not web:
        command += ["--headless", "--only-summary", "--json"]
    try:
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    finally:
        for helper in helpers:
            helper.terminate()
            helper.wait()
    found = re.search(r"^\[.*", done.stdout, re.M | re.S)
    entries = json.loads(found.group()) if found else []
    rows = [row for row in map(_row(steps), entries) if row is not None]
    if not rows or not any(row["texts_per_second"] for row in rows):
        raise ServerError(f"no call to {url} was answered; is the server up?")
    rows.sort(key=lambda row: (row["offered"] is not None, row["much"]))
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


def _row(steps: Steps) -> Any:
    def row(entry: dict[str, Any]) -> dict[str, Any] | None:
        found = re.fullmatch(r"(\d+) (at once|a second)", entry["name"])
        if found is None:  # the warm-up
            return None
        times = sorted((float(ms), count) for ms, count in entry["response_times"].items())
        answered = entry["num_requests"] - entry["num_failures"]
        return {
            "load": entry["name"],
            "much": int(found.group(1)),
            "offered": int(found.group(1)) if found.group(2) == "a second" else None,
            "texts": entry["num_requests"],
            "failures": entry["num_failures"],
            "texts_per_second": answered / steps.seconds,
            **{f"p{p:g}_ms": percentile(times, p) for p in PERCENTILES},
        }

    return row


def percentile(times: list[tuple[float, int]], percent: float) -> float:
    """Return the least time that `percent` of the calls did not exceed, of a histogram sorted by time.

    Locust keeps times above 100 ms to two digits.
    """
    rank = percent / 100 * sum(count for _, count in times) - 1e-9
    seen = 0
    for time, count in times:
        seen += count
        if seen >= rank:
            return time
    return times[-1][0]


def knee(rows: Sequence[dict[str, Any]], seconds: float) -> int | None:
    """Return the highest offered load up to which all is answered in time; None where the lightest is too much.

    In time: 95 % of the offered load are answered while it lasts, less two standard deviations of how many calls come
    by chance, and p99 is within 5 times that of the lightest load.
    """
    offered = [row for row in rows if row["offered"] is not None]
    best: int | None = None
    for row in offered:
        least = ANSWERED * row["offered"] - 2 * math.sqrt(row["offered"] / seconds)
        if row["texts_per_second"] < least or row["p99_ms"] > SLOWER * offered[0]["p99_ms"]:
            break
        best = row["offered"]
    return best


def second_opinion(data: Path, text_column: str, url: str, callers: int, seconds: int) -> dict[str, Any]:
    """Have h2load, nghttp2's load generator, and Locust send the same one text with so many calls at once.

    gRPC is HTTP/2 with five bytes before each message, so that h2load can send a prepared one. It sends but one; the
    server's response cache must be off (`aisle serve --cache-mb 0`), else it is the cache that is measured.

    Raises:
        InputError: h2load is not installed, or the table holds no text that can be classified.
        ServerError: no call was answered.
    """
    tool = shutil.which("h2load")
    if tool is None:
        raise InputError("there is no h2load: apt-get install nghttp2-client")
    text = _typical(data, text_column)
    with tempfile.TemporaryDirectory(prefix="aisle-loadtest-") as folder:
        body, table = Path(folder, "body"), Path(folder, "text.jsonl")
        body.write_bytes(frame(text))
        table.write_text(json.dumps({"text": text}) + "\n", "utf-8")
        command = [tool, "-c1", "-t1", f"-m{callers}", f"-D{seconds}", "--warm-up-time=2", "-d", str(body)]
        command += ["-H", "content-type: application/grpc", "-H", "te: trailers"]
        command.append(f"http://{url}/inference.GRPCInferenceService/ModelInfer")
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        theirs = read_h2load(done.stdout)
        ours = loadtest(table, "text", url, Steps((callers,), (), float(seconds)), Path(folder, "report.html"))["rows"][
            0
        ]
    return {
        "text": text,
        "callers": callers,
        "h2load_texts_per_second": theirs,
        "locust_texts_per_second": ours["texts_per_second"],
        "ratio": ours["texts_per_second"] / theirs,
    }


def frame(text: str) -> bytes:
    """Return the body of a gRPC call that classifies a text."""
    from tritonclient.grpc import service_pb2

    request = service_pb2.ModelInferRequest(model_name=MODEL)
    tensor = request.inputs.add(name="text", datatype="BYTES", shape=[1, 1])
    tensor.contents.bytes_contents.append(text.encode())
    message: bytes = request.SerializeToString()
    return b"\0" + len(message).to_bytes(4, "big") + message


def read_h2load(output: str) -> float:
    """Return the requests per second of h2load's summary.

    Raises:
        ServerError: there is none, or calls failed.
    """
    speed = re.search(r"finished in [\d.]+\w+, ([\d.]+) req/s", output)
    failed = re.search(r"(\d+) failed, (\d+) errored, (\d+) timeout", output)
    if speed is None or failed is None or float(speed.group(1)) == 0 or any(map(int, failed.groups())):
        last = output.strip().splitlines()[-1:] or ["nothing came back"]
        raise ServerError(f"h2load could not measure the server: {last[0]}")
    return float(speed.group(1))


def _typical(data: Path, text_column: str) -> str:
    """Return a text of median length of the first thousand."""
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
    mix = "each as often as the others" if result["zipf"] is None else f"as Zipf has it, exponent {result['zipf']:g}"
    page = Page(
        f"Load on {url}",
        f"Texts of {data.name}, {mix}, one a call, over one gRPC channel a process. Each load counts for "
        f"{result['seconds']:g} s after {result['warm_up']:g} s that do not. In open loads, calls come as a Poisson "
        f"process and latency counts from when a call was due. Sent by Locust {result['locust']} on "
        f"{describe(result['machine'])}.",
    )
    page.table(list(COLUMNS.values()), [[row[key] for key in COLUMNS] for row in result["rows"]])
    offered = [row for row in result["rows"] if row["offered"] is not None]
    where = f"at {result['knee']} texts/s" if result["knee"] else "below the lightest load"
    page.text(
        f"The knee is {where}: up to there {ANSWERED:.0%} of what is offered is answered in time, with a p99 within "
        f"{SLOWER:g} times that of the lightest load."
    )
    if offered:
        figure = Figure(figsize=(11, 4.5), layout="constrained")
        throughput, latency = figure.subplots(1, 2)
        rates = [row["offered"] for row in offered]
        throughput.plot(rates, [row["texts_per_second"] for row in offered], "o-", label="answered")
        throughput.plot(rates, rates, ":", color="grey", label="offered")
        throughput.set(xlabel="offered load, texts/s", ylabel="texts/s")
        for p in PERCENTILES:
            latency.plot(rates, [row[f"p{p:g}_ms"] for row in offered], "o-", label=f"p{p:g}")
        latency.set(xlabel="offered load, texts/s", ylabel="latency, ms", yscale="log")
        for axis in (throughput, latency):
            if result["knee"]:
                axis.axvline(result["knee"], linestyle="--", color="black", label="knee")
            axis.legend()
        page.plot(figure, "throughput and latency against offered load")
    return page
