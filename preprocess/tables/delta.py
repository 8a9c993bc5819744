"""Tables of Delta Lake."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aisle.errors import InputError
from aisle.extras import install
from aisle.preprocess.tables.columnar import BATCH, load_pyarrow, open_parquet
from aisle.preprocess.tables.duck import opened
from aisle.preprocess.tables.fitting import fitted, literal, newer, not_ahead, query, require_columns, widened
from aisle.preprocess.tables.place import EXTRA, Place, Since, quoted

FEW = {"batch_size": BATCH, "batch_readahead": 1, "fragment_readahead": 1}  # so that little is held in memory
GROUP = 100_000  # rows of a row group, which is read at once


class Delta:
    """A table of Delta Lake: a folder, or an address of an object store that `deltalake` knows."""

    rows_at_once = GROUP  # that one version writes: each reads the table's keys again

    def __init__(self, place: Place) -> None:
        self._place = place

    @contextmanager
    def read(self, since: Since | None) -> Iterator[tuple[Any, Iterator[Any]]]:
        """Yield the schema and the batches of the rows of the newest version."""
        with self._told() as library:
            rows = library.DeltaTable(self._place.address).to_pyarrow_dataset()
            if since is None:
                yield rows.schema, rows.to_batches(**FEW)
                return
            new = rows.scanner(filter=_new(since, rows.schema), **FEW)
            with opened(self._place, ":memory:") as database:  # sorts more rows than memory holds
                database.register("rows", new.to_reader())
                order = query("rows", rows.schema, Since(since.column, None), {}, [])
                ordered = database.sql(order).to_arrow_reader(BATCH)
                yield ordered.schema, iter(ordered)

    def greatest(self, column: str) -> Any | None:
        """Return the greatest value of a column, of times not ahead; None if there is none, or no table yet."""
        with self._told() as library:
            if not library.DeltaTable.is_deltatable(self._place.address):
                return None
            rows = library.DeltaTable(self._place.address).to_pyarrow_dataset()
        require_columns(self._place, [column], rows.schema.names)
        name, kind = quoted(column), rows.schema.field(column).type
        with opened(self._place, ":memory:") as database:
            database.register("rows", rows.scanner(columns=[column], **FEW).to_reader())
            found = database.sql(f"SELECT max({name}) FROM rows WHERE {not_ahead(name, kind)}").to_arrow_table()[0][0]
            return found if found.is_valid else None

    def write(self, file: Path, keys: list[str], since: str | None) -> None:
        """Insert or update the rows of a Parquet file in one version. A missing table is made.

        A merge holds its new rows in memory. So many rows are joined with the old ones outside, and replace them.
        """
        reader = fitted(file, fit)
        names = reader.schema.names
        if any("`" in name for name in names):
            raise InputError(f"{self._place}: rename the columns with a backtick; deltalake cannot merge them")
        with self._told() as library:
            if not library.DeltaTable.is_deltatable(self._place.address):
                library.DeltaTable.create(self._place.address, library.Schema.from_arrow(reader.schema))
            table = library.DeltaTable(self._place.address)
            require_columns(self._place, names, [field.name for field in table.schema().fields])
            groups = library.WriterProperties(max_row_group_size=GROUP)
            if open_parquet(file, file).metadata.num_rows > self.rows_at_once:
                with self._joined(table, reader, keys, since) as rows:
                    library.write_deltalake(table, rows, mode="overwrite", writer_properties=groups)
            else:
                self._merge(table, reader.read_all(), keys, since, groups)

    def _merge(self, table: Any, rows: Any, keys: list[str], since: str | None, groups: Any) -> None:
        same = " AND ".join(f"old.{ticked(key)} = new.{ticked(key)}" for key in keys)
        names = {"source_alias": "new", "target_alias": "old"}
        # With streamed_exec it would hold the rows of the table in memory, and not the new ones.
        merge = table.merge(rows, same, **names, streamed_exec=False, writer_properties=groups)
        condition = newer(rows.schema, since, "old", "new", ticked)
        merge.when_matched_update_all(predicate=condition).when_not_matched_insert_all().execute()

    @contextmanager
    def _joined(self, table: Any, reader: Any, keys: list[str], since: str | None) -> Iterator[Any]:
        """Yield a reader of all rows of a table, old and new."""
        old = table.to_pyarrow_dataset()
        same = " AND ".join(f"old.{quoted(key)} = new.{quoted(key)}" for key in keys)
        taken = f"new.{quoted(keys[0])} IS NOT NULL AND {newer(reader.schema, since, 'old', 'new')}"
        columns = [
            f"CASE WHEN {taken} THEN new.{name} ELSE old.{name} END AS {name}"
            if each in reader.schema.names
            else f"old.{name}"
            for each in old.schema.names
            if (name := quoted(each))
        ]
        with opened(self._place, ":memory:") as database:
            database.register("old", old.scanner(**FEW).to_reader())
            database.register("batches", reader)
            database.execute("CREATE TEMP TABLE new AS SELECT * FROM batches")  # this thread alone calls Python
            joined = f"SELECT {', '.join(columns)} FROM old FULL JOIN new ON {same}"
            yield database.sql(joined).to_arrow_reader(BATCH)

    @contextmanager
    def _told(self) -> Iterator[Any]:
        """Yield the library; its errors become one line."""
        try:
            import deltalake
            from deltalake.exceptions import DeltaError
        except ImportError:
            raise InputError(f"tables of Delta Lake need an extra: {install(EXTRA)}") from None
        try:
            yield deltalake
        except Exception as error:
            if not isinstance(error, DeltaError) and type(error) is not Exception:  # some of its errors have no class
                raise
            told = str(error).partition("\n")[0]
            raise InputError(f"{self._place}: {told}") from None


def _new(since: Since, schema: Any) -> Any | None:
    """Return the filter of the rows that are to be read; None for all.

    Raises:
        InputError: as `literal`.
    """
    import pyarrow.compute as compute

    column = compute.field(since.column)
    if literal(since, schema) is None:
        return None
    least = since.least.cast(schema.field(since.column).type, safe=False)  # type: ignore[union-attr]
    return (column >= least) | column.is_null()


def ticked(name: str) -> str:
    """Return a name for the conditions of a merge. `deltalake` itself quotes the columns of a merge so."""
    return f"`{name}`"


def fit(kind: Any) -> Any:
    """Return the type of a column that Delta Lake can hold."""
    pyarrow = load_pyarrow()
    types = pyarrow.types
    if types.is_time(kind) or types.is_duration(kind) or types.is_decimal256(kind):
        return pyarrow.string()
    if types.is_timestamp(kind):
        return pyarrow.timestamp("us", kind.tz and "UTC")
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return pyarrow.list_(fit(kind.value_type))
    return widened(kind)
