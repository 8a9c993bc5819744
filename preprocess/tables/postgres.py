"""Tables of PostgreSQL, by its ADBC driver: rows travel as Arrow batches over COPY."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aisle.errors import InputError
from aisle.extras import install
from aisle.preprocess.tables.columnar import load_pyarrow
from aisle.preprocess.tables.fitting import as_text, fitted, newer, not_ahead, query, require_columns, widened
from aisle.preprocess.tables.place import EXTRA, Place, Since, quoted

STAGED = "aisle_new"  # the temporary table of the rows that are written
TYPE = b"POSTGRESQL:type"  # key in a column's metadata, where the driver writes its type
SAME = re.compile(r"_?(bool|int[248]|oid|float[48]|text|varchar|bpchar|name|bytea|date|time|timestamp|timestamptz)")
CONNECT_TIMEOUT = 10  # seconds; without one, a host that drops packets takes minutes
START = (
    "SET LOCAL TIME ZONE 'UTC'",
    "SET LOCAL synchronize_seqscans = off",  # so that a table without a key is read in the order of its pages
    "SET LOCAL max_parallel_workers_per_gather = 0",
)
SNAPSHOT = "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY"
KEY = """SELECT a.attname FROM pg_index i JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = ANY (i.indkey)
    WHERE i.indisprimary AND i.indrelid = to_regclass($1) ORDER BY array_position(i.indkey::int2[], a.attnum)"""
COLUMNS = """SELECT attname, format_type(atttypid, NULL) FROM pg_attribute
    WHERE attrelid = to_regclass($1) AND attnum > 0 AND NOT attisdropped ORDER BY attnum"""
REMEDIES = {
    "42P10": "make the columns of --key unique in it: CREATE UNIQUE INDEX ON TABLE (COLUMNS)",
    "42501": "ask for the rights: SELECT to read; also INSERT and UPDATE, and TEMPORARY on the database, to write",
    "21000": "two rows of the input have the same --key as the types of this table have it",
    "42P01": "check ?table=; a name is taken as it is written, with capitals",
}


class Postgres:
    """A table of PostgreSQL."""

    rows_at_once = 10_000  # that one transaction writes

    def __init__(self, place: Place) -> None:
        self._place, self._table = place, quoted(*place.table)
        timed = "connect_timeout=" in place.address or "PGCONNECT_TIMEOUT" in os.environ
        further = "" if timed else f"{'&' if '?' in place.address else '?'}connect_timeout={CONNECT_TIMEOUT}"
        self._url = place.address + further

    @contextmanager
    def read(self, since: Since | None) -> Iterator[tuple[Any, Iterator[Any]]]:
        """Yield the schema and the batches of the rows as they are at one moment."""
        with self._transaction(SNAPSHOT, *START) as cursor:
            own = cursor.adbc_execute_schema(f"SELECT * FROM {self._table}")
            key = [row[0] for row in self._ask(cursor, KEY)]
            cast = dict.fromkeys(self._unlike_arrow(cursor, own), "text")
            schema = as_text(own, cast)
            cursor.execute(query(self._table, schema, since, cast, key))
            yield schema, self._batches(cursor.fetch_record_batch(), schema)

    def _unlike_arrow(self, cursor: Any, schema: Any) -> list[str]:
        """Return the columns whose values the driver gives another meaning, such as arrays of several dimensions."""
        kinds = {field.name: (field.metadata or {}).get(TYPE, b"").decode() for field in schema}
        unlike = [name for name, kind in kinds.items() if not SAME.fullmatch(kind)]
        arrays = [name for name, kind in kinds.items() if kind.startswith("_") and name not in unlike]
        if arrays:
            most = ", ".join(f"max(array_ndims({quoted(name)}))" for name in arrays)
            cursor.execute(f"SELECT {most} FROM {self._table}")
            unlike += [name for name, count in zip(arrays, cursor.fetchone(), strict=True) if (count or 0) > 1]
        return unlike

    def greatest(self, column: str) -> Any | None:
        """Return the greatest value of a column, of times not ahead; None if there is none, or no table yet."""
        name = quoted(column)
        with self._transaction(*START) as cursor:
            if not self._ask(cursor, COLUMNS):
                return None
            kind = cursor.adbc_execute_schema(f"SELECT {name} FROM {self._table}").field(0).type
            cursor.execute(f"SELECT max({name}) FROM {self._table} WHERE {not_ahead(name, kind)}")
            value = cursor.fetch_arrow_table()[0][0]
            return value if value.is_valid else None

    def write(self, file: Path, keys: list[str], since: str | None) -> None:
        """Insert or update the rows of a Parquet file in one transaction. A missing table is made."""
        with self._transaction(*START) as cursor:
            reader = without_nul(fitted(file, fit))
            schema, names = reader.schema, reader.schema.names
            cursor.adbc_ingest(STAGED, reader, mode="create", temporary=True)
            staged = dict(self._ask(cursor, COLUMNS, f"pg_temp.{STAGED}"))
            if not self._ask(cursor, COLUMNS):
                self._create(cursor, keys, staged, schema)
            types = dict(self._ask(cursor, COLUMNS))
            require_columns(self._place, names, list(types))
            values = [_value(name, staged[name], types[name]) for name in names]
            cursor.execute(self._upsert(names, values, keys, newer(schema, since, "old", "excluded")))

    def _create(self, cursor: Any, keys: list[str], staged: dict[str, str], schema: Any) -> None:
        """Make the table, with the types that the columns had in PostgreSQL, or those of the temporary table."""
        columns = []
        for name, kind in staged.items():
            had = (schema.field(name).metadata or {}).get(TYPE, b"").decode()
            known = had and self._ask(cursor, "SELECT to_regtype($1)::text", quoted(had))[0][0]
            columns.append(f"{quoted(name)} {known or kind}")
        key = f"PRIMARY KEY ({', '.join(map(quoted, keys))})"
        cursor.execute(f"CREATE TABLE {self._table} ({', '.join([*columns, key])})")

    def _upsert(self, names: list[str], values: list[str], keys: list[str], condition: str) -> str:
        columns, key = ", ".join(map(quoted, names)), ", ".join(map(quoted, keys))
        changes = ", ".join(f"{quoted(name)} = excluded.{quoted(name)}" for name in names if name not in keys)
        return (
            f"INSERT INTO {self._table} AS old ({columns}) "
            f"SELECT {', '.join(values)} FROM pg_temp.{STAGED} ORDER BY {key} "
            f"ON CONFLICT ({key}) DO UPDATE SET {changes} WHERE {condition}"
        )

    def _ask(self, cursor: Any, statement: str, name: str = "") -> list[tuple[Any, ...]]:
        """Return the rows of a statement about a table, by default this one."""
        cursor.execute(statement, parameters=(name or self._table,))
        return list(cursor.fetchall())

    def _batches(self, reader: Any, schema: Any) -> Iterator[Any]:
        pyarrow = load_pyarrow()
        try:
            for batch in reader:
                yield pyarrow.RecordBatch.from_arrays(batch.columns, schema=schema)
        except (OSError, pyarrow.ArrowException) as error:  # the connection broke
            raise InputError(self._message(error)) from None

    @contextmanager
    def _transaction(self, *first: str) -> Iterator[Any]:
        dbapi = _driver()
        try:
            with dbapi.connect(self._url) as connection, connection.cursor() as cursor:
                for statement in first:
                    cursor.execute(statement)
                yield cursor
                connection.commit()
        except dbapi.Error as error:
            raise InputError(self._message(error)) from None

    def _message(self, error: Exception) -> str:
        """Return an error of the server or the driver in one line, with what to do."""
        text = re.sub(r"\s*Query was:.*", "", str(error), flags=re.DOTALL)
        own = re.search(r"(?:ERROR|FATAL): +(.*)", text)
        told = own[1] if own else re.sub(r"^[A-Z_]+: (\[libpq\] )?", "", " ".join(text.split()))
        remedy = REMEDIES.get(getattr(error, "sqlstate", None) or "", "")
        if re.search("password (authentication|supplied)", told):
            remedy = "give it by PGPASSWORD, ~/.pgpass or PGSERVICE"
        return f"{self._place}: {told}{f'; {remedy}' if remedy else ''}"


def _driver() -> Any:
    try:
        import adbc_driver_postgresql.dbapi
    except ImportError:
        raise InputError(f"PostgreSQL needs an extra: {install(EXTRA)}") from None
    return adbc_driver_postgresql.dbapi


def _value(name: str, kind: str, wanted: str) -> str:
    """Return the SQL of a value in another type. An empty cell of a file is no number and no time: it is missing."""
    column = quoted(name)
    if kind == "text" and not wanted.startswith(("text", "character")):
        column = f"NULLIF({column}, '')"
    return f"CAST({column} AS {wanted})"


def fit(kind: Any) -> Any:
    """Return the type of a column that PostgreSQL can hold. Objects, and lists of lists, are JSON there."""
    pyarrow = load_pyarrow()
    types = pyarrow.types
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        within = widened(kind.value_type)
        return pyarrow.string() if types.is_nested(within) else pyarrow.list_(within)
    return pyarrow.string() if types.is_nested(kind) else widened(kind)


def without_nul(reader: Any) -> Any:
    """Return a reader whose texts have U+FFFD for each NUL, which PostgreSQL cannot hold."""
    pyarrow = load_pyarrow()
    batches = (
        pyarrow.RecordBatch.from_arrays([*map(_cleared, batch.columns)], schema=reader.schema) for batch in reader
    )
    return pyarrow.RecordBatchReader.from_batches(reader.schema, batches)


def _cleared(column: Any) -> Any:
    import pyarrow.compute as compute

    types = load_pyarrow().types
    if types.is_string(column.type) or types.is_large_string(column.type):
        return compute.replace_substring(column, "\0", "\ufffd")
    if types.is_list(column.type) and types.is_string(column.type.value_type):
        rows = column.to_pylist()
        cleared = [row and [each and each.replace("\0", "\ufffd") for each in row] for row in rows]
        return load_pyarrow().array(cleared, column.type)
    return column
