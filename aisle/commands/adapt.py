"""Adapting: measure drift, choose texts to label, retrain, and forecast the demand of categories."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aisle.commands import (
    Checkpoint,
    Json,
    LabelColumn,
    Output,
    OutputTable,
    Overwrite,
    Report,
    Sample,
    Table,
    TextColumn,
    data_argument,
    other_columns,
    report,
    show_rows,
)
from aisle.commands.command import Stage, choices, file_to_read, refuse, resumable
from aisle.commands.tables import reads_tables, refuse_two_on_stdout, writes_tables
from aisle.console import say, show
from aisle.errors import InputError
from aisle.train.demand import ACCURACY

if TYPE_CHECKING:
    from zoneinfo import ZoneInfo

app = Stage()
LONG_GAP = 7  # days without a row that are worth a message
MINUTE = 1 / 1440  # of a day


def _tools() -> list[str]:
    from aisle.train.adapt.labelling_tools import TOOLS

    return list(TOOLS)


@app.command()
@reads_tables
def drift(
    ctx: typer.Context,
    checkpoint: Checkpoint,
    log: Annotated[
        Path,
        typer.Argument(
            metavar="LOG", callback=file_to_read, help="A file of `aisle classify --log` or `-o`, or a client's log."
        ),
    ],
    data: Sample = None,
    days: Annotated[
        float | None, typer.Option(min=MINUTE, help="Use only so many last days of the log; also a part of a day.")
    ] = None,
    text_column: TextColumn = "text",
    label_column: LabelColumn = "category",
    page: Report = None,
    as_json: Json = False,
) -> None:
    """Compare live traffic with the training data, and say whether to retrain."""
    if data is None:
        refuse(ctx, "label_column", because="needs DATA")
    from aisle.train.adapt.drift import drift as run

    result = run(checkpoint, log, text_column=text_column, label_column=label_column, data=data, days=days, report=page)
    following: tuple[object, ...] = ()
    if result["retrain"]:
        columns = other_columns(text_column) if data is None else []  # with DATA, they are those of DATA
        following = "retrain", "aisle", "review", log, *columns, "-o", "to_label.csv"
    report(result, as_json, _show_drift, following)


@app.command()
@reads_tables
@writes_tables
def review(
    data: Annotated[Path, data_argument("A log with texts, a classified table, or, with --url, any table of texts.")],
    out: OutputTable,
    rows: Annotated[int, typer.Option(min=1, help="Number of texts to label.")] = 200,
    url: Annotated[str, typer.Option(help="HOST:PORT of a running server that classifies the texts.")] = "",
    text_column: TextColumn = "text",
    tool: Annotated[
        str | None, choices(_tools, "Write JSON for this labelling tool: label-studio or argilla.", "a table")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the texts that the model is least sure of, for labelling."""
    from aisle.train.adapt.review import review as run

    refuse_two_on_stdout(out, as_json)
    result = run(data, out, rows=rows, url=url, text_column=text_column, tool=tool)
    filled = f"label them in {tool}, and export them" if tool else "fill in the column correct_category"
    following = (
        f"{result['rows']} texts in {out}: {filled}",
        *("aisle", "retrain", "CHECKPOINT", "DATA", "--corrections", "EXPORT.json" if tool else out, "-o", "NEW"),
    )
    report(result, as_json, lambda _: None, following)


