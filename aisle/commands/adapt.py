"""Adapting: measure drift, choose texts to label, and retrain."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

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

app = Stage()
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
