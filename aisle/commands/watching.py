"""Watching: check on a schedule that data, traffic and accuracy are as they should be."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from aisle.commands import Json, LabelColumn, TextColumn, Url, report
from aisle.commands.command import Stage, refuse
from aisle.commands.tables import reads_tables
from aisle.console import show
from aisle.errors import InputError

app = Stage()
FAILED = 3  # exit code if a check fails, as when a gate refuses an engine


@app.command()
@reads_tables
def watch(
    ctx: typer.Context,
    data: Annotated[Path | None, typer.Argument(metavar="DATA", help="The table whose contract is checked.")] = None,
    contract: Annotated[
        Path | None,
        typer.Option(help="Check DATA against this contract of `aisle clean --propose-contract`."),
    ] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Check LOG for drift from this checkpoint's texts.")] = None,
    log: Annotated[Path | None, typer.Option(help="A file of `aisle classify --log` or `-o`.")] = None,
    labels: Annotated[Path | None, typer.Option(help="Measure the server on this table of fresh labels.")] = None,
    least: Annotated[
        float | None, typer.Option("--accuracy-at-least", min=0, max=1, help="Accuracy wanted on the fresh labels.")
    ] = None,
    url: Url = "localhost:8001",
    webhook: Annotated[
        str | None,
        typer.Option(envvar="AISLE_WEBHOOK", help="POST the result here as JSON if a check fails.", show_envvar=True),
    ] = None,
    text_column: TextColumn = "text",
    label_column: LabelColumn = "category",
    as_json: Json = False,
) -> None:
    """Check the contract of a table, drift, and accuracy on fresh labels. Exit code 3 if one of them fails."""
    from aisle.pipelines.watch import check_accuracy, check_contract, check_drift, check_webhook, notify, run_checks

    if webhook:
        check_webhook(webhook)
    _check_pairs(ctx, data=data, contract=contract)
    _check_pairs(ctx, checkpoint=checkpoint, log=log)
    _check_pairs(ctx, labels=labels, least=least)
    checks: dict[str, Callable[[], dict[str, Any]]] = {}
    if data and contract:
        checks["contract"] = partial(check_contract, data, contract)
    if checkpoint and log:
        checks["drift"] = partial(check_drift, checkpoint, log, text_column)
    if labels and least is not None:
        checks["accuracy"] = partial(check_accuracy, labels, text_column, label_column, url, least)
    else:
        refuse(ctx, "url", "label_column", because="needs --labels")
    if not checks:
        raise InputError("nothing to check; give DATA --contract, --checkpoint --log, or --labels --accuracy-at-least")
    result = run_checks(checks)
    report(result, as_json, _show)
    if not result["ok"]:
        if webhook:
            notify(webhook, result)
        raise typer.Exit(FAILED)


def _check_pairs(ctx: typer.Context, **values: Any) -> None:
    """Check that options that belong together are both given, or neither.

    Raises:
        InputError: one is missing.
    """
    absent = [name for name, value in values.items() if value is None]
    if len(absent) != 1:
        return
    written = {param.name: param.opts[0] if param.opts[0].startswith("-") else "DATA" for param in ctx.command.params}
    given = next(name for name in values if name not in absent)
    raise InputError(f"{written[given]} needs {written[absent[0]]} too")


def _show(result: dict[str, Any]) -> None:
    for each in result["checks"]:
        show(f"{each['check']}: {'ok' if each['ok'] else 'failed'}")
        for reason in each["reasons"]:
            show(f"  {reason}")
