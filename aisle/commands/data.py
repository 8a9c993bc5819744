"""Data: the sample catalogue, and cleaning."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from aisle.commands import Json, LabelColumn, OutputTable, Report, Seed, Table, TextColumn, other_columns, report
from aisle.commands.command import Stage
from aisle.commands.tables import (
    FoldLabels,
    LabelMap,
    MinRows,
    labelling,
    note_labels,
    reads_tables,
    refuse_two_on_stdout,
    writes_tables,
)
from aisle.console import cell, new_table, show, stdout, track

app = Stage()


@app.command()
@writes_tables
def sample(
    out: OutputTable,
    rows: Annotated[int, typer.Option(min=1, help="Number of rows.")] = 16000,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Write the sample catalogue: SYNTHETIC product titles with their categories."""
    from aisle.train.synthetic.catalogue import write_sample

    refuse_two_on_stdout(out, as_json)
    following = f"{rows} SYNTHETIC rows in {out}", "aisle", "train", out, "-o", "checkpoint"
    report(write_sample(out, rows, seed), as_json, lambda _: None, () if str(out) == "-" else following)


@app.command()
@reads_tables
@writes_tables
def clean(
    data: Table,
    out: OutputTable,
    text_column: TextColumn = "text",
    label_column: LabelColumn = "category",
    near: Annotated[
        float, typer.Option(min=0, max=1, help="Jaccard similarity of near-duplicates; 0 keeps all of them.")
    ] = 0.8,
    page: Report = None,
    fold_labels: FoldLabels = False,
    label_map: LabelMap = None,
    min_rows: MinRows = 0,
    as_json: Json = False,
) -> None:
    """Clean a table: drop copies and conflicting labels, replace personal data, and write a report."""
    from aisle.preprocess.quality import clean_file

    refuse_two_on_stdout(out, as_json)
    rules = labelling(fold_labels, label_map, min_rows)
    result = clean_file(data, out, text_column, label_column, near, page, lambda rows: track(rows, "cleaning"), rules)
    note_labels(result)
    columns = other_columns(text_column, label_column)
    following = (f"clean table in {out}", "aisle", "train", out, *columns, "-o", "checkpoint")
    report(result, as_json, _show_cleaning, () if str(out) == "-" else following)


def _show_cleaning(result: dict[str, Any]) -> None:
    table = new_table("reason", "rows dropped", "first row numbers")
    for reason, rows in result["dropped"].items():
        table.add_row(cell(reason), cell(rows), ", ".join(map(str, result["examples"][reason])))
    if result["output"] == "-":  # stdout has the table
        return
    stdout.print(table)
    show(f"{result['rows_kept']} of {result['rows_in']} rows in {result['output']}; see {result['report']}")
