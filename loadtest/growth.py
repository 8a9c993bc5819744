"""How cost grows: Aisle's throughput and p99 by text length, texts a call, categories and model size; and sizing."""

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
from aisle.loadtest.load import closed, open_loop, percentile
from aisle.loadtest.material import random_checkpoint
from aisle.loadtest.services import built
from aisle.loadtest.systems import CORES, Service, aisle
from aisle.preprocess.encode import Encoder
from aisle.report import Page

TOKENS = (8, 16, 32, 64, 128)
BATCHES = (1, 4, 16, 64)  # texts a call
LABELS = (10, 100, 1_000, 10_000)
LABELS_SIZE = "4x256"  # a small model shows what the categories cost
MODELS = ("4x256", "6x512", "base", "large")
IN_FLIGHT = 64  # texts, where throughput is measured
QUIET = 0.5  # of that throughput is offered, where p99 is measured
COLUMNS = {
    "axis": "by",
    "value": "value",
    "texts_per_second": "texts/s",
    "p50_ms": "p50, ms",
    "p99_ms": "p99, ms",
}
# How many machines a day's products take: the busiest second has so many times the average's products …
PEAK = 2.0
USE = 0.7  # … and a machine is loaded up to this share of its throughput, below its knee
DAY = 86_400  # seconds


def measure(texts: Sequence[str], size: str, seconds: float, work: Path, quick: bool) -> dict[str, Any]:
    """Measure along one axis after the other, the rest as in production: a model of `size`, real lengths, 10 labels.

    Throughput is that of 64 texts under way; p50 and p99 are those of an open load of half of it.
    """
    few = 2 if quick else None
    small, models = (size, (size,)) if quick else (LABELS_SIZE, MODELS)
    rows: list[dict[str, Any]] = []

    def point(service: Service, axis: str, value: Any, some: Sequence[str], batch: int = 1) -> None:
        rows.append({"axis": axis, "value": value, **asyncio.run(_point(service, some, batch, seconds))})

    checkpoint = random_checkpoint(work / f"{size}-10", texts, size)
    with aisle(built(checkpoint, work / f"growth-{size}", True), work / "logs" / "growth.log") as service:
        encoder = Encoder(checkpoint / "tokenizer.json")
        for tokens in track(TOKENS[:few], "text lengths"):
            point(service, "tokens", tokens, list(of_length(texts, encoder, tokens)))
        for batch in track(BATCHES[:few], "texts a call"):
            point(service, "texts a call", batch, texts, batch)
    for labels in LABELS[:few]:
        checkpoint = random_checkpoint(work / f"{small}-{labels}", texts, small, labels)
        with aisle(built(checkpoint, work / f"growth-{small}-{labels}", True), work / "logs" / "growth.log") as service:
            point(service, "categories", labels, texts)
    for model in models:
        checkpoint = random_checkpoint(work / f"{model}-10", texts, model)
        with aisle(built(checkpoint, work / f"growth-{model}", True), work / "logs" / "growth.log") as service:
            point(service, "model", model, texts)
    sizes = {row["value"]: sizing(row["texts_per_second"], CORES) for row in rows if row["axis"] == "model"}
    return {"rows": rows, "size": size, "small": small, "seconds": seconds, "cores": CORES, "sizing": sizes}


def sizing(texts_per_second: float, cores: int, per_day: float = 1e9) -> dict[str, float]:
    """Return products a second and core, and how many such machines so many products a day take."""
    return {
        "texts_per_second": texts_per_second,
        "texts_per_second_and_core": texts_per_second / cores,
        "machines": math.ceil(per_day / DAY * PEAK / (USE * texts_per_second)),
        "cores": math.ceil(per_day / DAY * PEAK / (USE * texts_per_second / cores)),
    }


def of_length(texts: Sequence[str], encoder: Encoder, tokens: int, count: int = 64) -> Iterator[str]:
    """Yield texts of so many tokens, [CLS] and [SEP] included: real ones joined and cut."""
    rng = random.Random(tokens)
    for _ in range(count):
        joined = ""
        while len(encoder.tokens([joined])[0]) < tokens:
            joined += " " + rng.choice(texts)
        low, high = 1, len(joined)  # the shortest beginning of so many tokens
        while low < high:
            middle = (low + high) // 2
            if len(encoder.tokens([joined[:middle]])[0]) < tokens:
                low = middle + 1
            else:
                high = middle
        yield joined[:low].strip()


async def _point(service: Service, texts: Sequence[str], batch: int, seconds: float) -> dict[str, float]:
    lists = [list(texts[i : i + batch]) for i in range(0, len(texts) - batch + 1, batch)]
    async with AsyncClassifier(f"127.0.0.1:{service.port}", timeout=60.0) as classifier:
        await asyncio.gather(*map(classifier.classify, lists[:8]))  # warm-up
        full = await closed(classifier.classify, itertools.cycle(lists), max(2, IN_FLIGHT // batch), seconds)
        quiet = await open_loop(
            classifier.classify, itertools.cycle(lists), max(1.0, QUIET * full.texts_per_second), seconds
        )
    return {
        "texts_per_second": full.texts_per_second * batch,
        "p50_ms": 1e3 * percentile(quiet.latencies, 50) if quiet.latencies else 0.0,
        "p99_ms": 1e3 * percentile(quiet.latencies, 99) if quiet.latencies else 0.0,
    }


def add_to(page: Page, found: dict[str, Any]) -> None:
    page.heading("How cost grows")
    page.text(
        f"Throughput with {IN_FLIGHT} texts under way; p50 and p99 of a call under an open load of {QUIET:.0%} of it. "
        f"Lengths and texts a call with the {found['size']} model, categories with {found['small']}; random weights."
    )
    page.table(list(COLUMNS.values()), [[row[key] for key in COLUMNS] for row in found["rows"]])
    axes = list(dict.fromkeys(row["axis"] for row in found["rows"]))
    figure = Figure(figsize=(3.2 * len(axes), 6), layout="constrained")
    for number, axis in enumerate(axes):
        rows = [row for row in found["rows"] if row["axis"] == axis]
        places = [str(row["value"]) for row in rows]
        for line, key in enumerate(("texts_per_second", "p99_ms")):
            plot = figure.add_subplot(2, len(axes), line * len(axes) + number + 1)
            plot.plot(places, [row[key] for row in rows], "o-")
            plot.set(xlabel=axis, ylabel=COLUMNS[key], yscale="log")
    page.plot(figure, "throughput and p99 along each axis")
    page.heading("Sizing")
    page.text(
        f"Machines for 1 billion products a day: 10⁹ / {DAY} s × {PEAK:g} (the busiest second by the average) / "
        f"({USE:g} × texts/s of a machine of {found['cores']} cores), rounded up."
    )
    page.table(
        ["model", "texts/s", "texts/s and core", "machines for 10⁹ a day", "cores for 10⁹ a day"],
        [[model, *each.values()] for model, each in found["sizing"].items()],
    )
