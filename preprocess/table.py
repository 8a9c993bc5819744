"""Tables of texts, read row by row in constant memory: CSV, TSV, JSONL (each also gzipped) and Parquet."""

from __future__ import annotations

import codecs
import csv
import gzip
import hashlib
import itertools
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Literal

from aisle.errors import InputError

Row = dict[str, Any]

LONGEST = 16 * 1024 * 1024  # characters of a line or cell: a quote left open must not draw the whole file into memory
SAMPLE = 64 * 1024  # bytes from which the encoding is judged
SURPLUS = "surplus cells"  # where a row keeps the cells that it has beyond the columns


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
        InputError: there is no such file, its kind is unknown, it is not UTF-8, its columns are separated by something
            else than its name says, or a line cannot be parsed; the message names the line.
    """
    kind = file_format(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    if kind == "parquet":
        yield from _read_parquet(path)
        return
    try:
        _check_encoding(path)
        with open_text(path) as file:
            yield from _read_jsonl(path, file) if kind == "jsonl" else _read_csv(path, file, kind)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path}: {error}") from None


def _check_encoding(path: Path) -> None:
    """Refuse a file that begins in another encoding; a stray byte among UTF-8 is left for cleaning to judge."""
    with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
        head = file.read(SAMPLE)
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or head.count(b"\0") > len(head) // 4:
        raise InputError(f"{path}, line 1: looks like UTF-16; convert it: iconv -f UTF-16 -t UTF-8")
    lines = head.splitlines()[: -1 if len(head) == SAMPLE else None]  # the last may be cut
    foreign = [number for number, line in enumerate(lines, start=1) if not _decodes(line, "utf-8")]
    if 2 * len(foreign) > sum(not line.isascii() for line in lines):
        chinese = all(_decodes(lines[number - 1], "gb18030") for number in foreign)
        hint = "it looks like GBK; convert it: iconv -f GB18030 -t UTF-8" if chinese else "convert it: iconv -t UTF-8"
        raise InputError(f"{path}, line {foreign[0]}: not UTF-8; {hint}")


def _decodes(line: bytes, encoding: str) -> bool:
    try:
        line.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True


def _read_csv(path: Path, file: IO[str], kind: str) -> Iterator[Row]:
    csv.field_size_limit(LONGEST)
    delimiter = "\t" if kind == "tsv" else ","
    reader = csv.DictReader(file, restkey=SURPLUS, delimiter=delimiter)
    line = 1
    try:
        header = reader.fieldnames or []
        other = next((each for each in "\t;|," if len(header) == 1 and each in header[0]), None)
        if other is not None:
            message = f"columns are separated by {other!r}, but .{kind} means {delimiter!r}; rename or convert it"
            raise InputError(f"{path}, line 1: {message}")
        for row in reader:
            yield row
            line = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"{path}, row at line {line}: {error}; is a quote left open?") from None


def _read_jsonl(path: Path, file: IO[str]) -> Iterator[Row]:
    for number, line in enumerate(iter(lambda: file.readline(LONGEST), ""), start=1):
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
            # Parquet has types that JSON lacks, such as dates.
            file.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows())
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
        if number == 1:
            require(row, names, path)
        yield tuple(as_text(row.get(name)) for name in names)


def require(row: Row, names: list[str], path: Path) -> None:
    """Raise InputError if a table's first row lacks one of the columns."""
    for name in names:
        if name not in row:
            message = (
                f"no column {name!r}; it has: {', '.join(row)}; name the right one with --text-column, --label-column"
            )
            raise InputError(f"{path}: {message}")


def has_surplus(row: Row) -> bool:
    """Tell whether a row has more cells than columns: its text holds an unquoted separator, so the rest is shifted."""
    return any(row.get(SURPLUS, ()))


def as_text(value: Any) -> str | None:
    """Return a cell as text; numbers and dates are written out, absent cells stay None."""
    return None if value is None else str(value)


def read_labelled(path: Path, text_column: str, label_column: str) -> Iterator[tuple[str | None, str | None]]:
    """Yield (text, label) of each row.

    Raises:
        InputError: as `read_rows` and `column`; or a row has more cells than columns.
    """
    for text, label in column(_unshifted(path), [text_column, label_column], path):
        yield text, label


def _unshifted(path: Path) -> Iterator[Row]:
    for number, row in enumerate(read_rows(path), start=1):
        if has_surplus(row):
            raise InputError(f"{path}, row {number}: more cells than columns; quote texts that hold the separator")
        yield row


def fingerprint(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
