"""The one reader of tables, row by row in constant memory.

CSV, TSV, JSON Lines, a JSON array, one text a line (each also compressed), Parquet and spreadsheets.
`aisle.preprocess.values` defines how a value becomes text; `writing` writes tables.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from aisle.errors import InputError
from aisle.preprocess import values
from aisle.preprocess.fields import columns_of, join
from aisle.preprocess.tables import columnar, sheets
from aisle.preprocess.tables.delimited import LONGEST, Records, TooLong
from aisle.preprocess.tables.jsonrows import Repeated, array_rows, line_rows
from aisle.preprocess.tables.opening import STDIO, kind_of, local, open_lines, reading
from aisle.preprocess.tables.place import is_database
from aisle.preprocess.values import TextError

Row = dict[str, Any]

SURPLUS = "surplus cells"  # the key of a row's cells beyond the last column
SHIFTED = "more cells than columns; quote texts that contain the delimiter"


class FaultyRow(Row):
    """A row that was read but cannot be used. `reason` is a short name of the fault; `fault` says what to change."""

    def __init__(self, row: Row, reason: str, fault: str) -> None:
        super().__init__(row)
        self.reason = reason
        self.fault = fault


def read_rows(path: Path, only: list[str] | None = None) -> Iterator[Row]:
    """Yield the rows of a table; a row that cannot be used is a `FaultyRow`.

    Args:
        only: the columns that are needed; others may be left out.

    Raises:
        InputError: there is no such file, its format is unknown, it is in another encoding, two of its columns have
            the same name, it has another delimiter than its name says, or a line cannot be parsed (the message names
            the line).
    """
    kind = kind_of(path)
    where = local(path)
    if kind == "parquet":
        yield from columnar.rows_of(path, where, only)
    elif kind in ("xlsx", "xls"):
        yield from _flat(path, sheets.sheet_rows(path, where), None)
    else:
        with open_lines(path) as file:
            yield from {"jsonl": _read_jsonl, "json": _read_json, "txt": _read_txt}.get(kind, _read_csv)(path, file)


def read_range(path: Path, part: range | None) -> Iterator[Row]:
    """Yield the rows `part` of a table, from 0; None means all.

    Of a Parquet file, only the row groups that hold them are read.

    Raises:
        InputError: as `read_rows`.
    """
    if part is None:
        return read_rows(path)
    if kind_of(path) == "parquet":
        return columnar.rows_of(path, local(path), part=part)
    return itertools.islice(read_rows(path), part.start, part.stop)


def _read_txt(path: Path, file: IO[str]) -> Iterator[Row]:
    """Yield a row for each line, including blank lines, so that line n of the file is row n."""
    for number, line in enumerate(iter(lambda: file.readline(LONGEST + 1), ""), start=1):
        if len(line) > LONGEST:
            raise InputError(f"{path}, line {number}: a line has more than {LONGEST} characters")
        yield {"text": line.rstrip("\r\n")}


def _read_jsonl(path: Path, file: IO[str]) -> Iterator[Row]:
    yield from map(_object, line_rows(path, file))


def _read_json(path: Path, file: IO[str]) -> Iterator[Row]:
    yield from map(_object, array_rows(path, file))


def _object(row: Row | Repeated) -> Row:
    if not isinstance(row, Repeated):
        return row
    return FaultyRow(row.row, "repeated key", f"the key {row.key!r} occurs twice; keep one of them")


def header_of(path: Path) -> list[str]:
    """Return the names in the first line of a .csv or .tsv, whose rows do not tell them if there are none.

    Raises:
        InputError: it cannot be read, or a name is there twice.
    """
    with open_lines(path) as file:
        first = next(iter(_records(path, file)), None)
        return _names(first, path) if first and reading().header else []


def _records(path: Path, file: IO[str]) -> Records:
    given = reading().delimiter
    records = Records(file, given or ("\t" if kind_of(path) == "tsv" else ","))
    first = file.readline(LONGEST + 1)
    named = re.fullmatch(r'"?sep=(.)"?[\r\n]*', first)  # a first line that names the delimiter for Excel
    if named and not given:
        records.split_at(named[1])
    elif first and not named:
        with _located(path, records):
            records.put_back(first)
    return records


def _read_csv(path: Path, file: IO[str]) -> Iterator[Row]:
    records = _records(path, file)
    with _located(path, records):
        yield from _flat(path, records, records)


@contextmanager
def _located(path: Path, records: Records) -> Iterator[None]:
    """Say where a row is too long."""
    try:
        yield
    except TooLong as error:
        raise InputError(f"{path}, row at line {records.line + 1}: {error}; is a quote left open?") from None


def _flat(path: Path, cells: Iterable[list[Any]], records: Records | None) -> Iterator[Row]:
    """Yield rows from lists of cells. `records` is the CSV reader that they come from, if any."""
    stream = iter(cells)
    first = next(stream, None)
    if first is None:
        return
    if reading().header:
        columns = _names(first, path)
        if records is not None:
            _check_delimiter(path, records.delimiter, first)
    else:
        columns = [unnamed(place) for place in range(1, len(first) + 1)]
        stream = itertools.chain([first], stream)
    if records is not None:
        records.columns = len(columns)
        if len(columns) == 1:  # there is no delimiter, so whole lines are the texts
            records.split_at("")
    for each in stream:
        if records is None and all(value is None for value in each):  # a blank row of a sheet
            continue
        row = dict(zip(columns, each, strict=False))
        if len(each) < len(columns):
            row.update(dict.fromkeys(columns[len(each) :]))
        surplus = each[len(columns) :]
        yield FaultyRow({**row, SURPLUS: surplus}, "too many cells", SHIFTED) if any(surplus) else row


def unnamed(place: int) -> str:
    """Return the name of a column in a table without a header; `place` counts from 1."""
    return {1: "text", 2: "category"}.get(place, f"column_{place}")


def _names(header: list[Any], path: Path) -> list[str]:
    """Return the column names of a header, without spaces around them."""
    names = [str("" if each is None else each).strip(" \t\r\n\u3000\u00a0\ufeff\u200b") for each in header]
    names = [name or f"column_{place}" for place, name in enumerate(names, start=1)]
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice is not None:
        raise InputError(f"{path}: two columns are called {twice!r}; rename one of them")
    return names


def _check_delimiter(path: Path, delimiter: str, header: list[str]) -> None:
    other = next((each for each in "\t;|," if len(header) == 1 and each in header[0]), None)
    if other is None:
        return
    means = "--delimiter says" if reading().delimiter else f".{kind_of(path)} means"
    raise InputError(
        f"{path}, line 1: columns are separated by {other!r}, but {means} {delimiter!r}; give --delimiter {other!r}, "
        "or rename or convert it"
    )


def value_of(row: Row, name: str) -> Any:
    """Return the text of a column, or of several as in "title+brand"; otherwise as `as_text`."""
    parts = columns_of(name)
    if len(parts) == 1:
        return as_text(row.get(name))
    fields = {part: as_text(row.get(part)) for part in parts}
    try:
        return join(fields)
    except TextError:
        return next(value for value in fields.values() if not isinstance(value, str | None))  # `prepare` refuses it


def to_send(row: Row, name: str) -> Any:
    """Return what a client sends for a column, or for several: their fields, so that the server checks their names.

    Raises:
        TextError: a field is not a text.
    """
    parts = columns_of(name)
    if len(parts) == 1:
        values.as_text(row.get(name))
        return as_text(row.get(name))
    fields = {part: row.get(part) for part in parts}
    return fields if join(fields) else None


NAMING = "--text-column or --label-column"  # the options that name columns


def checked(rows: Iterable[Row], names: list[str], path: Path, options: str = NAMING) -> Iterator[Row]:
    """Yield the rows of a table, and check that it has the columns `names`, which `options` gave.

    Raises:
        InputError: a column is missing; the message lists the columns of the table. In JSON, where each row has its
            own keys, a column is missing if no row has it. This is known only at the end.
    """
    lacking = [part for name in names for part in columns_of(name)]
    seen: dict[str, None] = {}
    sparse = kind_of(path) in ("json", "jsonl")
    for row in rows:
        if lacking:
            lacking = [name for name in lacking if name not in row]
            seen.update(dict.fromkeys(row))
            if lacking and not sparse:
                break
        yield row
    if lacking and seen:
        raise missing_column(path, lacking[0], list(seen), options)


def refuse_faulty(rows: Iterable[Row], path: Path) -> Iterator[Row]:
    """Yield the rows of a table, none of which may be faulty.

    Raises:
        InputError: a row cannot be used; the message names it.
    """
    for number, row in enumerate(rows, start=1):
        if isinstance(row, FaultyRow):
            raise InputError(f"{path}, row {number}: {row.fault}")
        yield row


def missing_column(path: Path, name: str, columns: list[str], options: str = NAMING) -> InputError:
    """Return the error for a missing column."""
    has = ", ".join(columns)
    return InputError(f"{path}: no column {name!r}; it has: {has}; give the right one with {options}")


def column(rows: Iterable[Row], names: list[str], path: Path, options: str = NAMING) -> Iterator[tuple[Any, ...]]:
    """Yield the named columns of each row: a string, None, or a value that is not a text, which `prepare` refuses.

    Raises:
        InputError: a column is missing, or a row cannot be used at all.
    """
    for row in refuse_faulty(checked(rows, names, path, options), path):
        yield tuple(value_of(row, name) for name in names)


def as_text(value: Any) -> Any:
    """Return a cell as text, None if it is missing, or the value itself if it is not a text; `prepare` refuses that.

    Bytes that are not UTF-8 become surrogate escapes, as in a text file.
    """
    try:
        text = values.as_text(value)
    except TextError:
        return value
    return text.decode("utf-8", "surrogateescape") if isinstance(text, bytes) else text


def read_labelled(path: Path, text_column: str, label_column: str) -> Iterator[tuple[Any, Any]]:
    """Yield the text and the label of each row, as `column` does.

    Raises:
        InputError: as `read_rows` and `column`; or a row has more cells than columns.
    """
    names = [text_column, label_column]
    only = [*columns_of(text_column), label_column]
    for text, label in column(read_rows(path, only), names, path):
        yield text, label


def fingerprint(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex; of a table of a database, that of the file it was read into."""
    with (local(path) if path == STDIO or is_database(path) else path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
