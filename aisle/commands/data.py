"""Data: the sample catalogue, and cleaning."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aisle.commands import Json, LabelColumn, OutputTable, Report, Seed, Table, TextColumn, other_columns, report
from aisle.commands.command import Stage, file_to_write
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
from aisle.console import cell, new_table, say, show, stdout, track
from aisle.errors import InputError
from aisle.preprocess.labels import sets_note

if TYPE_CHECKING:
    from aisle.preprocess.fill import Filling
    from aisle.train.adapt.label_errors import Suspects

app = Stage()
FEW = 200  # rows from which a linear model learns little


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
    label_errors: Annotated[
        Path | None,
        typer.Option(
            callback=file_to_write,
            help="Also write a table of the labels that are probably wrong, for a person to correct; none is changed.",
        ),
    ] = None,
    fill: Annotated[
        list[str] | None,
        typer.Option(
            metavar="COLUMN",
            help="Fill this column where a row lacks it: from rows of the same product, or from the text. Repeatable.",
        ),
    ] = None,
    fill_by: Annotated[
        str | None,
        typer.Option(metavar="COLUMN", help="For --fill, rows with the same value in this column are one product too."),
    ] = None,
    propose_contract: Annotated[
        Path | None,
        typer.Option(callback=file_to_write, help="Also write a contract for tables like DATA, a .toml file to edit."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Clean a table: drop copies and conflicting labels, replace personal data, and write a report."""
    from aisle.preprocess.quality import clean_file
    from aisle.preprocess.quality_report import fill_note

    refuse_two_on_stdout(out, as_json)
    rules = labelling(fold_labels, label_map, min_rows)
    suspects = _suspects(data, label_errors, out, as_json) if label_errors else None
    examine = suspects.find if suspects else None
    filling = _filling(fill, fill_by)
    result = clean_file(
        data, out, text_column, label_column, near, page, lambda rows: track(rows, "cleaning"), rules, examine, filling
    )
    if propose_contract:
        from aisle.preprocess.contract import now, propose, write_contract

        write_contract(propose(data, label_column, now()), propose_contract, data.name)
        say(f"contract in {propose_contract}; next: aisle watch {data} --contract {propose_contract}")
    note_labels(result)
    if note := sets_note(result["categories"]):
        say(note)
    for column, found in result.get("fill", {}).items():
        say(fill_note(column, found))
    if suspects:
        suspects.write()
        _note_suspects(result["label_errors"])
    columns = other_columns(text_column, label_column)
    following = (f"clean table in {out}", "aisle", "train", out, *columns, "-o", "checkpoint")
    report(result, as_json, _show_cleaning, () if str(out) == "-" else following)


def _filling(columns: list[str] | None, by: str | None) -> Filling:
    """Return what --fill and --fill-by say.

    Raises:
        InputError: --fill-by is given alone.
    """
    from aisle.preprocess.fill import Filling

    if by is not None and not columns:
        raise InputError(f"--fill-by {by} needs --fill COLUMN, the column to fill")
    return Filling(columns or [], by, lambda texts: track(texts, "looking for values"))


def _suspects(data: Path, label_errors: Path, out: Path, as_json: bool) -> Suspects:
    """Return the table of --label-errors, checked before the work.

    Raises:
        InputError: it would replace another file of the command, or its format is unknown.
    """
    from aisle.train.adapt.label_errors import Suspects

    if str(label_errors) == "-" and as_json:
        raise InputError("--label-errors - and --json would both write to standard output; choose one")
    if label_errors.resolve() == out.resolve():
        raise InputError(f"--label-errors and -o would both write {out}; choose another file for one of them")
    return Suspects(data, label_errors)


def _note_suspects(found: dict[str, Any]) -> None:
    """Say on stderr what was found, because the table may be on stdout."""
    if found["rows_judged"] < FEW:
        say(f"{found['rows_judged']} rows are few to judge labels by: expect many correct labels among the suspects")
    if found["rows_alone"]:
        say(f"{found['rows_alone']} labels cannot be judged: no other row has their category")
    if not found["suspects"]:
        say(f"none of {found['rows_judged']} labels is suspected; {found['output']} has no row")
        return
    levels = ", ".join(f"{rows} at level {level}" for level, rows in found["by_level"].items() if rows)
    say(
        f"{found['suspects']} of {found['rows_judged']} labels are suspected ({levels}), in {found['output']}; if the "
        f"estimated {found['wrong']:.1%} are wrong, a model without an error measures {found['reachable']:.1%} accuracy"
    )


def _show_cleaning(result: dict[str, Any]) -> None:
    table = new_table("reason", "rows dropped", "first row numbers")
    for reason, rows in result["dropped"].items():
        table.add_row(cell(reason), cell(rows), ", ".join(map(str, result["examples"][reason])))
    if "-" in (result["output"], result.get("label_errors", {}).get("output")):  # stdout has a table
        return
    stdout.print(table)
    show(f"{result['rows_kept']} of {result['rows_in']} rows in {result['output']}; see {result['report']}")
