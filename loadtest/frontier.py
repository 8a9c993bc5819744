"""The frontier: which checkpoint, compiled how, is the most accurate at which throughput; all through a real Triton."""

from __future__ import annotations

import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from aisle.build import tensorrt
from aisle.build.build import build
from aisle.build.engine import PRECISIONS, best_target
from aisle.build.gate import GateError
from aisle.client import Classifier, Prediction
from aisle.console import say
from aisle.deploy.triton import Options, free_ports, running
from aisle.errors import InputError
from aisle.report import Page
from aisle.train.checkpoint import read_labels
from aisle.train.evaluate import measure, read_scorable
from aisle.train.evaluation_report import BLUE, GREY

SINGLES = 200  # texts sent one by one for the latency
COLUMNS = {
    "checkpoint": "checkpoint",
    "layers": "layers",
    "hidden_size": "wide",
    "precision": "in",
    "megabytes": "MB",
    "accuracy": "accuracy",
    "macro_f1": "macro-F1",
    "texts_per_second": "texts/s",
    "speedup": "×",
    "latency_ms": "ms, 1 text",
    "best": "frontier",
}


def frontier(
    checkpoints: Sequence[Path],
    data: Path,
    text_column: str,
    label_column: str,
    report: Path,
    *,
    precisions: Sequence[str] = (),
    callers: int,
    seconds: float,
) -> dict[str, Any]:
    """Build each checkpoint in each precision, serve it, and measure it on the held-out part of a table.

    Each engine gets a repository and a Triton of its own, which are gone afterwards; the response cache is off. An
    engine that fails its gate is listed and not served. Writes the page `report`, and the same as .json beside it.

    Args:
        precisions: by default the target's INT8 and its 16-bit floats.
        callers: streams of texts at once, each with several full requests under way.
        seconds: how long these go on.

    Raises:
        InputError: a checkpoint cannot be compiled, or a label of the table is unknown to it.
        ServerError: a server failed.
    """
    texts, labels, _ = read_scorable(data, text_column, label_column, held_out=True)
    for checkpoint in checkpoints:
        unknown = sorted(set(labels) - set(read_labels(checkpoint)))
        if unknown:
            raise InputError(f"label {unknown[0]!r} of {data} is unknown to {checkpoint}; correct it or train anew")
    target = best_target()
    rows = []
    for checkpoint, precision in itertools.product(checkpoints, precisions or PRECISIONS[target][:2]):
        config = json.loads((checkpoint / "config.json").read_text("utf-8"))
        row = {
            "checkpoint": checkpoint.name,
            "layers": config["num_hidden_layers"],
            "hidden_size": config["hidden_size"],
            "precision": precision,
        }
        say(f"{checkpoint.name} in {precision}")
        with tempfile.TemporaryDirectory(prefix="aisle-frontier-") as folder:
            repository = Path(folder, "model_repository")
            try:
                built = build(checkpoint, repository, target, precision)
            except GateError as error:
                say(f"left out: {error}")
                rows.append({**row, "gate": "FAILED", "agreement": error.row["agreement"]})
                continue
            served = _serve(repository, target, texts, labels, callers, seconds)
        say(f"accuracy {served['accuracy']:.4f}, {served['texts_per_second']:.0f} texts/s")
        rows.append({**row, "gate": "passed", "megabytes": built["bytes"] / 1e6, **served})
    result = {
        "data": data.name,
        "held_out_texts": len(texts),
        "target": target,
        "callers": callers,
        "seconds": seconds,
        "threads": torch.get_num_threads(),
        "gpu": tensorrt.gpu_name(),
        "rows": judge(rows),
    }
    _page(result).write(report, result)
    return result


