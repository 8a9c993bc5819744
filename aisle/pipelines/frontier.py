"""The frontier: accuracy against throughput of checkpoints in several precisions, each served by a real Triton."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from aisle.build.build import build
from aisle.build.cuda_runtime import gpu_name
from aisle.build.engine import PRECISIONS, best_target, check_target
from aisle.build.gate import GateError
from aisle.client import Classifier, Failure
from aisle.console import say
from aisle.deploy.server.triton import ServerOptions, free_ports, running
from aisle.errors import InputError
from aisle.loadtest.generator import checked, closed_blocking, percentile, streamed
from aisle.palette import BLUE, GREY
from aisle.plots import legend, log_axis, percent_axis
from aisle.report import Page
from aisle.train.core.checkpoint import Checkpoint
from aisle.train.evaluation.evaluate import measure, read_scorable

LATENCY_SECONDS = 5.0  # at most, for the latency of one text at a time
COLUMNS = {
    "checkpoint": "checkpoint",
    "layers": "layers",
    "hidden_size": "width",
    "precision": "precision",
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

    Each engine gets a temporary repository and its own Triton; the response cache is off. An engine that fails its gate
    is listed but not served. Writes the page `report` and a .json beside it.

    Args:
        precisions: by default INT8 and 16-bit floats of the target.
        callers: concurrent streams of texts, each with several full requests in flight.
        seconds: duration of each throughput measurement.

    Raises:
        InputError: a checkpoint cannot be compiled, or a label of the table is unknown to it.
        ServerError: a server failed.
    """
    texts, labels, _ = read_scorable(data, text_column, label_column, held_out=True)
    for checkpoint in checkpoints:
        Checkpoint(checkpoint).check_fields(text_column)
        Checkpoint(checkpoint).check_one_category("aisle frontier")
    labels = Checkpoint(checkpoints[0]).labelling.apply(labels)
    _check_categories(checkpoints, labels, data)
    target = best_target()
    for precision in precisions:
        check_target(target, precision)
    measured = partial(_measure, target=target, texts=texts, labels=labels, callers=callers, seconds=seconds)
    engines = itertools.product(checkpoints, precisions or PRECISIONS[target][:2])
    result = {
        "data": data.name,
        "held_out_texts": len(texts),
        "target": target,
        "callers": callers,
        "seconds": seconds,
        "threads": torch.get_num_threads(),
        "gpu": gpu_name(),
        "rows": mark_best([measured(checkpoint, precision) for checkpoint, precision in engines]),
    }
    _page(result).write(report, result)
    return result


def _check_categories(checkpoints: Sequence[Path], labels: Sequence[str], data: Path) -> None:
    for checkpoint in checkpoints:
        unknown = sorted(set(labels) - set(Checkpoint(checkpoint).labels))
        if unknown:
            raise InputError(f"label {unknown[0]!r} of {data} is unknown to {checkpoint}; correct it or train again")


def _measure(
    checkpoint: Path,
    precision: str,
    *,
    target: str,
    texts: Sequence[str],
    labels: Sequence[str],
    callers: int,
    seconds: float,
) -> dict[str, Any]:
    """Build an engine, serve it and return its figures; an engine that fails its gate is not served."""
    config = json.loads((checkpoint / "config.json").read_text("utf-8"))
    sizes = {"layers": config["num_hidden_layers"], "hidden_size": config["hidden_size"]}
    row = {"checkpoint": checkpoint.name, **sizes, "precision": precision}
    say(f"{checkpoint.name} in {precision}")
    with tempfile.TemporaryDirectory(prefix="aisle-frontier-") as folder:
        repository = Path(folder, "model_repository")
        try:
            built = build(checkpoint, repository, target, precision)
        except GateError as error:
            say(f"not served: {error}")
            return {**row, "gate": "FAILED", "agreement": error.row["agreement"]}
        served = _serve(repository, target, texts, labels, callers, seconds)
    say(f"accuracy {served['accuracy']:.4f}, {served['texts_per_second']:.0f} texts/s")
    return {**row, "gate": "passed", "megabytes": built["bytes"] / 1e6, **served}


def mark_best(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows with `speedup` over the first served row, and `best` if no row is better in both figures."""
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
    options = ServerOptions(
        repository,
        grpc_port=grpc_port,
        http_port=http_port,
        metrics_port=metrics_port,
        model_config_name="" if target == "openvino" else "gpu",
        cache_mb=0,
    )
    url = f"localhost:{grpc_port}"
    with (repository / "triton.log").open("wb") as log, running(options, log), Classifier(url, timeout=60) as server:
        scores = measure(texts, labels, list(server.stream(texts)))  # this also warms up the server
        return {
            **{name: scores[name] for name in ("accuracy", "macro_f1")},
            "texts_per_second": throughput(server, texts, callers, seconds),
            "latency_ms": _latency(server, texts, min(seconds, LATENCY_SECONDS)),
        }


def throughput(server: Classifier, texts: Sequence[str], callers: int, seconds: float) -> float:
    """Return the texts per second of a server under `callers` concurrent streams without pauses (closed loops)."""
    load = streamed(
        server.stream, texts, callers, seconds, server.max_batch, lambda answer: isinstance(answer, Failure)
    )
    return load.texts_per_second


def _latency(server: Classifier, texts: Sequence[str], seconds: float) -> float:
    """Return the median milliseconds of one text at a time, with no other load."""
    load = checked(closed_blocking(lambda text: server.classify([text]), itertools.cycle(texts), 1, seconds))
    return 1e3 * percentile(load.latencies, 50)


def _page(result: dict[str, Any]) -> Page:
    page = Page(
        "Accuracy and throughput",
        f"Each engine has its own Triton, with the cache off. Accuracy is measured on the {result['held_out_texts']} "
        f"held-out rows of {result['data']}, throughput with {result['callers']} concurrent streams over "
        f"{result['seconds']:g} s.",
        {name: result[name] for name in ("data", "target", "callers", "seconds", "threads")},
    )
    cells = [{**row, "best": "yes" if row.get("best") else ""} for row in result["rows"]]
    page.table(list(COLUMNS.values()), [[row.get(key) for key in COLUMNS] for row in cells])
    failed = [f"{row['checkpoint']} in {row['precision']}" for row in result["rows"] if row["gate"] != "passed"]
    if failed:
        page.text(f"Not served, because the gate failed: {', '.join(failed)}.")
    served = [row for row in result["rows"] if row["gate"] == "passed"]
    page.plot(_figure(sorted(served, key=lambda row: -row["texts_per_second"])), "Accuracy by throughput")
    return page


def _figure(served: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    best = [row for row in served if row["best"]]
    speeds, accuracies = [row["texts_per_second"] for row in best], [row["accuracy"] for row in best]
    axes.step(speeds, accuracies, color=GREY, where="post", label="frontier: no engine is better in both")
    for row in served:
        at = row["texts_per_second"], row["accuracy"]
        axes.scatter(*at, color=BLUE if row["best"] else GREY, clip_on=False, zorder=3)
        name = f"{row['checkpoint']}, {row['precision']}"
        axes.annotate(name, at, xytext=(5, 5), textcoords="offset points", fontsize=9)
    axes.set(xlabel="texts per second", ylabel="accuracy", xscale="log")
    axes.margins(x=0.25)
    log_axis(axes, "x")
    percent_axis(axes, "y", whole=False)
    axes.grid(alpha=0.3)
    legend(axes)
    return figure
