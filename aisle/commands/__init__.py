"""The commands, by stage. This file has their common options and output."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from aisle.commands.command import choices, file_to_read, file_to_write, folder_to_write, page_to_write
from aisle.console import cell, new_table, print_json, say_next, show, stdout
from aisle.errors import InputError


def precisions() -> list[str]:
    """Return the precisions of all targets."""
    from aisle.build.engine import PRECISIONS

    return list(dict.fromkeys(name for names in PRECISIONS.values() for name in names))


def targets() -> list[str]:
    """Return the names of all targets."""
    from aisle.build.engine import PRECISIONS

    return list(PRECISIONS)


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
TextColumn = Annotated[str, typer.Option(help="The column that holds the text; give several to read them together.")]
LabelColumn = Annotated[str, typer.Option(help="The column that holds the category.")]


def _repository(path: Path) -> Path:
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file; --repository names a folder")
    return path


Repository = Annotated[Path, typer.Option(callback=_repository, help="The model repository.")]
Overwrite = Annotated[bool, typer.Option(help="Replace an existing checkpoint at -o.")]
Url = Annotated[str, typer.Option(envvar="AISLE_URL", help="HOST:PORT of the server's gRPC endpoint.")]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the random numbers.")]


def data_argument(description: str, default: str | bool = False) -> Any:
    """Return the argument DATA: a table, or several. `default` is what the help shows as the default."""
    return typer.Argument(metavar="DATA", callback=file_to_read, help=description, show_default=default)


Table = Annotated[Path, data_argument("Labelled texts: CSV, TSV, JSONL or Parquet.")]
Texts = Annotated[Path, data_argument("A table of texts.")]
Sample = Annotated[Path | None, data_argument("The training table; needed only if the checkpoint has no sample of it.")]
Checkpoint = Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A folder that `aisle train` made.")]
TextTables = Annotated[list[Path], data_argument("Tables of texts; labels are not needed.")]
SaveEvery = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Steps between two saves. A killed run resumes from the last one.",
        show_default="saving takes under 2 % of the time",
    ),
]
LogDir = Annotated[Path | None, typer.Option(callback=folder_to_write, help="Log to TensorBoard here.")]
TextWindows = Annotated[
    int,
    typer.Option(
        min=1,
        max=64,
        help="Read a longer text in up to this number of parts of --max-tokens; for models that Aisle did not train.",
        show_default="as in training",
    ),
]
Precision = Annotated[str | None, choices(precisions, "int8, fp8, fp16, bf16 or fp32.", "fp16 on a GPU, int8 on a CPU")]
Output = Annotated[
    Path, typer.Option("-o", "--output", callback=folder_to_write, help="The checkpoint folder to write.")
]
OutputTable = Annotated[
    Path, typer.Option("-o", "--output", callback=file_to_write, help="The table to write: .jsonl, .csv, .parquet.")
]
_REPORT = typer.Option("--report", callback=page_to_write, help="The HTML page to write, with its figures in a .json.")
Report = Annotated[Path | None, _REPORT]
Page = Annotated[Path, _REPORT]  # of a command that always writes one


def report(
    result: dict[str, Any], as_json: bool, show_it: Callable[[dict[str, Any]], None], following: Sequence[object] = ()
) -> None:
    """Print a result on stdout and the next step on stderr. Under torchrun, only the first process prints.

    Args:
        show_it: prints the result if it is not printed as JSON.
        following: what is done, and the words of the next command.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    if as_json:
        print_json(result)
    else:
        show_it(result)
    if following:
        say_next(str(following[0]), *following[1:])


def check_columns(tables: Iterable[Path], *columns: str) -> None:
    """Check before the work that every table has the columns.

    Raises:
        InputError: a table lacks a column, has no row, or cannot be read.
    """
    from aisle.preprocess.tables.table import column, read_rows

    for table in tables:
        if next(column(read_rows(table), list(columns), table), None) is None:
            raise InputError(f"{table} has no row; leave it out, or give another")


def show_rows(columns: dict[str, str], rows: list[dict[str, Any]], title: str | None = None) -> None:
    """Print rows as a table. `columns` maps keys to headings."""
    table = new_table(*columns.values(), title=title)
    for row in rows:
        table.add_row(*(cell(row.get(key)) for key in columns))
    stdout.print(table)


def show_metrics(result: dict[str, Any]) -> None:
    table = new_table("category", "precision", "recall", "F1", "rows")
    for name, row in result["per_class"].items():
        table.add_row(cell(name), *(f"{row[key]:.3f}" for key in ("precision", "recall", "f1")), cell(row["support"]))
    stdout.print(table)
    if "accuracy" in result:
        show(f"accuracy {result['accuracy']:.4f}, macro-F1 {result['macro_f1']:.4f}, {result['seconds']} s")
        return
    names = {
        "micro_f1": "micro-F1",
        "macro_f1": "macro-F1",
        "mean_average_precision": "mean average precision",
        "exact_match": "all categories right",
    }
    show(", ".join(f"{title} {result[name]:.4f}" for name, title in names.items()) + f", {result['seconds']} s")


def show_attributes(attributes: Mapping[str, Any]) -> None:
    """Show the scores of further heads."""
    for name, found in attributes.items():
        scores = f"accuracy {found['accuracy']:.4f}, macro-F1 {found['macro_f1']:.4f}, " if found else ""
        show(f"{name}: {scores}{found['rows'] if found else 'no'} texts with a value")


def other_columns(text_column: str, label_column: str = "category") -> list[str]:
    """Return the column options that the next command needs; none if the columns have the default names."""
    named = {"--text-column": (text_column, "text"), "--label-column": (label_column, "category")}
    return [part for option, (name, usual) in named.items() if name != usual for part in (option, name)]


def checkpoint_in(out: Path) -> tuple[object, ...]:
    """Return the next step after a training."""
    return f"checkpoint in {out}", "aisle", "build", out
