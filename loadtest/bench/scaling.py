"""Scaling: Aisle's throughput and p99 by text length, texts per call, categories and model size; and sizing."""

from __future__ import annotations

import asyncio
import itertools
import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from aisle.client import AsyncClassifier
from aisle.console import track
from aisle.loadtest.bench.fixtures import random_checkpoint
from aisle.loadtest.bench.services import built
from aisle.loadtest.bench.systems import CORES, Service, aisle
from aisle.loadtest.generator import closed, open_loop, percentile
from aisle.palette import BLUE
from aisle.plots import log_axis
from aisle.preprocess.encode import TextTokenizer
from aisle.report import Page
from aisle.train.core.checkpoint import Checkpoint

TOKENS = (8, 16, 32, 64, 128)
BATCHES = (1, 4, 16, 64)  # texts per call
LABELS = (10, 100, 1_000, 10_000)
LABELS_SIZE = "4x256"  # in a small model, the cost of categories is visible
MODELS = ("4x256", "6x512", "base", "large")
IN_FLIGHT = 64  # texts under way while throughput is measured
OPEN_SHARE = 0.5  # share of that throughput that is offered while p99 is measured
COLUMNS = {
    "axis": "by",
    "value": "value",
    "texts_per_second": "texts/s",
    "p50_ms": "p50, ms",
    "p99_ms": "p99, ms",
}
PEAK_FACTOR = 2.0  # products in the busiest second, divided by the average
UTILIZATION = 0.7  # of a machine in the busiest second; this is below its knee
SECONDS_PER_DAY = 86_400


def measure(texts: Sequence[str], size: str, seconds: float, work: Path, quick: bool) -> dict[str, Any]:
    """Vary one parameter after the other; the defaults are a model of `size`, real text lengths and 10 labels.

    Throughput is measured with 64 texts under way; p50 and p99 under an open load of half that throughput.
    """
    limit = 2 if quick else None
    small, models = (size, (size,)) if quick else (LABELS_SIZE, MODELS)
    rows: list[dict[str, Any]] = []

    def point(service: Service, axis: str, value: Any, some: Sequence[str], batch: int = 1) -> None:
        rows.append({"axis": axis, "value": value, **asyncio.run(_point(service, some, batch, seconds))})

    log = work / "logs" / "scaling.log"
    checkpoint = random_checkpoint(work / f"{size}-10", texts, size)
    with aisle(built(checkpoint, work / f"scaling-{size}", True), log) as service:
        tokenizer = Checkpoint(checkpoint).tokenizer
        for tokens in track(TOKENS[:limit], "text lengths"):
            point(service, "tokens", tokens, list(texts_of_length(texts, tokenizer, tokens)))
        for batch in track(BATCHES[:limit], "texts per call"):
            point(service, "texts per call", batch, texts, batch)
    for labels in LABELS[:limit]:
        checkpoint = random_checkpoint(work / f"{small}-{labels}", texts, small, labels)
        with aisle(built(checkpoint, work / f"scaling-{small}-{labels}", True), log) as service:
            point(service, "categories", labels, texts)
    for model in models:
        checkpoint = random_checkpoint(work / f"{model}-10", texts, model)
        with aisle(built(checkpoint, work / f"scaling-{model}", True), log) as service:
            point(service, "model", model, texts)
    sizes = {row["value"]: sizing(row["texts_per_second"], CORES) for row in rows if row["axis"] == "model"}
    return {"rows": rows, "size": size, "small": small, "seconds": seconds, "cores": CORES, "sizing": sizes}


def sizing(texts_per_second: float, cores: int, per_day: float = 1e9) -> dict[str, float]:
    """Return texts per second, in all and per core, and the machines and cores that `per_day` products need."""
    return {
        "texts_per_second": texts_per_second,
        "texts_per_second_and_core": texts_per_second / cores,
        "machines": math.ceil(per_day / SECONDS_PER_DAY * PEAK_FACTOR / (UTILIZATION * texts_per_second)),
        "cores": math.ceil(per_day / SECONDS_PER_DAY * PEAK_FACTOR / (UTILIZATION * texts_per_second / cores)),
    }


def texts_of_length(texts: Sequence[str], tokenizer: TextTokenizer, tokens: int, count: int = 64) -> Iterator[str]:
    """Yield texts of `tokens` tokens, [CLS] and [SEP] included: real texts, joined and truncated."""
    rng = random.Random(tokens)
    for _ in range(count):
        joined = ""
        while len(tokenizer.tokens([joined])[0]) < tokens:
            joined += " " + rng.choice(texts)
        low, high = 1, len(joined)  # find the shortest prefix with this many tokens by bisection
        while low < high:
            middle = (low + high) // 2
            if len(tokenizer.tokens([joined[:middle]])[0]) < tokens:
                low = middle + 1
            else:
                high = middle
        yield joined[:low].strip()


async def _point(service: Service, texts: Sequence[str], batch: int, seconds: float) -> dict[str, float]:
    lists = [list(texts[i : i + batch]) for i in range(0, len(texts) - batch + 1, batch)]
    async with AsyncClassifier(f"127.0.0.1:{service.port}", timeout=60.0) as classifier:
        await asyncio.gather(*map(classifier.classify, lists[:8]))  # warm-up
        full = await closed(classifier.classify, itertools.cycle(lists), max(2, IN_FLIGHT // batch), seconds)
        steady = await open_loop(
            classifier.classify, itertools.cycle(lists), max(1.0, OPEN_SHARE * full.texts_per_second), seconds
        )
    return {
        "texts_per_second": full.texts_per_second * batch,
        "p50_ms": 1e3 * percentile(steady.latencies, 50) if steady.latencies else 0.0,
        "p99_ms": 1e3 * percentile(steady.latencies, 99) if steady.latencies else 0.0,
    }


def add_to(page: Page, found: dict[str, Any]) -> None:
    page.heading("Scaling")
    page.text(
        f"Throughput with {IN_FLIGHT} texts under way; p50 and p99 of a call under an open load of {OPEN_SHARE:.0%} of "
        f"it. Text lengths and texts per call are measured with the {found['size']} model, categories with "
        f"{found['small']}. All weights are random."
    )
    page.records(COLUMNS, found["rows"])
    axes = list(dict.fromkeys(row["axis"] for row in found["rows"]))
    figure = Figure(figsize=(3.2 * len(axes), 6), layout="constrained")
    for number, axis in enumerate(axes):
        rows = [row for row in found["rows"] if row["axis"] == axis]
        places = [str(row["value"]) for row in rows]
        for line, key in enumerate(("texts_per_second", "p99_ms")):
            plot = figure.add_subplot(2, len(axes), line * len(axes) + number + 1)
            plot.plot(places, [row[key] for row in rows], "o-", color=BLUE)
            plot.set(xlabel=axis, ylabel=COLUMNS[key])
            log_axis(plot, "y")
    page.plot(figure, "Throughput and p99 latency by each parameter")
    page.heading("Sizing")
    page.text(
        f"Machines for 1 billion products a day: 10⁹ / {SECONDS_PER_DAY} s × {PEAK_FACTOR:g} (busiest second / "
        f"average) / ({UTILIZATION:g} × texts/s of a machine of {found['cores']} cores), rounded up."
    )
    page.table(
        ["model", "texts/s", "texts/s per core", "machines for 10⁹ a day", "cores for 10⁹ a day"],
        [[model, *each.values()] for model, each in found["sizing"].items()],
    )