def judge(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows with `speedup` over the first one served, and `best` where none is better in both respects."""
    served = [row for row in rows if "texts_per_second" in row]

    def best(row: dict[str, Any]) -> bool:
        own = row["texts_per_second"], row["accuracy"]
        others = [(other["texts_per_second"], other["accuracy"]) for other in served]
        return not any(speed >= own[0] and right >= own[1] and (speed, right) != own for speed, right in others)

    return [
        {**row, "speedup": row["texts_per_second"] / served[0]["texts_per_second"], "best": best(row)}
        if "texts_per_second" in row
        else row
        for row in rows
    ]


def _serve(
    repository: Path, target: str, texts: Sequence[str], labels: Sequence[str], callers: int, seconds: float
) -> dict[str, float]:
    grpc_port, http_port, metrics_port = free_ports(3)
    options = Options(
        repository,
        grpc_port=grpc_port,
        http_port=http_port,
        metrics_port=metrics_port,
        model_config_name="" if target == "openvino" else "gpu",
        cache_mb=0,
    )
    url = f"localhost:{grpc_port}"
    with (repository / "triton.log").open("wb") as log, running(options, log), Classifier(url, timeout=60) as server:
        scores = measure(texts, labels, list(server.stream(texts)))  # and it is warm
        return {
            **{name: scores[name] for name in ("accuracy", "macro_f1")},
            "texts_per_second": throughput(server, texts, callers, seconds),
            "latency_ms": _latency(server, texts),
        }


def throughput(server: Classifier, texts: Sequence[str], callers: int, seconds: float) -> float:
    """Return the texts per second that a server answers while `callers` streams of them never pause (closed loops)."""
    start = time.perf_counter()

    def call(caller: int) -> int:
        end = time.perf_counter() + seconds
        own = itertools.islice(itertools.cycle(texts), caller * len(texts) // callers, None)
        answers = server.stream(itertools.takewhile(lambda _: time.perf_counter() < end, own))
        return sum(isinstance(answer, Prediction) for answer in answers)

    with ThreadPoolExecutor(callers) as pool:
        answered = sum(pool.map(call, range(callers)))
    return answered / (time.perf_counter() - start)


def _latency(server: Classifier, texts: Sequence[str]) -> float:
    """Return the median milliseconds of one text at a time, nothing else under way."""
    times = []
    for text in texts[:SINGLES]:
        start = time.perf_counter()
        server.classify([text])
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def _page(result: dict[str, Any]) -> Page:
    page = Page(
        "Accuracy and throughput",
        f"Each engine served by a Triton of its own, cache off: accuracy on the {result['held_out_texts']} held-out "
        f"rows of {result['data']}, and texts per second of {result['callers']} streams over {result['seconds']:g} s. "
        f"{result['target']}, {result['threads']} threads; {result['gpu'] or 'no GPU'}.",
    )
    cells = [{**row, "best": "yes" if row.get("best") else ""} for row in result["rows"]]
    page.table(list(COLUMNS.values()), [[row.get(key) for key in COLUMNS] for row in cells])
    failed = [f"{row['checkpoint']} in {row['precision']}" for row in result["rows"] if row["gate"] != "passed"]
    if failed:
        page.text(f"Not served, as the engine does not answer as its checkpoint does: {', '.join(failed)}.")
    served = sorted(
        (row for row in result["rows"] if row["gate"] == "passed"), key=lambda row: -row["texts_per_second"]
    )
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    on = [row for row in served if row["best"]]
    axes.step([row["texts_per_second"] for row in on], [100 * row["accuracy"] for row in on], color=GREY, where="post")
    for row in served:
        at = row["texts_per_second"], 100 * row["accuracy"]
        axes.scatter(*at, color=BLUE if row["best"] else GREY)
        name = f"{row['checkpoint']}, {row['precision']}"
        axes.annotate(name, at, xytext=(5, 5), textcoords="offset points", fontsize=9)
    axes.set(xlabel="texts per second", ylabel="accuracy, %", xscale="log")
    axes.margins(x=0.25, y=0.1)
    axes.grid(alpha=0.3, which="both")
    page.plot(figure, "Accuracy against throughput; the line joins the engines that no other beats in both")
    return page
