"""Tables of texts, read row by row: CSV, TSV, JSONL (each also gzipped) and Parquet."""

from __future__ import annotations

import csv
import gzip
import hashlib
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Literal

from aisle.errors import InputError

Row = dict[str, Any]


def file_format(path: Path) -> str:
    """Return csv, tsv, jsonl or parquet, by the file's name.

    Raises:
        InputError: the name ends in none of them.
    """
    suffixes = [s.lower() for s in path.suffixes if s.lower() != ".gz"]
    found = {".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}.get(
        suffixes[-1] if suffixes else ""
    )
    if found is None:
        raise InputError(f"{path}: unknown kind of file; name it .csv, .tsv, .jsonl (or these with .gz) or .parquet")
    return found


def open_text(path: Path, mode: Literal["rt", "wt"] = "rt") -> IO[str]:
    """Open a plain or gzipped UTF-8 file; bytes that are not UTF-8 come through as lone surrogates."""
    encoding = "utf-8-sig" if mode == "rt" else "utf-8"
    if path.suffix.lower() == ".gz":
        return gzip.open(path, mode, encoding=encoding, errors="surrogateescape", newline="")
    return path.open(mode, encoding=encoding, errors="surrogateescape", newline="")


def read_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a table.

    Raises:
        InputError: there is no such file, its kind is unknown, or a line cannot be parsed.
    """
    kind = file_format(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    if kind == "parquet":
        yield from _read_parquet(path)
        return
    try:
        with open_text(path) as file:
            if kind == "jsonl":
                yield from _read_jsonl(path, file)
            else:
                csv.field_size_limit(sys.maxsize)
                yield from csv.DictReader(file, restkey="extra", delimiter="\t" if kind == "tsv" else ",")
    except (csv.Error, gzip.BadGzipFile, EOFError) as error:
        raise InputError(f"{path}: {error}") from None


def _read_jsonl(path: Path, file: IO[str]) -> Iterator[Row]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}, line {number}: not JSON: {error}") from None
        if not isinstance(row, dict):
            raise InputError(f"{path}, line {number}: not a JSON object")
        yield row


def _read_parquet(path: Path) -> Iterator[Row]:
    parquet = _pyarrow_parquet()
    try:
        file = parquet.ParquetFile(path)
    except Exception as error:  # pyarrow raises many kinds
        raise InputError(f"{path}: not a Parquet file: {error}") from None
    for batch in file.iter_batches(4096):
        yield from batch.to_pylist()


def _pyarrow_parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise InputError("Parquet files need an extra: pip install 'aisle[parquet]'") from None
    return pyarrow.parquet


def write_rows(path: Path, rows: Callable[[], Iterator[Row]], columns: list[str]) -> None:
    """Write rows with the given columns as the kind that the file's name says; absent values are empty or null.

    `rows` is called once for each pass over the rows: Parquet takes a first one to learn the columns' types.
    """
    kind = file_format(path)
    if kind == "parquet":
        _write_parquet(path, rows, columns)
        return
    with open_text(path, "wt") as file:
        if kind == "jsonl":
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows())
        else:
            writer = csv.DictWriter(file, columns, restval="", delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows(rows())


def _write_parquet(path: Path, rows: Callable[[], Iterator[Row]], columns: list[str]) -> None:
    parquet = _pyarrow_parquet()
    import pyarrow

    def batches() -> Iterator[Any]:
        stream = rows()
        while batch := list(itertools.islice(stream, 4096)):
            yield pyarrow.Table.from_pylist([{name: _storable(row.get(name)) for name in columns} for row in batch])

    schema = pyarrow.schema([(name, pyarrow.null()) for name in columns])
    for batch in batches():
        schema = pyarrow.unify_schemas([schema, batch.schema], promote_options="permissive")
    with parquet.ParquetWriter(path, schema) as writer:
        for batch in batches():
            writer.write_table(batch.cast(schema))


def _storable(value: Any) -> Any:
    """Return a value that Parquet can hold: its strings are UTF-8, so stray bytes become U+FFFD."""
    return value.encode("utf-8", "surrogateescape").decode("utf-8", "replace") if isinstance(value, str) else value


def column(rows: Iterator[Row], names: list[str], path: Path) -> Iterator[tuple[str | None, ...]]:
    """Yield the named columns of each row, as strings or None.

    Raises:
        InputError: a column is missing; the message lists those there are.
    """
    for number, row in enumerate(rows, start=1):
        for name in names:
            if name not in row and number == 1:
                there = ", ".join(str(key) for key in row)
                raise InputError(f"{path}: no column {name!r}; it has: {there}")
        yield tuple(as_text(row.get(name)) for name in names)


def as_text(value: Any) -> str | None:
    """Return a cell as text; numbers and dates are written out, absent cells stay None."""
    return None if value is None else str(value)


def read_labelled(path: Path, text_column: str, label_column: str) -> Iterator[tuple[str | None, str | None]]:
    """Yield (text, label) of each row; the errors are those of `read_rows` and `column`."""
    for text, label in column(read_rows(path), [text_column, label_column], path):
        yield text, label


def fingerprint(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
