"""The commands, by stage; what they share is here."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from aisle.console import print_json, stdout

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
TextColumn = Annotated[str, typer.Option(help="The column that holds the text.")]
LabelColumn = Annotated[str, typer.Option(help="The column that holds the category.")]
Repository = Annotated[Path, typer.Option(help="The model repository.")]
Url = Annotated[str, typer.Option(help="HOST:PORT of the server's gRPC endpoint.")]


def report(result: dict[str, Any], as_json: bool, show: Callable[[dict[str, Any]], None]) -> None:
    """Print a result; of the processes that torchrun starts, the first does."""
    if os.environ.get("RANK", "0") != "0":
        return
    if as_json:
        print_json(result)
    else:
        show(result)


def show_rows(columns: dict[str, str], rows: list[dict[str, Any]]) -> None:
    """Print rows as a table; `columns` names the keys and their headings."""
    table = Table(*columns.values())
    for row in rows:
        cells = (row.get(key) for key in columns)
        table.add_row(*("–" if c is None else f"{c:.4g}" if isinstance(c, float) else Text(str(c)) for c in cells))
    stdout.print(table)


def show_metrics(result: dict[str, Any]) -> None:
    table = Table("category", "precision", "recall", "F1", "rows")
    for name, row in result["per_class"].items():
        figures = (f"{row[key]:.3f}" for key in ("precision", "recall", "f1"))
        table.add_row(Text(name), *figures, str(row["support"]))
    stdout.print(table)
    stdout.print(f"accuracy {result['accuracy']:.4f}, macro-F1 {result['macro_f1']:.4f}, {result['seconds']} s")
