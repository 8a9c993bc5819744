"""The bench: what is fast and by how much, measured in one run; the page and the .json that say so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from aisle.errors import InputError
from aisle.loadtest import engines, growth, services
from aisle.loadtest.machine import describe, machine
from aisle.loadtest.material import random_checkpoint, read_texts
from aisle.preprocess.encode import Encoder
from aisle.report import Page
from aisle.train.checkpoint import load_model

PARTS = ("engines", "services", "growth")
DEFAULT = PARTS[:2]
TEXTS = 20_000  # read of a table: more than a run sends, so that no text comes twice


@dataclass(frozen=True)
class Settings:
    """What a run measures with."""

    data: Path | None = None  # texts; the SYNTHETIC catalogue by default
    text_column: str = "text"
    model: Path | None = None  # a checkpoint; random weights by default
    size: str = "base"  # of the random weights
    systems: Sequence[str] = services.SYSTEMS
    seconds: float = 5.0  # of each load on a service and round
    rounds: int = 2
    tune: bool = False  # the peers' settings first
    quick: bool = False  # a tiny model and moments: shows that all runs, and measures nothing
    work: Path = Path("work/bench")

    @property
    def engine_texts(self) -> int:
        return 64 if self.quick else 128

    @property
    def plan(self) -> services.Plan:
        if self.quick:
            return services.Plan(self.systems, (1, 4), 0.3, 1, self.tune)
        return services.Plan(self.systems, (1, 8, 64), self.seconds, self.rounds, self.tune)


def bench(parts: Sequence[str], settings: Settings, page: Path) -> dict[str, Any]:
    """Measure parts of `PARTS` and write the page and, beside it, the .json.

    Raises:
        InputError: there is no such part, or the data or the model cannot be used.
    """
    for part in parts:
        if part not in PARTS:
            raise InputError(f"no part {part!r} of the bench; choose from {', '.join(PARTS)}")
    for name in settings.systems:
        if name not in services.SYSTEMS:
            raise InputError(f"no system {name!r}; choose from {', '.join(services.SYSTEMS)}")
    texts = read_texts(settings.data, settings.text_column, TEXTS)
    size = "tiny" if settings.quick else settings.size
    checkpoint = settings.model or random_checkpoint(settings.work / f"{size}-10", texts, size)
    result: dict[str, Any] = {
        "machine": machine(),
        "quick": settings.quick,
        "data": settings.data.name if settings.data else "the SYNTHETIC sample catalogue",
        "model": settings.model.name if settings.model else f"BERT {size} with random weights",
        "checkpoint": str(checkpoint),
    }
    if "engines" in parts:
        encoder = Encoder(checkpoint / "tokenizer.json")
        tokens = encoder.tokens(texts[: settings.engine_texts])
        rounds = 1 if settings.quick else settings.rounds
        result["engines"] = engines.measure(load_model(checkpoint), tokens, encoder.max_tokens, rounds)
    if "services" in parts:
        random_weights = settings.model is None
        result["services"] = services.measure(checkpoint, texts, settings.plan, settings.work, random_weights)
    if "growth" in parts:
        seconds = 0.3 if settings.quick else settings.seconds
        result["growth"] = growth.measure(texts, size, seconds, settings.work, settings.quick)
    _page(result).write(page, result)
    return {**result, "report": str(page)}


def _page(result: dict[str, Any]) -> Page:
    quick = "A QUICK RUN of a tiny model: these figures mean nothing. " if result["quick"] else ""
    page = Page(
        "Bench", f"{quick}{result['model']}, texts of {result['data']}. Measured on {describe(result['machine'])}."
    )
    if "engines" in result:
        _engines(page, result["engines"])
    if "services" in result:
        _services(page, result["services"])
    if "growth" in result:
        growth.add_to(page, result["growth"])
    return page


def _engines(page: Page, found: dict[str, Any]) -> None:
    page.heading("Engines")
    page.text(
        f"{found['texts']} texts in order of arrival, {found['mean_tokens']:.1f} tokens on average; "
        f"{found['rounds']} rounds, interleaved; the sum of each batch's median time."
    )
    page.table(list(engines.COLUMNS.values()), [[row[key] for key in engines.COLUMNS] for row in found["rows"]])
    page.text(engines_summary(found))
    names = list(dict.fromkeys(row["system"] for row in found["rows"]))
    figure = Figure(figsize=(9, 0.6 * len(names) + 1), layout="constrained")
    axis = figure.subplots()
    for number, size in enumerate(engines.BATCHES):
        speeds = {row["system"]: row["texts_per_second"] for row in found["rows"] if row["batch"] == size}
        places = [i + 0.4 * number - 0.2 for i in range(len(names))]
        axis.bar_label(axis.barh(places, [speeds[name] for name in names], 0.4, label=f"batches of {size}"), fmt="%.3g")
    axis.axvline(found["ceiling_texts_per_second"], color="black", linestyle=":", label="bare int8 matrix products")
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set_xlabel("texts/s")
    axis.legend()
    page.plot(figure, "throughput of each engine")


def engines_summary(found: dict[str, Any]) -> str:
    return (
        f"INT8 is {found['int8_to_pytorch']:.2f} × PyTorch fp32 padded in batches of {engines.BATCHES[0]}, "
        f"{found['int8_to_bf16']:.2f} × bf16, and reaches {found['share_of_ceiling']:.0%} of what the bare int8 matrix "
        f"products of the same sizes reach on these cores ({found['ceiling_texts_per_second']:.1f} texts/s, "
        f"{found['ceiling_gops']:.0f} Gop/s)."
    )


def _services(page: Page, found: dict[str, Any]) -> None:
    page.heading("Services")
    page.text(
        f"{found['rounds']} rounds of at least {found['seconds']:g} s a load, interleaved; one service is awake at a "
        f"time. Throughput is the rounds' median, latencies are of all rounds; in open loads, calls come as a Poisson "
        f"process and latency counts from the scheduled time. Aisle is called over gRPC (grpc.aio), the peers over "
        f"HTTP/1.1 with connections kept alive (aiohttp), by the same load generator on the same cores, a text a call. "
        f"Aisle's response cache is off. The engine alone runs batches of as many texts as there are callers."
    )
    page.table(list(services.COLUMNS.values()), [[row[key] for key in services.COLUMNS] for row in found["rows"]])
    for line in services_summary(found):
        page.text(line)
    page.table(
        ["system", f"answers as PyTorch fp32, of {found['checked_texts']} texts", "settings"],
        [
            [name, share, ", ".join(f"{key} {value}" for key, value in found["settings"].get(name, {}).items())]
            for name, share in found["agreement"].items()
        ],
    )
    systems = list(dict.fromkeys(row["system"] for row in found["rows"]))
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    closed, opened = figure.subplots(1, 2)
    for name in systems:
        rows = [row for row in found["rows"] if row["system"] == name]
        saturated = [row for row in rows if row["kind"] == "closed"]
        closed.plot([r["callers"] for r in saturated], [r["texts_per_second"] for r in saturated], "o-", label=name)
        offered = [row for row in rows if row["kind"] == "open" and row["p99_ms"] is not None]
        opened.plot([row["rate"] for row in offered], [row["p99_ms"] for row in offered], "o-", label=name)
    closed.set(xscale="log", yscale="log", xlabel="callers at once", ylabel="texts/s")
    opened.set(xscale="log", yscale="log", xlabel="offered load, texts/s", ylabel="p99, ms")
    closed.legend()
    page.plot(figure, "throughput by callers, and p99 by offered load")
    for name, tried in found["tuning"].items():
        page.heading(f"Settings of {name}")
        page.table(
            ["settings", f"texts/s, {services.TUNED_AT} callers"],
            [
                [", ".join(f"{key} {value}" for key, value in each["settings"].items()), each["texts_per_second"]]
                for each in tried
            ],
        )


def services_summary(found: dict[str, Any]) -> list[str]:
    lines = [f"Aisle's throughput is {times:.1f} × that of {name}." for name, times in found["times_as_fast"].items()]
    if found["share_of_engine"] is not None:
        lines.append(
            f"It reaches {found['share_of_engine']:.0%} of the engine alone with single texts, "
            f"{found['share_of_engine_files']:.0%} with {services.AT_ONCE} a call."
        )
    if found["added_ms"] is not None:
        lines.append(f"The server adds {found['added_ms']:.1f} ms to the median latency of one text at a time.")
    if found["times_as_fast"]:
        elsewhere = "; ".join(found["lower_p99_elsewhere"])
        lines.append(
            f"A peer's p99 is lower at: {elsewhere}." if elsewhere else "Its p99 is lower at every equal load."
        )
    return lines
