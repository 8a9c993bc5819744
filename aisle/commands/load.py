"""Speed and load: benchmarks and load tests."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from aisle.commands import Json, Page, TextColumn, Texts, Url, check_columns, report, show_rows
from aisle.commands.command import Stage, among, choices, file_to_read, folder_to_write, refuse
from aisle.commands.tables import reads_tables
from aisle.console import cell, new_table, show, stdout
from aisle.errors import InputError

app = Stage()


def parts_of_bench() -> Sequence[str]:
    from aisle.loadtest.bench.parts import PARTS

    return (*PARTS, "gpu")


def systems_of_bench() -> Sequence[str]:
    from aisle.loadtest.bench.services import SYSTEMS

    return SYSTEMS


def program(path: Path) -> Path:
    """Make sure before the work that a program can be run.

    Raises:
        InputError: it cannot.
    """
    if shutil.which(path) is None:
        raise InputError(f"{path}: no such program, or it may not be run")
    return path


@app.command()
@reads_tables
def bench(
    ctx: typer.Context,
    parts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PART",
            callback=among(parts_of_bench),
            autocompletion=parts_of_bench,
            help="engines, services, scaling, host and rest; or gpu alone.",
            show_default="engines services",
        ),
    ] = None,
    texts: Annotated[
        Path | None,
        typer.Option(callback=file_to_read, help="A table of texts.", show_default="the SYNTHETIC catalogue"),
    ] = None,
    text_column: TextColumn = "text",
    checkpoint: Annotated[
        Path | None, typer.Option(help="A checkpoint to measure.", show_default="a BERT-base with random weights")
    ] = None,
    systems: Annotated[
        list[str] | None,
        choices(
            systems_of_bench,
            "For services: engine, aisle, litserve, infinity, fastapi or onnxruntime; repeatable.",
            "all",
        ),
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="Least seconds of each load on a service.")] = 3.0,
    rounds: Annotated[int, typer.Option(min=1, help="Measurements of each figure; systems take turns.")] = 7,
    tune: Annotated[bool, typer.Option(help="Find the best settings of the other servers first.")] = False,
    quick: Annotated[bool, typer.Option(help="Only check that everything runs, with a tiny model.")] = False,
    dry_run: Annotated[bool, typer.Option(help="gpu: only check that everything runs; a CPU is enough.")] = False,
    gpu_parts: Annotated[str, typer.Option("--parts", help="gpu: its parts, with commas.", show_default="all")] = "",
    minutes: Annotated[float, typer.Option(min=0.1, help="gpu: time limit of all parts together, in minutes.")] = 8.0,
    server_python: Annotated[
        Path,
        typer.Option(
            callback=program, help="gpu: the Python that has Triton and the client.", show_default="this Python"
        ),
    ] = Path(sys.executable),
    work: Annotated[Path, typer.Option(callback=folder_to_write, help="gpu: the folder for engines and logs.")] = Path(
        "work/bench-gpu"
    ),
    html: Page = Path("loadtest/report/bench.html"),
    as_json: Json = False,
) -> None:
    """Measure the engines, the service beside other servers, and how cost grows with texts, categories and model.

    The environment of another server is made under work/peers when it is first measured. `bench gpu` measures on a GPU:
    peaks, engines in every precision, versions with their gates, the service through Triton, and other servers. Each of
    its parts runs in its own process with a time limit; gates count only for a checkpoint given with --checkpoint.
    """
    if checkpoint is not None:
        from aisle.train.core.checkpoint import Checkpoint

        # A bad checkpoint is refused before the measurement, too.
        Checkpoint(checkpoint).check_one_category("aisle bench")
    if texts is not None:
        check_columns([texts], text_column)
    if parts and "gpu" in parts:
        if len(parts) > 1:
            raise InputError("bench gpu runs alone; run the other parts in a second command")
        refuse(ctx, "systems", "seconds", "rounds", "tune", "quick", because="does not apply to bench gpu")
        from aisle.loadtest.bench.gpu import bench as gpu

        wanted = gpu.GpuBenchSettings(
            work=str(work),
            data=str(texts or ""),
            text_column=text_column,
            checkpoint=str(checkpoint or ""),
            server_python=str(server_python),
            dry_run=dry_run,
        )
        split = [each.strip() for each in gpu_parts.split(",") if each.strip()]
        if gpu_parts and not split:
            raise InputError(f"--parts {gpu_parts}: name a part, or several with commas")
        report(gpu.bench_gpu(wanted, split, minutes, html), as_json, lambda r: show_rows(gpu.SHOWN, r["rows"]))
        return
    from aisle.loadtest.bench.bench import BenchSettings
    from aisle.loadtest.bench.bench import bench as run
    from aisle.loadtest.bench.parts import DEFAULT
    from aisle.loadtest.bench.services import SYSTEMS

    chosen = parts or DEFAULT
    _refuse_unused(ctx, chosen, texts, quick)
    settings = BenchSettings(
        data=texts,
        text_column=text_column,
        model=checkpoint,
        systems=systems or SYSTEMS,
        seconds=seconds,
        rounds=rounds,
        tune=tune,
        quick=quick,
    )
    report(run(chosen, settings, html), as_json, _show_bench)


def _refuse_unused(ctx: typer.Context, parts: Sequence[str], texts: Path | None, quick: bool) -> None:
    """Refuse options of `bench` that the chosen parts would ignore."""
    refuse(ctx, "dry_run", "gpu_parts", "minutes", "server_python", "work", because="needs the part gpu")
    if texts is None:
        refuse(ctx, "text_column", because="needs --texts FILE")
    if "services" not in parts:
        refuse(ctx, "systems", "tune", because="needs the part services")
    if not {"engines", "services", "host", "rest"} & {*parts}:
        refuse(ctx, "checkpoint", "rounds", because="needs one of the parts engines, services, host and rest")
    if not {"services", "scaling", "host", "rest"} & {*parts}:
        refuse(ctx, "seconds", because="needs one of the parts services, scaling, host and rest")
    if quick:
        refuse(ctx, "seconds", "rounds", because="has no effect with --quick, which measures nothing")


NOT_WITH_H2LOAD = ("shares", "warm_up", "workers", "zipf", "web", "html", "pid")


@app.command()
@reads_tables
def loadtest(
    ctx: typer.Context,
    data: Texts,
    text_column: TextColumn = "text",
    url: Url = "localhost:8001",
    callers: Annotated[
        list[int] | None,
        typer.Option(
            min=1, max=10_000, help="Concurrent callers of a closed load; repeatable.", show_default="1, 8, 64"
        ),
    ] = None,
    shares: Annotated[
        list[float] | None,
        typer.Option(
            min=0.01,
            max=100,
            help="Rate of an open load, as a share of the closed loads' throughput; repeatable.",
            show_default="0.1 to 1.1",
        ),
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="Measured seconds of each load.")] = 10.0,
    warm_up: Annotated[float, typer.Option(min=0, help="Seconds of each load before the measurement.")] = 2.0,
    zipf: Annotated[
        float | None,
        typer.Option(
            min=0, max=10, help="Exponent of a Zipf distribution of the texts.", show_default="all equally often"
        ),
    ] = None,
    workers: Annotated[
        int, typer.Option(min=0, max=256, help="Locust's worker processes; 0: one process sends all.")
    ] = 0,
    web: Annotated[bool, typer.Option(help="Serve Locust's web page, and start loads there.")] = False,
    second: Annotated[
        bool,
        typer.Option(
            "--second-opinion/--no-second-opinion", help="Compare with h2load instead; the server's cache must be off."
        ),
    ] = False,
    html: Page = Path("loadtest/report/loadtest.html"),
    pid: Annotated[
        int | None,
        typer.Option(min=1, help="Process id of `aisle serve`: log its memory to a .csv beside the page."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure the throughput and latency of a running server by load, with Locust, and find its knee."""
    from aisle.loadtest.locust.run import COLUMNS, Steps, second_opinion
    from aisle.loadtest.locust.run import loadtest as run
    from aisle.loadtest.memory import Memory

    default = Steps()
    if second:
        refuse(ctx, *NOT_WITH_H2LOAD, because="cannot be used with --second-opinion, which has only one load")
        if len(callers or ()) > 1:
            raise InputError("--second-opinion compares at one load; give --callers once")
        most = max(callers or default.callers)
        result = second_opinion(data, text_column, url, most, max(1, round(seconds)))
        report(result, as_json, _show_second_opinion)
        return
    steps = Steps(tuple(callers or default.callers), tuple(shares or default.shares), seconds, warm_up, zipf)

    with Memory(pid, html.with_suffix(".csv")) if pid else nullcontext() as memory:
        result = run(data, text_column, url, steps, html, workers, web)
    if memory:
        result["memory"] = memory.growth()
    report(result, as_json, lambda r: _show_loadtest(r, COLUMNS))


