"""Columns that a database or a Parquet file has no type for: what they are read and written as."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from aisle.errors import InputError
from aisle.preprocess.tables.columnar import batches, load_pyarrow, open_parquet, text_of
from aisle.preprocess.tables.place import Since, quoted

Fit = Callable[[Any], Any]  # returns the type that a column of a type is written as


def query(table: str, schema: Any, since: Since | None, cast: Mapping[str, str], order: list[str]) -> str:
    """Return the SQL that reads a table. Infinite dates are read as missing, because Arrow has none.

    With `since`, the rows come in the order of its column.

    Args:
        table: its quoted name.
        schema: what is read.
        cast: the types that columns are cast to.
        order: columns that the rows are sorted by.

    Raises:
        InputError: the column of `since` is not there, or its values have no order that all databases share.
    """
    columns = [_read_as(field, cast.get(field.name, "")) for field in schema]
    found = f"SELECT {', '.join(columns) or 'NULL'} FROM {table}"
    if since:
        name = quoted(since.column)
        least = literal(since, schema)
        found += f" WHERE {name} >= '{least}' OR {name} IS NULL" if least is not None else ""
    keys = [*([f"{quoted(since.column)} NULLS FIRST"] if since else []), *map(quoted, order)]
    return found + (f" ORDER BY {', '.join(keys)}" if keys else "")


def literal(since: Since, schema: Any) -> str | None:
    """Return the least value in SQL, without quotes; None if all rows are to be read.

    Raises:
        InputError: as `query`.
    """
    pyarrow = load_pyarrow()
    if since.column not in schema.names:
        raise InputError(f"--since {since.column}: no such column; the table has: {', '.join(schema.names)}")
    kind = schema.field(since.column).type
    if not (is_moment(kind) or pyarrow.types.is_integer(kind)):
        raise InputError(f"--since {since.column}: it holds {kind}; name a column of times, dates or whole numbers")
    if since.least is None:
        return None
    return str(since.least.cast(kind, safe=False).cast(pyarrow.string()).as_py())


def is_moment(kind: Any) -> bool:
    """Return whether a type is that of times or dates."""
    types = load_pyarrow().types
    return bool(types.is_timestamp(kind) or types.is_date(kind))


def not_ahead(name: str, kind: Any) -> str:
    """Return the SQL condition that a time is not ahead of the clock, so that one wrong date hides no later row.

    Times without a zone may be ahead by hours.
    """
    if not is_moment(kind):
        return "TRUE"
    tomorrow = datetime.now(UTC) + timedelta(days=1)
    if load_pyarrow().types.is_date(kind):
        return f"{name} <= '{tomorrow.date()}'"
    return f"{name} <= '{tomorrow if kind.tz else tomorrow.replace(tzinfo=None)}'"


def _read_as(field: Any, cast: str) -> str:
    name = quoted(field.name)
    if cast:
        return f"CAST({name} AS {cast}) AS {name}"
    return f"CASE WHEN isfinite({name}) THEN {name} END AS {name}" if is_moment(field.type) else name


def as_text(schema: Any, names: Collection[str]) -> Any:
    """Return a schema in which some columns are texts."""
    text = load_pyarrow().string()
    return load_pyarrow().schema([each.with_type(text) if each.name in names else each for each in schema])


def storable(kind: Any) -> bool:
    """Return whether Parquet has a type: no interval, no union, and no extension, whose bytes say nothing."""
    types = load_pyarrow().types
    if isinstance(kind, load_pyarrow().BaseExtensionType):
        return False
    if types.is_nested(kind):
        return not types.is_union(kind) and all(storable(kind.field(n).type) for n in range(kind.num_fields))
    return not types.is_interval(kind)


def fitted(file: Path, fit: Fit) -> Any:
    """Return a reader of the batches of a Parquet file, each column as the type that `fit` returns for its own."""
    pyarrow = load_pyarrow()
    opened = open_parquet(file, file)
    schema = pyarrow.schema([field.with_type(fit(field.type)) for field in opened.schema_arrow])

    def converted() -> Iterator[Any]:
        for batch in batches(opened, file):
            columns = [_as(column, field.type) for column, field in zip(batch.columns, schema, strict=True)]
            yield pyarrow.RecordBatch.from_arrays(columns, schema=schema)

    return pyarrow.RecordBatchReader.from_batches(schema, converted())


def _as(column: Any, kind: Any) -> Any:
    """Return a column as another type; as text, lists and objects are JSON."""
    pyarrow = load_pyarrow()
    if column.type == kind:
        return column
    if pyarrow.types.is_string(kind) and pyarrow.types.is_nested(column.type):
        return pyarrow.array([text_of(value) for value in column.to_pylist()], kind)
    return column.cast(kind, safe=False)


def widened(kind: Any) -> Any:
    """Return a type with a sign, and without a dictionary; databases have no others."""
    pyarrow = load_pyarrow()
    larger = {pyarrow.uint8(): pyarrow.int16(), pyarrow.uint16(): pyarrow.int32(), pyarrow.uint32(): pyarrow.int64()}
    larger |= {pyarrow.uint64(): pyarrow.decimal128(20), pyarrow.float16(): pyarrow.float32()}
    larger |= {pyarrow.null(): pyarrow.string(), pyarrow.date64(): pyarrow.date32()}
    return widened(kind.value_type) if pyarrow.types.is_dictionary(kind) else larger.get(kind, kind)


def newer(schema: Any, since: str | None, old: str, new: str, quote: Callable[[str], str] = quoted) -> str:
    """Return the SQL condition that a row is not older than the one it replaces; without `since` it is true.

    A row whose time is ahead of the clock is replaced too: that time was wrong.
    """
    if since is None:
        return "TRUE"
    was, now = f"{old}.{quote(since)}", f"{new}.{quote(since)}"
    right = not_ahead(was, schema.field(since).type)
    return f"({was} IS NULL OR {now} IS NULL OR {was} <= {now} OR NOT ({right}))"


def require_columns(place: object, needed: list[str], has: list[str]) -> None:
    """Check that a table can hold all columns.

    Raises:
        InputError: it lacks one.
    """
    lacking = [name for name in needed if name not in has]
    if lacking:
        raise InputError(f"{place} has no column {', '.join(map(repr, lacking))}; add it, or choose a new table")
