"""Tables of a DuckDB file."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aisle.errors import InputError
from aisle.extras import install
from aisle.preprocess.tables.columnar import BATCH, load_pyarrow
from aisle.preprocess.tables.fitting import as_text, fitted, newer, not_ahead, query, require_columns, storable
from aisle.preprocess.tables.place import EXTRA, Place, Since, quoted

STAGED = "aisle_new"
MEMORY = "1GB"  # more goes to temporary files


class Duck:
    """A table of a DuckDB file."""

    rows_at_once = 10_000  # that one transaction writes

    def __init__(self, place: Place) -> None:
        self._place, self._table = place, quoted(*place.table)

    @contextmanager
    def read(self, since: Since | None) -> Iterator[tuple[Any, Iterator[Any]]]:
        """Yield the schema and the batches of the rows as they are at one moment."""
        with opened(self._place, self._place.address, read_only=True) as database:
            own = self._schema(database)
            cast = {field.name: "VARCHAR" for field in own if not storable(field.type)}
            rows = database.sql(query(self._table, as_text(own, cast), since, cast, [])).to_arrow_reader(BATCH)
            yield rows.schema, iter(rows)

    def greatest(self, column: str) -> Any | None:
        """Return the greatest value of a column, of times not ahead; None if there is none, or no table yet."""
        name = quoted(column)
        if not Path(self._place.address).exists():
            return None
        with opened(self._place, self._place.address, read_only=True) as database:
            if not self._exists(database):
                return None
            own = self._schema(database)
            require_columns(self._place, [column], own.names)
            condition = not_ahead(name, own.field(column).type)
            found = database.sql(f"SELECT max({name}) FROM {self._table} WHERE {condition}")
            value = found.to_arrow_table()[0][0]
            return value if value.is_valid else None

    def write(self, file: Path, keys: list[str], since: str | None) -> None:
        """Insert or update the rows of a Parquet file in one transaction. A missing table is made.

        MERGE needs no index on the key, which DuckDB would hold in memory.
        """
        reader = fitted(file, fit)
        schema, names = reader.schema, reader.schema.names
        with opened(self._place, self._place.address) as database:
            database.begin()
            if not self._exists(database):
                database.register("empty", schema.empty_table())
                database.execute(f"CREATE TABLE {self._table} AS SELECT * FROM empty")
            require_columns(self._place, names, self._schema(database).names)
            database.register(STAGED, reader)
            database.execute(self._merge(names, keys, newer(schema, since, "old", "new")))
            database.commit()

    def _merge(self, names: list[str], keys: list[str], condition: str) -> str:
        same = " AND ".join(f"old.{quoted(key)} = new.{quoted(key)}" for key in keys)
        changes = ", ".join(f"{quoted(name)} = new.{quoted(name)}" for name in names if name not in keys)
        columns, values = (", ".join(f"{table}{quoted(name)}" for name in names) for table in ("", "new."))
        return (
            f"MERGE INTO {self._table} AS old USING {STAGED} AS new ON ({same}) "
            f"WHEN MATCHED AND {condition} THEN UPDATE SET {changes} "
            f"WHEN NOT MATCHED THEN INSERT ({columns}) VALUES ({values})"
        )

    def _schema(self, database: Any) -> Any:
        """Return the columns of the table, as Arrow has them."""
        return database.sql(f"SELECT * FROM {self._table} LIMIT 0").to_arrow_table().schema

    def _exists(self, database: Any) -> bool:
        schema, name = ("main", *self._place.table)[-2:]
        found = "SELECT 1 FROM information_schema.tables WHERE table_schema = ? AND table_name = ?"
        return bool(database.execute(found, [schema, name]).fetchall())


@contextmanager
def opened(place: object, file: str, read_only: bool = False) -> Iterator[Any]:
    """Open a DuckDB file; ``:memory:`` is none. Messages name the `place`.

    Raises:
        InputError: it is not there, another process writes it, or DuckDB refuses a statement.
    """
    duckdb = load_duckdb()
    try:
        with (
            tempfile.TemporaryDirectory(prefix="aisle-duckdb-") as spilled,
            duckdb.connect(file, read_only, {"memory_limit": MEMORY, "temp_directory": spilled}) as database,
        ):
            database.execute("SET TimeZone = 'UTC'")
            yield database
    except duckdb.Error as error:
        told = str(error).partition("\n")[0].partition(" See also ")[0]
        hint = "; close the program that writes it" if "lock" in told else ""
        raise InputError(f"{place}: {told}{hint}") from None


def fit(kind: Any) -> Any:
    """Return the type of a column that DuckDB can hold."""
    pyarrow = load_pyarrow()
    if pyarrow.types.is_decimal256(kind) or pyarrow.types.is_null(kind):
        return pyarrow.string()
    return pyarrow.float32() if pyarrow.types.is_float16(kind) else kind


def load_duckdb() -> Any:
    try:
        import duckdb
    except ImportError:
        raise InputError(f"tables of databases need an extra: {install(EXTRA)}") from None
    return duckdb
