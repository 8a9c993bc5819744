"""Load: how fast it is, alone and beside others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from aisle.commands import Json, TextColumn, report, show_rows
from aisle.console import stdout

app = typer.Typer()


@app.command()
def bench(
    parts: Annotated[list[str] | None, typer.Argument(help="engines, services; by default all.")] = None,
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
    """Measure the engines, and the services beside their peers, in one run on this machine.

    A peer's environment is made under work/peers when it is first measured.
    """
    from aisle.loadtest.bench import PARTS, Settings
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
    report(run(parts or PARTS, settings, html), as_json, _show_bench)


def _show_bench(result: dict[str, Any]) -> None:
    from aisle.loadtest import engines, services
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
    stdout.print(f"see {result['report']}")