@app.command()
@reads_tables
def overload(
    data: Texts,
    text_column: TextColumn = "text",
    url: Url = "localhost:8001",
    times: Annotated[float, typer.Option(min=1, max=100, help="Load, as a multiple of the server's capacity.")] = 3.0,
    seconds: Annotated[int, typer.Option(min=1, help="Seconds of each of the five phases.")] = 15,
    as_json: Json = False,
) -> None:
    """Send a running server more than it can serve, and measure refusals and latency."""
    from aisle.loadtest.overload import overload as run

    report(run(data, text_column, url, times, seconds), as_json, _show_overload)


def _show_loadtest(result: dict[str, Any], columns: dict[str, str]) -> None:
    show_rows(columns, result["rows"])
    show(f"knee: {result['knee']} texts/s; see {result['report']}")
    if "memory" in result:
        show(f"memory: {result['memory']}")


def _show_second_opinion(result: dict[str, Any]) -> None:
    for tool in ("h2load", "locust"):
        show(f"{tool}: {result[f'{tool}_texts_per_second']:.1f} texts/s, {result['callers']} concurrent calls")
    show(f"Locust measures {result['ratio']:.2f} times the throughput that h2load measures")


def _show_bench(result: dict[str, Any]) -> None:
    from aisle.loadtest.bench import comparison, engines, host, rest, scaling
    from aisle.loadtest.bench.bench import engines_summary
    from aisle.loadtest.bench.machine import describe

    show(describe(result["machine"]))
    if "engines" in result:
        show_rows(engines.COLUMNS, result["engines"]["rows"])
        show(engines_summary(result["engines"]))
    if "services" in result:
        show_rows(comparison.COLUMNS, comparison.display_rows(result["services"]))
        for line in comparison.summary(result["services"]):
            show(line)
    if "scaling" in result:
        show_rows(scaling.COLUMNS, result["scaling"]["rows"])
        sizes = [{"model": model, **each} for model, each in result["scaling"]["sizing"].items()]
        show_rows({key: key.replace("_", " ") for key in sizes[0]}, sizes)
    if "host" in result:
        show_rows(host.COLUMNS, host.display_rows(result["host"]))
    if "rest" in result:
        show_rows(rest.COLUMNS, rest.display_rows(result["rest"]))
        for line in rest.summary(result["rest"]):
            show(line)
    show(f"see {result['report']}")


def _show_overload(result: dict[str, Any]) -> None:
    phases = ("unloaded", "beside_file", "capacity", "overload", "after")
    table = new_table("", *phases, title=f"offered: {result['offered_per_second']} texts/s")
    for figure in result["unloaded"]:  # phases are columns, so that the table fits 80 columns
        table.add_row(figure.replace("_", " "), *(cell(result[phase][figure]) for phase in phases))
    stdout.print(table)