@app.command()
@reads_tables
def retrain(
    checkpoint: Checkpoint,
    data: Table,
    corrections: Annotated[
        list[Path],
        typer.Option(
            callback=file_to_read,
            help="A table of `aisle review`, filled in, or the export of a labelling tool; repeatable.",
        ),
    ],
    out: Output,
    text_column: Annotated[
        str, typer.Option(help="The column that holds the text.", show_default="as in training")
    ] = "",
    label_column: Annotated[
        str, typer.Option(help="The column that holds the category.", show_default="as in training")
    ] = "",
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Passes over the training texts.", show_default="as in training")
    ] = None,
    new_categories: Annotated[bool, typer.Option(help="Accept categories that the checkpoint lacks.")] = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Train a checkpoint further with corrections, and compare it with the old one."""
    from aisle.train.adapt.retrain import retrain as run

    with resumable():
        result = run(
            checkpoint,
            data,
            corrections,
            out,
            text_column=text_column,
            label_column=label_column,
            epochs=epochs,
            new_categories=new_categories,
            overwrite=overwrite,
        )
    for note in result["notes"]:
        say(note)
    following = () if result["worse"] else ("aisle", "deploy", out)
    report(result, as_json, _show_retraining, (f"checkpoint in {out}", *following))


@app.command()
@reads_tables
@writes_tables
def demand(
    data: Annotated[
        Path, data_argument("A table with a date and a category, as `aisle classify -o` writes it, or a traffic log.")
    ],
    out: OutputTable,
    date_column: Annotated[str, typer.Option(help="The column that holds the date or the time.")] = "time",
    label_column: LabelColumn = "category",
    count_column: Annotated[
        str, typer.Option(help="The column that holds how many a row counts for.", show_default="each row is one")
    ] = "",
    horizon: Annotated[int, typer.Option(min=1, max=366, help="Days to forecast.")] = 28,
    recent: Annotated[
        int, typer.Option(min=3, max=90, help="Compare so many last days with a forecast made before them.")
    ] = 7,
    until: Annotated[
        str, typer.Option(metavar="DATE", help="Leave out later days, such as a last day that is not over.")
    ] = "",
    time_zone: Annotated[
        str,
        typer.Option(help="Count days in this zone, such as Asia/Shanghai.", show_default="the zone of the input"),
    ] = "",
    page: Report = None,
    as_json: Json = False,
) -> None:
    """Forecast the daily counts of categories, and list those that broke out of their forecast."""
    from aisle.train.demand.counts import Columns
    from aisle.train.demand.demand import demand as run

    refuse_two_on_stdout(out, as_json)
    columns = Columns(date_column, label_column, count_column, _zone(time_zone), _day(until))
    result = run(data, out, columns=columns, horizon=horizon, recent=recent, report=page)
    _note_demand(result)
    report(result, as_json, _show_demand)


def _zone(name: str) -> ZoneInfo | None:
    """Return the time zone of --time-zone.

    Raises:
        InputError: there is none of this name.
    """
    from zoneinfo import ZoneInfo

    try:
        return ZoneInfo(name) if name else None
    except (ValueError, OSError, KeyError):
        raise InputError(f"--time-zone {name}: there is no such zone; write one as Asia/Shanghai") from None


def _day(text: str) -> datetime.date | None:
    """Return the day of --until.

    Raises:
        InputError: it is not a date.
    """
    try:
        return datetime.date.fromisoformat(text) if text else None
    except ValueError:
        raise InputError(f"--until {text}: write the date as 2026-11-24") from None


def _show_drift(result: dict[str, Any]) -> None:
    from aisle.train.adapt.drift_statistics import RULES

    rows = [
        {"title": RULES[name].title, "watch": RULES[name].watch, "retrain": RULES[name].retrain, **measure}
        for name, measure in result["measures"].items()
    ]
    columns = {
        "title": "measure",
        "value": "value",
        "watch": "watch above",
        "retrain": "retrain above",
        "p_value": "p",
        "reference": "held-out texts",
        "live": "traffic",
    }
    show_rows(columns, rows)
    for kind, found in (("retrain", result["reasons"]), ("watch", result["watch"])):
        for each in found:
            since = f" (since {each['since']})" if each["since"] else ""
            show(f"{kind}: {each['reason']}{since}")
    verdict = "retrain" if result["retrain"] else "no need to retrain"
    show(f"{verdict}: {result['rows']} answers, {result['from']} to {result['to']}")


def _show_retraining(result: dict[str, Any]) -> None:
    held_out = result["held_out"]
    rows: list[dict[str, Any]] = [
        {"what": f"{title}, {held_out['rows']} held-out texts", **{age: held_out[age][name] for age in ("old", "new")}}
        for name, title in (("accuracy", "accuracy"), ("macro_f1", "macro-F1"))
    ]
    for name, own in result.get("held_out_attributes", {}).items():
        rows.append({"what": f"accuracy of {name}, {own['rows']} held-out texts", "old": own["old"], "new": own["new"]})
    for name, title in (("corrections_learnt", "corrections learnt"), ("corrections_unseen", "corrections held out")):
        each = result[name]
        if each["rows"]:
            shares = {age: each[f"{age}_right"] / each["rows"] for age in ("old", "new")}
            rows.append({"what": f"accuracy, {each['rows']} {title}", **shares})
    show_rows({"what": "", "old": "old", "new": "new"}, rows)
    corrections = result["corrections"]
    say(
        f"{corrections['in_table']} texts of the table corrected, {corrections['added']} added, "
        f"{corrections['blank']} left blank"
        + (f", {corrections['disputed']} disputed" if corrections["disputed"] else "")
    )


def _note_demand(result: dict[str, Any]) -> None:
    """Say on stderr what a planner must know of the figures."""
    skipped = ", ".join(f"{rows} ({reason})" for reason, rows in result["skipped"].items())
    if skipped:
        say(f"rows left out: {skipped}")
    if result["in_future"]:
        say(f"the last day, {result['to']}, is in the future; correct the date, or leave later days out with --until")
    if (gap := result["longest_gap"]) and gap["days"] >= LONG_GAP:
        say(f"no row is of the {gap['days']} days from {gap['from']}: they count as days without demand")
    if result["without_time_zone"]:
        say("no time has a time zone, so --time-zone changes nothing")
    if result["last_row"]:
        say(f"{result['to']} may not be over: its last row is of {result['last_row']}; leave it out with --until")
    if simple := result["not_validated"]:
        first = f"{simple[0]['category']}: {simple[0]['reason']}"
        say(f"{len(simple)} of {result['series']} series have a simple forecast that is not validated, such as {first}")
    if not result["accuracy"]:
        say("the input is too short to measure the forecasts")
    if not result["break_outs_tested"]:
        say("the input is too short to look for break-outs")


def _show_demand(result: dict[str, Any]) -> None:
    if result["output"] == "-":  # stdout has the forecasts
        return
    if result["accuracy"]:
        show_rows(ACCURACY, result["accuracy"], f"the last {result['horizon']} days, forecast without them")
    for each in result["break_outs"]:
        during = f", during {each['festival']}" if each["festival"] else ""
        show(
            f"{each['side']} its forecast: {each['category']}, {each['days_outside']} of {result['recent']} days since "
            f"{each['since']}; {each['actual']:.0f} counted, {each['forecast']:.0f} forecast{during}"
        )
    if result["break_outs_tested"] and not result["break_outs"]:
        show(f"no category broke out of its forecast in the last {result['recent']} days")
    show(
        f"{result['series']} series, {result['from']} to {result['to']}; {result['horizon']} days in {result['output']}"
    )
