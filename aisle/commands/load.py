"""Load: how fast it is, alone and beside others."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from aisle.commands import Json, TextColumn, Url, report, show_rows
from aisle.console import stdout

app = typer.Typer()


@app.command()
def bench(
    parts: Annotated[
        list[str] | None, typer.Argument(help="engines, services, growth; default: the first two.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="A table of texts; the SYNTHETIC catalogue by default.")] = None,
    text_column: TextColumn = "text",
    model: Annotated[
        Path | None, typer.Option(help="A checkpoint to measure with; by default a BERT-base of random weights.")
    ] = None,
    system: Annotated[
        list[str] | None,
        typer.Option(help="Of the services: engine, aisle, litserve, infinity, fastapi, onnxruntime; default: all."),
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="Of each load on a service, at least.")] = 5.0,
    rounds: Annotated[int, typer.Option(min=1, help="How often each figure is measured, in turn.")] = 2,
    tune: Annotated[bool, typer.Option("--tune", help="Try the peers' settings first, and keep the best.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="A tiny model and moments: does all of it run?")] = False,
    html: Annotated[Path, typer.Option("--report", help="The page to write; a .json goes beside it.")] = Path(
        "loadtest/report/bench.html"
    ),
    as_json: Json = False,
) -> None:
    """Measure the engines, the services beside their peers, and how cost grows, in one run on this machine.

    A peer's environment is made under work/peers when it is first measured.
    """
    from aisle.loadtest.bench import DEFAULT, Settings
    from aisle.loadtest.bench import bench as run
    from aisle.loadtest.services import SYSTEMS

    settings = Settings(
        data=data,
        text_column=text_column,
        model=model,
        systems=system or SYSTEMS,
        seconds=seconds,
        rounds=rounds,
        tune=tune,
        quick=quick,
    )
    report(run(parts or DEFAULT, settings, html), as_json, _show_bench)


@app.command()
def loadtest(
    data: Annotated[Path, typer.Argument(help="A table of texts to send.")],
    text_column: TextColumn = "text",
    url: Url = "localhost:8001",
    callers: Annotated[
        list[int] | None, typer.Option(min=1, help="At once, in closed loads; default: 1, 8, 64.")
    ] = None,
    share: Annotated[
        list[float] | None,
        typer.Option(min=0.01, help="Of the closed loads' throughput, in open loads; default: 0.1 to 1.1."),
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="Of each load that count.")] = 10.0,
    warm_up: Annotated[float, typer.Option(min=0, help="Of each load, before, that do not.")] = 2.0,
    zipf: Annotated[float | None, typer.Option(min=0, help="Texts come as Zipf has it, with this exponent.")] = None,
    workers: Annotated[int, typer.Option(min=0, help="Send from so many processes.")] = 0,
    web: Annotated[bool, typer.Option("--web", help="Serve Locust's own page, and start from there.")] = False,
    second: Annotated[
        bool, typer.Option("--second-opinion", help="Compare with h2load instead; the server's cache must be off.")
    ] = False,
    html: Annotated[Path, typer.Option("--report", help="The page to write; a .json goes beside it.")] = Path(
        "loadtest/report/loadtest.html"
    ),
    pid: Annotated[int | None, typer.Option(help="Of `aisle serve`: samples its memory; a .csv beside HTML.")] = None,
    as_json: Json = False,
) -> None:
    """Find what a running server bears, with Locust: throughput and latency by load, and the knee."""
    from aisle.loadtest.run import COLUMNS, Steps, second_opinion
    from aisle.loadtest.run import loadtest as run
    from aisle.loadtest.soak import Memory

    default = Steps()
    if second:
        most = max(callers or default.callers)
        result = second_opinion(data, text_column, url, most, max(1, round(seconds)))
        report(result, as_json, _show_second_opinion)
        return
    steps = Steps(tuple(callers or default.callers), tuple(share or default.shares), seconds, warm_up, zipf)

    def show(result: dict[str, Any]) -> None:
        show_rows(COLUMNS, result["rows"])
        stdout.print(f"knee: {result['knee']} texts/s; see {result['report']}")

        if "memory" in result:
            stdout.print(f"memory: {result['memory']}")

    with Memory(pid, html.with_suffix(".csv")) if pid else nullcontext() as memory:
        result = run(data, text_column, url, steps, html, workers, web)
    if memory:
        result["memory"] = memory.growth()
    report(result, as_json, show)


@app.command()
def overload(
    data: Annotated[Path, typer.Argument(help="A table of texts to send.")],
    text_column: TextColumn = "text",
    url: Url = "localhost:8001",
    times: Annotated[float, typer.Option(min=1, help="How many times its capacity the server is sent.")] = 3.0,
    seconds: Annotated[int, typer.Option(min=1, help="Of each of the five phases.")] = 15,
    as_json: Json = False,
) -> None:
    """Send a running server more than it can serve: who is refused, how fast, and what the others get."""
    from aisle.loadtest.overload import overload as run

    report(run(data, text_column, url, times, seconds), as_json, _show_overload)


def _show_second_opinion(result: dict[str, Any]) -> None:
    for tool in ("h2load", "locust"):
        stdout.print(f"{tool}: {result[f'{tool}_texts_per_second']:.1f} texts/s, {result['callers']} calls at once")
    stdout.print(f"Locust finds {result['ratio']:.2f} × what h2load finds")


def _show_bench(result: dict[str, Any]) -> None:
    from aisle.loadtest import engines, growth, services
    from aisle.loadtest.bench import engines_summary, services_summary
    from aisle.loadtest.machine import describe

    stdout.print(describe(result["machine"]))
    if "engines" in result:
        show_rows(engines.COLUMNS, result["engines"]["rows"])
        stdout.print(engines_summary(result["engines"]))
    if "services" in result:
        show_rows(services.COLUMNS, result["services"]["rows"])
        for line in services_summary(result["services"]):
            stdout.print(line)
    if "growth" in result:
        show_rows(growth.COLUMNS, result["growth"]["rows"])
        sizes = [{"model": model, **each} for model, each in result["growth"]["sizing"].items()]
        show_rows({key: key.replace("_", " ") for key in sizes[0]}, sizes)
    stdout.print(f"see {result['report']}")


def _show_overload(result: dict[str, Any]) -> None:
    phases = ("unloaded", "beside_file", "capacity", "overload", "after")
    table = Table("", *result["unloaded"], title=f"{result['offered_per_second']} texts a second offered")
    for phase in phases:
        table.add_row(phase.replace("_", " "), *(str(value) for value in result[phase].values()))
    stdout.print(table)
