"""Tables of Delta Lake."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aisle.errors import InputError
from aisle.extras import install
from aisle.preprocess.tables.columnar import BATCH, load_pyarrow
from aisle.preprocess.tables.duck import opened
from aisle.preprocess.tables.fitting import fitted, literal, newer, query, require_columns, widened
from aisle.preprocess.tables.place import EXTRA, Place, Since


class Delta:
    """A table of Delta Lake: a folder, or an address of an object store that `deltalake` knows."""

    rows_at_once = 100_000  # that one version writes: each reads the table's keys again

    def __init__(self, place: Place) -> None:
        self._place = place

    @contextmanager
    def read(self, since: Since | None) -> Iterator[tuple[Any, Iterator[Any]]]:
        """Yield the schema and the batches of the rows of the newest version."""
        with self._told() as library:
            rows = library.DeltaTable(self._place.address).to_pyarrow_dataset()
            if since is None:
                yield rows.schema, rows.to_batches(batch_size=BATCH)
                return
            literal(since, rows.schema)
            with opened(self._place, ":memory:") as database:  # sorts more rows than memory holds
                database.register("rows", rows)
                ordered = database.sql(query("rows", rows.schema, since, "VARCHAR", [])).to_arrow_reader(BATCH)
                yield ordered.schema, iter(ordered)

    def greatest(self, column: str) -> Any | None:
        """Return the greatest value of a column; None if it has none, or there is no table yet."""
        import pyarrow.compute as compute

        with self._told() as library:
            if not library.DeltaTable.is_deltatable(self._place.address):
                return None
            rows = library.DeltaTable(self._place.address).to_pyarrow_dataset()
            require_columns(self._place, [column], rows.schema.names)
            parts = [compute.max(batch[0]) for batch in rows.to_batches(columns=[column])]
            found = [each for each in parts if each.is_valid]
            return compute.max(load_pyarrow().array([each.as_py() for each in found], found[0].type)) if found else None

    def write(self, file: Path, keys: list[str], since: str | None) -> None:
        """Insert or update the rows of a Parquet file in one version. A missing table is made."""
        reader = fitted(file, fit)
        if any("`" in name for name in reader.schema.names):
            raise InputError(f"{self._place}: rename the columns with a backtick; deltalake cannot merge them")
        with self._told() as library:
            if not library.DeltaTable.is_deltatable(self._place.address):
                library.DeltaTable.create(self._place.address, library.Schema.from_arrow(reader.schema))
            table = library.DeltaTable(self._place.address)
            require_columns(self._place, reader.schema.names, [field.name for field in table.schema().fields])
            same = " AND ".join(f"old.{ticked(key)} = new.{ticked(key)}" for key in keys)
            merge = table.merge(reader, same, source_alias="new", target_alias="old")
            condition = newer(since, "old", "new", ticked)
            merge.when_matched_update_all(predicate=condition).when_not_matched_insert_all().execute()

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
        except DeltaError as error:
            told = str(error).partition("\n")[0]
            raise InputError(f"{self._place}: {told}") from None


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
