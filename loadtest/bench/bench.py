"""`aisle bench`: run the chosen parts, and write the page and its .json."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from aisle.errors import InputError
from aisle.loadtest.bench import comparison, engines, host, rest, scaling, services
from aisle.loadtest.bench.fixtures import random_checkpoint, read_texts
from aisle.loadtest.bench.machine import describe, machine
from aisle.loadtest.bench.parts import PARTS
from aisle.palette import BLACK, SERIES
from aisle.plots import legend, log_axis
from aisle.preprocess.windows import separate
from aisle.report import Page
from aisle.train.core.checkpoint import Checkpoint

TEXTS = 20_000  # read from a table: more than a run sends, so that no text is sent twice


@dataclass(frozen=True)
class BenchSettings:
    """The settings of `aisle bench`."""

    data: Path | None = None  # texts; the SYNTHETIC catalogue by default
    text_column: str = "text"
    model: Path | None = None  # a checkpoint; random weights by default
    size: str = "base"  # size of the model with random weights
    systems: Sequence[str] = services.SYSTEMS
    seconds: float = 3.0  # of each load on each service in each round
    rounds: int = 7
    tune: bool = False  # find the peers' best settings first
    quick: bool = False  # a tiny model and very short loads: only checks that everything runs
    work: Path = Path("work/bench")

    @property
    def engine_texts(self) -> int:
        return 64 if self.quick else 128

    @property
    def plan(self) -> services.BenchPlan:
        if self.quick:
            return services.BenchPlan(self.systems, (1, 4), 0.3, 1, self.tune)
        return services.BenchPlan(self.systems, (1, 8, 64), self.seconds, self.rounds, self.tune)


def bench(parts: Sequence[str], settings: BenchSettings, page: Path) -> dict[str, Any]:
    """Measure the given parts (see `PARTS`) and write the page and, beside it, the .json.

    Raises:
        InputError: a part or a system does not exist, or the data or the model cannot be used.
    """
    _check_names(parts, settings.systems)
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
        source = Checkpoint(checkpoint)
        tokens, _ = separate(source.tokenizer.tokens(texts[: settings.engine_texts]), source.tokenizer.max_tokens)
        rounds = 1 if settings.quick else settings.rounds
        result["engines"] = engines.measure(source.model, tokens, source.tokenizer.max_tokens, rounds)
    if "services" in parts:
        random_weights = settings.model is None
        result["services"] = services.measure(checkpoint, texts, settings.plan, settings.work, random_weights)
    if "scaling" in parts:
        seconds = 0.3 if settings.quick else settings.seconds
        result["scaling"] = scaling.measure(texts, size, seconds, settings.work, settings.quick)
    if "host" in parts:
        seconds, rounds = (0.3, 1) if settings.quick else (settings.seconds, settings.rounds)
        result["host"] = host.measure(checkpoint, texts, settings.work, seconds, rounds)
    if "rest" in parts:
        seconds, rounds = (0.3, 1) if settings.quick else (settings.seconds, settings.rounds)
        small = "tiny" if settings.quick else rest.SIZE
        model = settings.model or random_checkpoint(settings.work / f"{small}-10", texts, small)
        result["rest"] = rest.measure(model, texts, settings.work, seconds, rounds, settings.model is None)
    _page(result).write(page, result)
    return {**result, "report": str(page)}


def _check_names(parts: Sequence[str], systems: Sequence[str]) -> None:
    """Make sure that the parts and systems exist.

    Raises:
        InputError: one does not.
    """
    for part in parts:
        if part not in PARTS:
            raise InputError(f"the bench has no part {part!r}; choose from {', '.join(PARTS)}")
    for name in systems:
        if name not in services.SYSTEMS:
            raise InputError(f"the bench has no system {name!r}; choose from {', '.join(services.SYSTEMS)}")


def _page(result: dict[str, Any]) -> Page:
    quick = "A QUICK RUN of a tiny model: its figures are meaningless. " if result["quick"] else ""
    page = Page(
        "Bench", f"{quick}{result['model']}, texts of {result['data']}. Measured on {describe(result['machine'])}."
    )
    if "engines" in result:
        _add_engines(page, result["engines"])
    if "services" in result:
        _add_services(page, result["services"])
    if "scaling" in result:
        scaling.add_to(page, result["scaling"])
    if "host" in result:
        host.add_to(page, result["host"])
    if "rest" in result:
        rest.add_to(page, result["rest"])
    return page


def _add_engines(page: Page, found: dict[str, Any]) -> None:
    page.heading("Engines")
    page.text(
        f"{found['texts']} texts in order of arrival, {found['mean_tokens']:.1f} tokens on average; "
        f"{found['rounds']} interleaved rounds; throughput is computed from the sum of the batches' median times."
    )
    page.records(engines.COLUMNS, found["rows"])
    page.text(engines_summary(found))
    names = list(dict.fromkeys(row["system"] for row in found["rows"]))
    figure = Figure(figsize=(9, 0.6 * len(names) + 1), layout="constrained")
    axis = figure.subplots()
    for number, size in enumerate(engines.BATCHES):
        speeds = {row["system"]: row["texts_per_second"] for row in found["rows"] if row["batch"] == size}
        places = [i + 0.4 * number - 0.2 for i in range(len(names))]
        axis.bar_label(
            axis.barh(places, [speeds[name] for name in names], 0.4, color=SERIES[number], label=f"batches of {size}"),
            fmt="%.3g",
        )
    axis.axvline(found["ceiling_texts_per_second"], color=BLACK, linestyle=":", label="bare int8 matrix products")
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set_xlabel("texts/s")
    legend(axis)
    page.plot(figure, "Throughput of each engine")


def engines_summary(found: dict[str, Any]) -> str:
    return (
        f"INT8 is {found['int8_to_pytorch']:.2f} × PyTorch fp32 padded in batches of {engines.BATCHES[0]}, "
        f"{found['int8_to_bf16']:.2f} × bf16, and reaches {found['share_of_ceiling']:.0%} of the throughput of bare "
        f"int8 matrix products of the same sizes on these cores ({found['ceiling_texts_per_second']:.1f} texts/s, "
        f"{found['ceiling_gops']:.0f} Gop/s)."
    )


def _add_services(page: Page, found: dict[str, Any]) -> None:
    page.heading("Services")
    page.text(
        f"{found['rounds']} rounds of slices of at least {found['seconds']:g} s. Under each load the systems are "
        "measured one after the other, while all processes of the others are paused. Throughput is the rounds' median; "
        "latencies are of all rounds. A ratio is the median of the ratios within each round, with the interval that "
        "contains the true median with a probability of 95 %. It is undecided with fewer than six rounds or a wide "
        "interval."
    )
    page.text(
        "In open loads, calls arrive as a Poisson process and latency counts from the scheduled time. Aisle is called "
        "over gRPC (grpc.aio), the peers over HTTP/1.1 with connections kept alive (aiohttp), by the same load "
        "generator on the same cores, with one text per call. Aisle's response cache is off. The engine alone runs "
        "batches of as many texts as there are callers."
    )
    rows = comparison.display_rows(found)
    page.records(comparison.COLUMNS, rows)
    for line in comparison.summary(found):
        page.text(line)
    page.table(
        ["system", f"agreement with PyTorch fp32 on {found['checked_texts']} texts", "settings"],
        [[name, share, _listed(found["settings"].get(name, {}))] for name, share in found["agreement"].items()],
    )
    page.plot(_services_figure(found["rows"]), "Throughput by concurrent callers, and p99 latency by offered load")
    for name, tried in found["tuning"].items():
        page.heading(f"Settings of {name}")
        page.table(
            ["settings", f"texts/s, {services.TUNING_CALLERS} callers"],
            [[_listed(each["settings"]), each["texts_per_second"]] for each in tried],
        )


def _listed(settings: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in settings.items())


def _services_figure(found: list[dict[str, Any]]) -> Figure:
    systems = list(dict.fromkeys(row["system"] for row in found))
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    closed, opened = figure.subplots(1, 2)
    for color, name in zip(itertools.cycle(SERIES), systems, strict=False):
        rows = [row for row in found if row["system"] == name]
        saturated = [row for row in rows if row["kind"] == "closed"]
        callers, throughputs = ([row[key] for row in saturated] for key in ("callers", "texts_per_second"))
        closed.plot(callers, throughputs, "o-", color=color, label=name)
        offered = [row for row in rows if row["kind"] == "open" and row["p99_ms"] is not None]
        opened.plot([row["rate"] for row in offered], [row["p99_ms"] for row in offered], "o-", color=color, label=name)
    closed.set(xlabel="concurrent callers", ylabel="texts/s")
    opened.set(xlabel="offered load, texts/s", ylabel="p99, ms")
    for axis in (closed, opened):
        log_axis(axis, "x")
        log_axis(axis, "y")
    figure.legend(*closed.get_legend_handles_labels(), loc="outside lower center", ncols=len(systems), frameon=False)
    return figure
