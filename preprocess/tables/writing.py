"""The one writer of tables: CSV, TSV, JSON Lines, a JSON array, Parquet and spreadsheets, row by row."""

from __future__ import annotations

import contextlib
import csv
import glob
import itertools
import json
import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import IO, Any

from aisle.errors import InputError
from aisle.preprocess.tables import columnar, opening, sheets
from aisle.preprocess.tables.opening import STDIO, kind_of, local, open_output
from aisle.preprocess.tables.passthrough import cell, encodable, plain
from aisle.preprocess.tables.place import is_database
from aisle.preprocess.tables.table import Row, read_range, read_rows

EXAMPLES: dict[type, Any] = {str: "", float: 0.0, list[str]: [""], list[float]: [0.0]}  # a value of each edited type
BOM: ContextVar[bool] = ContextVar("bom", default=False)  # whether CSV and TSV are written with a byte order mark


def file_format(path: Path) -> str:
    """Return the format of a file to write, from its name: csv, tsv, jsonl, json, parquet or xlsx.

    Rows go to a database by way of a Parquet file.

    Raises:
        InputError: the name has another ending.
    """
    kind = "jsonl" if path == STDIO else opening.kind_of_name(str(path))
    if kind in (None, "txt", "xls") or (path.suffix.lower() == ".zip" and not is_database(path)):
        raise InputError(
            f"{path}: unknown file format to write; name it .csv, .tsv, .jsonl, .json (or these with .gz, .bz2, "
            ".zst), .parquet or .xlsx"
        )
    if BOM.get() and path != STDIO and kind not in ("csv", "tsv"):
        raise InputError(f"{path}: --bom is for .csv and .tsv")
    return str(kind)


def output_kind(source: Path, out: Path) -> str:
    """Return the format to write, as `file_format`. On standard output it is the source's format if that is text."""
    kind = file_format(out)
    if out == STDIO and kind_of(source) in ("csv", "tsv", "json"):
        return kind_of(source)
    return kind


def refuse_same(source: Path, out: Path) -> None:
    """Raise InputError if the output is the same file as the input, even under another name."""
    same = source.resolve() == out.resolve() or (source.exists() and out.exists() and source.samefile(out))
    if same and out != STDIO:
        raise InputError(f"{out} is the input; choose another output")


@contextlib.contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """Yield a temporary path. At the end, the file there replaces `out`, or is copied to standard output for ``-``.

    If `out` is a symbolic link, the file that it names is replaced.

    If two commands write the same file, the last one wins; their contents are never mixed.
    """
    stdout = out == STDIO
    out = out.resolve() if out.is_symlink() else out
    folder = Path(tempfile.gettempdir()) if stdout else out.parent
    beside = folder / f".{out.name}.{secrets.token_hex(4)}.writing{''.join(out.suffixes)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield beside
        if stdout:
            with beside.open("rb") as file:
                shutil.copyfileobj(file, sys.stdout.buffer)
            sys.stdout.buffer.flush()
        else:
            beside.replace(out)
    finally:
        beside.unlink(missing_ok=True)


def remove_unfinished(out: Path) -> None:
    """Remove what a killed command left of `out`. No other command may be writing it."""
    for left in out.parent.glob(f".{glob.escape(out.name)}.*.writing*") if out != STDIO else ():
        left.unlink(missing_ok=True)


def write_rows(path: Path, rows: Callable[[], Iterator[Row]], columns: list[str], kind: str = "") -> None:
    """Write rows with the given columns, in the format `kind` or that of the file's name. Missing values become null.

    `rows` is called once for each pass over the rows. Parquet needs two passes, the first to find the columns' types.
    """
    kind = kind or file_format(path)
    if kind == "parquet":
        columnar.write_parquet(path, rows, columns)
    elif kind == "xlsx":
        sheets.write_sheet(path, rows(), columns)
    else:
        with open_output(path, "utf-8-sig" if BOM.get() else "utf-8") as file:
            if kind in ("jsonl", "json"):
                _write_json(file, rows(), kind == "json")
            else:
                _write_csv(file, rows(), columns, "\t" if kind == "tsv" else ",")


def _write_json(file: IO[str], rows: Iterator[Row], array: bool) -> None:
    start, between, end = ("[\n", ",\n", "\n]\n") if array else ("", "\n", "\n")
    empty = True
    for row in rows:
        line = json.dumps(plain(row), ensure_ascii=False, allow_nan=False)
        if not line.isascii():
            try:
                line.encode()
            except UnicodeEncodeError:  # UTF-8 cannot encode lone surrogates; a JSON escape can
                line = json.dumps(plain(row), allow_nan=False)
        file.write((start if empty else between) + line)
        empty = False
    if array or not empty:
        file.write((start if empty else "") + end)


def _write_csv(file: IO[str], rows: Iterator[Row], columns: list[str], delimiter: str) -> None:
    writer = csv.writer(file, delimiter=delimiter)
    writer.writerow([_csv_cell(name) for name in columns])
    for row in rows:
        writer.writerow([_csv_cell(row.get(name)) for name in columns])


def _csv_cell(value: Any) -> Any:
    value = cell(value)
    if isinstance(value, str) and not value.isascii():
        try:
            value.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:
            return encodable(value)
    return value


def write_edited(
    source: Path,
    out: Path,
    edits: Callable[[], Iterator[Row | None]],
    columns: list[str],
    types: Mapping[str, type],
    names: Mapping[str, str] | None = None,
    kind: str = "",
    part: range | None = None,
) -> None:
    """Copy the rows of `source`, or its rows `part`, to `out` with edits.

    An edit holds the new values of a row, or is None to drop it.

    From Parquet to Parquet, all other columns keep their types and values.

    Args:
        edits: returns one edit for each row, in order; called once for each pass.
        columns: the columns of the source.
        types: types of the columns that `edits` sets, as in `columnar.rewrite`. New columns are added in this order.
        names: new names of the source's columns, by old name.
        part: rows of the source, from 0. A Parquet file then has the types of the whole source, as all other parts do.
    """
    kind, renamed = kind or file_format(out), names or {}
    if kind == "parquet" and kind_of(source) == "parquet":
        columnar.rewrite(source, local(source), out, edits(), renamed, types, part)
        return

    def rows() -> Iterator[Row]:
        none: Any = object()
        for row, edit in itertools.zip_longest(read_range(source, part), edits(), fillvalue=none):
            if row is none or edit is none:
                raise InputError(f"{source} changed while it was read; run the command again")
            if edit is not None:
                yield {**_renamed(row, renamed), **edit}

    kept = [renamed.get(name, name) for name in columns]
    written = [*kept, *(name for name in types if name not in kept)]
    if part is not None and kind == "parquet":
        example = {name: EXAMPLES[each] for name, each in types.items()}
        typical = partial(_typical, source, renamed, example)
        columnar.write_parquet(out, rows, written, typical)
    else:
        write_rows(out, rows, written, kind)


def _renamed(row: Row, names: Mapping[str, str]) -> Row:
    return {names.get(name, name): value for name, value in row.items()}


def _typical(source: Path, names: Mapping[str, str], example: Row) -> Iterator[Row]:
    """Yield rows with the types of all rows of the source, and of the edited columns."""
    yield example
    for row in read_rows(source):
        yield {**_renamed(row, names), **example}
