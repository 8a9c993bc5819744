"""Parquet: read and write rows, and rewrite a file column by column without changing types."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from aisle.errors import InputError
from aisle.extras import install
from aisle.preprocess.tables.passthrough import encodable, plain

Row = dict[str, Any]
BATCH = 4096  # rows


def load_pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(f"Parquet files need an extra: {install('parquet')}") from None
    return pyarrow


def open_parquet(path: Path, where: Path) -> Any:
    """Open the Parquet file at `where`; messages call it `path`.

    Raises:
        InputError: it is not a Parquet file or is incomplete, or two of its columns have the same name.
    """
    pyarrow = load_pyarrow()
    try:
        file = pyarrow.parquet.ParquetFile(where)
        names = file.schema_arrow.names
    except Exception as error:  # pyarrow raises many kinds
        raise InputError(f"{path}: not a Parquet file: {error}") from None
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice is not None:
        raise InputError(f"{path}: two columns are called {twice!r}; rename one of them")
    return file


def batches(file: Any, path: Path, columns: list[str] | None = None, part: range | None = None) -> Iterator[Any]:
    """Yield the record batches of an open file, or only those of the rows `part`, from 0.

    Raises:
        InputError: it is damaged.
    """
    try:
        if part is None:
            yield from file.iter_batches(BATCH, columns=columns)
        else:
            yield from _batches_of(file, columns, part)
    except (OSError, ValueError) as error:  # base classes of pyarrow's errors
        raise InputError(f"{path}: damaged: {error}") from None


def _batches_of(file: Any, columns: list[str] | None, part: range) -> Iterator[Any]:
    """Yield the batches of some rows. Row groups without any of them are not read."""
    ends = list(itertools.accumulate(file.metadata.row_group(n).num_rows for n in range(file.metadata.num_row_groups)))
    groups = [
        n for n, end in enumerate(ends) if end > part.start and end - file.metadata.row_group(n).num_rows < part.stop
    ]
    if not part or not groups:
        return
    at = ends[groups[0]] - file.metadata.row_group(groups[0]).num_rows
    for batch in file.iter_batches(BATCH, row_groups=groups, columns=columns):
        start, stop = max(part.start - at, 0), min(part.stop - at, len(batch))
        if start < stop:
            yield batch.slice(start, stop - start)
        at += len(batch)


def size_of(path: Path, where: Path) -> tuple[list[str], int]:
    """Return the columns and the number of rows of a Parquet file, without reading its rows.

    Raises:
        InputError: as `open_parquet`.
    """
    file = open_parquet(path, where)
    return list(file.schema_arrow.names), file.metadata.num_rows


def rows_of(path: Path, where: Path, only: list[str] | None = None, part: range | None = None) -> Iterator[Row]:
    """Yield the rows of a Parquet file, or of its rows `part`; with `only`, these columns only.

    Times that Python cannot represent become text.
    """
    file = open_parquet(path, where)
    names = file.schema_arrow.names
    if only is not None and {*only} <= {*names}:  # otherwise read all, so that the error can list the columns
        names = [name for name in names if name in only]
    for batch in batches(file, path, names, part):
        columns = [_values(column) for column in batch.columns]
        for values in zip(*columns, strict=True) if columns else [()] * len(batch):
            yield dict(zip(names, values, strict=True))


def _values(column: Any) -> list[Any]:
    """Return a column's values in Python; values outside Python's range or precision become text."""
    try:
        values: list[Any] = column.to_pylist()
    except (ValueError, OverflowError):
        return [_scalar(each) for each in column]
    return values


def _scalar(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return scalar.as_buffer().to_pybytes().decode("utf-8", "surrogateescape")
    except (ValueError, OverflowError):
        text: str = scalar.cast(load_pyarrow().string()).as_py()
        return text if "out of range" not in text else str(scalar.value)


def write_parquet(
    path: Path,
    rows: Callable[[], Iterator[Row]],
    columns: list[str],
    typical: Callable[[], Iterator[Row]] | None = None,
) -> None:
    """Write rows. A first pass over them finds the columns' types. A column of several types is written as text.

    Args:
        typical: the rows that the types are taken from, so that several files of one table have the same types.
    """
    pyarrow = load_pyarrow()
    types = dict.fromkeys(columns, pyarrow.null())
    mixed: set[str] = set()
    for batch in _chunks((typical or rows)()):
        for name in types.keys() - mixed:
            try:
                array = pyarrow.array([_storable(row.get(name)) for row in batch])
                schemas = [pyarrow.schema([("", each)]) for each in (types[name], array.type)]
                types[name] = pyarrow.unify_schemas(schemas, promote_options="permissive").field(0).type
            except (pyarrow.ArrowException, OverflowError):
                mixed.add(name)
                types[name] = pyarrow.string()
    schema = pyarrow.schema([(encodable(name), kind) for name, kind in types.items()])
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        for batch in _chunks(rows()):
            arrays = [
                pyarrow.array([text_of(row.get(n)) if n in mixed else _storable(row.get(n)) for row in batch], types[n])
                for n in columns
            ]
            writer.write_batch(pyarrow.record_batch(arrays, schema=schema))


def _chunks(rows: Iterator[Row]) -> Iterator[list[Row]]:
    while chunk := list(itertools.islice(rows, BATCH)):
        yield chunk


def _storable(value: Any) -> Any:
    """Return a value that Parquet can store: strings must be UTF-8, so invalid bytes become U+FFFD."""
    if isinstance(value, str):
        return encodable(value)
    if isinstance(value, list):
        return [_storable(each) for each in value]
    if isinstance(value, dict):
        return {encodable(str(key)): _storable(each) for key, each in value.items()} or None
    return value


def text_of(value: Any) -> str | None:
    """Return a value as text: a list or an object as JSON, None as None."""
    if value is None or isinstance(value, str):
        return None if value is None else encodable(value)
    return encodable(json.dumps(plain(value), ensure_ascii=False))


def rewrite(
    path: Path,
    where: Path,
    out: Path,
    edits: Iterator[Row | None],
    names: Mapping[str, str],
    types: Mapping[str, type],
    part: range | None = None,
) -> None:
    """Copy a Parquet file, or its rows `part`, to `out` with edits.

    An edit holds the new values of a row, or is None to drop it.

    All other columns keep their types and values; they are not converted to Python.

    Args:
        edits: one for each of the rows, in order.
        names: new names of columns, by old name.
        types: types of the columns that `edits` sets: str, float, or lists of them. New columns are added in this
            order. A column of type `object` keeps its type, and its values where an edit has none.
    """
    pyarrow = load_pyarrow()
    file = open_parquet(path, where)
    known = {str: pyarrow.string(), float: pyarrow.float64()}
    known |= {list[str]: pyarrow.list_(known[str]), list[float]: pyarrow.list_(known[float])}
    kinds = {name: known[kind] for name, kind in types.items() if kind is not object}
    schema = _edited_schema(file.schema_arrow, kinds, names)
    with pyarrow.parquet.ParquetWriter(out, schema) as writer:
        for batch in batches(file, path, part=part):
            changes = list(itertools.islice(edits, len(batch)))
            if len(changes) != len(batch):
                raise InputError(f"{path} changed while it was read; run the command again")
            rows = [change for change in changes if change is not None]
            kept = _kept(batch, changes)
            arrays = {names.get(n, n): column for n, column in zip(kept.schema.names, kept.columns, strict=True)}
            arrays |= {n: pyarrow.array([_storable(row.get(n)) for row in rows], kind) for n, kind in kinds.items()}
            partly = [name for name in types if name not in kinds and any(name in row for row in rows)]
            arrays |= {name: _replaced(arrays[name], rows, name) for name in partly}
            writer.write_table(pyarrow.table([arrays[name] for name in schema.names], schema=schema))


def _replaced(column: Any, rows: list[Row], name: str) -> Any:
    """Return a column with the values of the rows that have one."""
    values = [_storable(row.get(name, old)) for row, old in zip(rows, column.to_pylist(), strict=True)]
    return load_pyarrow().array(values, column.type)


def _kept(batch: Any, changes: list[Row | None]) -> Any:
    """Return a table of a batch's rows that are not dropped. It is made of slices: `filter` lacks some types."""
    ends = itertools.accumulate(len(list(run)) for _, run in itertools.groupby(changes, lambda each: each is None))
    slices, start = [], 0
    for end in ends:
        if changes[start] is not None:
            slices.append(batch.slice(start, end - start))
        start = end
    return load_pyarrow().Table.from_batches(slices, schema=batch.schema)


def _edited_schema(schema: Any, kinds: Mapping[str, Any], names: Mapping[str, str]) -> Any:
    """Return a schema with new names, and with the edited columns in their types; new columns come last."""
    pyarrow = load_pyarrow()
    renamed = [field.with_name(names.get(field.name, field.name)) for field in schema]
    kept = [pyarrow.field(field.name, kinds[field.name]) if field.name in kinds else field for field in renamed]
    added = [pyarrow.field(name, kind) for name, kind in kinds.items() if name not in {each.name for each in kept}]
    return pyarrow.schema([*kept, *added], metadata=_metadata(schema.metadata, names))


def _metadata(metadata: dict[bytes, bytes] | None, names: Mapping[str, str]) -> dict[bytes, bytes] | None:
    """Return a file's metadata. That of pandas names columns, so it is dropped if a column is renamed."""
    return {key: value for key, value in (metadata or {}).items() if not names or key != b"pandas"} or None
