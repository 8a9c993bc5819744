"""Data: the sample catalogue, and cleaning."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from aisle.commands import Json, LabelColumn, TextColumn, report
from aisle.console import say, stdout, track

app = typer.Typer()


@app.command()
def sample(
    out: Annotated[Path, typer.Option("-o", "--output", help="The table to write.")],
    rows: Annotated[int, typer.Option(min=1)] = 16000,
    seed: int = 0,
    as_json: Json = False,
) -> None:
    """Write the sample catalogue: SYNTHETIC product titles with their categories."""
    from aisle.train.catalogue import write_sample

    report(write_sample(out, rows, seed), as_json, lambda r: say(f"{r['rows']} synthetic rows in {out}"))


@app.command()
def clean(
    data: Annotated[Path, typer.Argument(help="Labelled texts: CSV, TSV, JSONL (or .gz) or Parquet.")],
    out: Annotated[Path, typer.Option("-o", "--output", help="The table to write.")],
    text_column: TextColumn = "text",
    label_column: LabelColumn = "category",
    near: Annotated[
        float, typer.Option(min=0, max=1, help="Jaccard similarity of near-duplicates; 0 keeps them all.")
    ] = 0.8,
    page: Annotated[
        Path | None, typer.Option("--report", help="The HTML report; by default beside the table, with a .json.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Clean a table of any size: copies, conflicting labels, personal data; with a report."""
    from aisle.preprocess.quality import clean_file

    result = clean_file(data, out, text_column, label_column, near, page, lambda rows: track(rows, "cleaning"))
    report(result, as_json, _show_cleaning)


def _show_cleaning(result: dict[str, Any]) -> None:
    table = Table("dropped", "rows", "first of them")
    for reason, rows in result["dropped"].items():
        table.add_row(reason, str(rows), ", ".join(map(str, result["examples"][reason])))
    stdout.print(table)
    stdout.print(f"{result['rows_kept']} of {result['rows_in']} rows in {result['output']}; see {result['report']}")
