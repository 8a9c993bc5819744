"""Adapting: whether live traffic has moved away from the training data, what to label, and learning from that."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from aisle.commands import Json, LabelColumn, TextColumn, report, show_rows
from aisle.console import say, stdout

app = typer.Typer()
Checkpoint = Annotated[Path, typer.Argument(help="A folder that `aisle train` made.")]


@app.command()
def drift(
    checkpoint: Checkpoint,
    log: Annotated[Path, typer.Argument(help="What `aisle classify --log` or `-o` wrote, or the client's TrafficLog.")],
    days: Annotated[float | None, typer.Option(min=0, help="Only the last days of the log.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="The training table, where the checkpoint has no sample of it.")
    ] = None,
    text_column: TextColumn = "text",
    label_column: LabelColumn = "category",
    page: Annotated[Path | None, typer.Option("--report", help="The HTML page to write.")] = None,
    as_json: Json = False,
) -> None:
    """Compare live traffic with the training data, and say whether to retrain."""
    from aisle.train.drift import drift as run

    result = run(checkpoint, log, text_column=text_column, label_column=label_column, data=data, days=days, report=page)
    report(result, as_json, _show_drift)


@app.command()
def review(
    source: Annotated[Path, typer.Argument(help="A log that keeps texts, a classified table, or, with --url, any.")],
    out: Annotated[Path, typer.Option("-o", "--output", help="The table to fill in.")],
    rows: Annotated[int, typer.Option(min=1, help="Texts to label.")] = 200,
    url: Annotated[str, typer.Option(help="HOST:PORT of a running server to ask.")] = "",
    text_column: TextColumn = "text",
    as_json: Json = False,
) -> None:
    """List the texts that the model is least sure of, for labelling."""
    from aisle.train.review import review as run

    result = run(source, out, rows=rows, url=url, text_column=text_column)
    report(result, as_json, lambda r: say(f"{r['rows']} texts in {out}; fill in the column correct_category"))


@app.command()
def retrain(
    checkpoint: Checkpoint,
    data: Annotated[Path, typer.Option(help="The table that the checkpoint was trained on.")],
    corrections: Annotated[list[Path], typer.Option(help="What `aisle review` wrote, filled in; may be given again.")],
    out: Annotated[Path, typer.Option("-o", "--output", help="The new checkpoint folder.")],
    text_column: Annotated[str, typer.Option(help="By default as the checkpoint was trained.")] = "",
    label_column: Annotated[str, typer.Option(help="By default as the checkpoint was trained.")] = "",
    epochs: Annotated[int | None, typer.Option(min=1, help="By default as the checkpoint was trained.")] = None,
    new_categories: Annotated[
        bool, typer.Option("--new-categories", help="Take categories that the checkpoint lacks.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train a checkpoint further on its data and on corrections, and compare the two."""
    from aisle.train.retrain import retrain as run

    result = run(
        checkpoint,
        data,
        corrections,
        out,
        text_column=text_column,
        label_column=label_column,
        epochs=epochs,
        new_categories=new_categories,
    )
    report(result, as_json, _show_retraining)


def _show_drift(result: dict[str, Any]) -> None:
    from aisle.train.drift import RULES

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
            stdout.print(Text(f"{kind}: {each['reason']}{since}"), soft_wrap=True)
    verdict = "retrain" if result["retrain"] else "no need to retrain"
    stdout.print(f"{verdict}: {result['rows']} answers, {result['from']} to {result['to']}")


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
        f"{corrections['blank']} left blank; the new checkpoint is {result['checkpoint']}"
    )
