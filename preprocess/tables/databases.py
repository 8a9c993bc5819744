"""Tables of databases: PostgreSQL, DuckDB and Delta Lake. Each is read once, into a temporary Parquet file.

So everything that reads a Parquet file reads them too, all passes over a table see the same rows, and no transaction
stays open while texts are classified.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from aisle.errors import InputError
from aisle.files import new_temporary
from aisle.preprocess.tables.columnar import load_pyarrow
from aisle.preprocess.tables.delta import Delta
from aisle.preprocess.tables.duck import Duck, opened
from aisle.preprocess.tables.place import Since, place_of, quoted
from aisle.preprocess.tables.postgres import Postgres

_TAKEN: dict[Path, Path] = {}  # the Parquet file of each address that was read


class Database(Protocol):
    """A table of a database."""

    rows_at_once: int

    def read(self, since: Since | None) -> AbstractContextManager[tuple[Any, Iterator[Any]]]: ...

    def greatest(self, column: str) -> Any | None: ...

    def write(self, file: Path, keys: list[str], since: str | None) -> None: ...


def database(path: Path) -> Database:
    """Return the table that an address names.

    Raises:
        InputError: it names no table, or has a password.
    """
    place = place_of(path)
    kinds: dict[str, type[Postgres | Duck | Delta]] = {"postgresql": Postgres, "duckdb": Duck, "delta": Delta}
    return kinds[place.scheme](place)


def snapshot(path: Path, since: Since | None = None) -> Path:
    """Return a temporary Parquet file with the rows of a table, which are read at the first call.

    Raises:
        InputError: the table cannot be read.
    """
    if path not in _TAKEN:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise InputError(f"{path}: several processes would each read another state of it; copy it to a file first")
        _TAKEN[path] = new_temporary("aisle-table-", ".parquet")
        try:
            _copy(path, since, _TAKEN[path])
        except BaseException:
            forget(path)
            raise
    return _TAKEN[path]


def _copy(path: Path, since: Since | None, file: Path) -> None:
    with (
        database(path).read(since) as (schema, batches),
        load_pyarrow().parquet.ParquetWriter(file, schema) as writer,
    ):
        for batch in batches:
            writer.write_batch(batch)


def forget(path: Path | None = None) -> None:
    """Delete the temporary file of a table, or of all, before the process ends: the next command reads it again."""
    for each in [path] if path is not None else list(_TAKEN):
        if each in _TAKEN:
            _TAKEN.pop(each).unlink(missing_ok=True)


def check_keys(path: Path, file: Path, keys: list[str]) -> None:
    """Check that each row of a Parquet file has a key of its own. Messages call it `path`.

    Raises:
        InputError: a row has no key, or two rows have the same.
    """
    names = ", ".join(map(quoted, keys))
    missing = " OR ".join(f"{quoted(key)} IS NULL" for key in keys)
    twice = f"SELECT {names} FROM read_parquet(?) GROUP BY {names} HAVING count(*) > 1 LIMIT 1"
    with opened(path, ":memory:") as memory:
        if memory.execute(f"SELECT 1 FROM read_parquet(?) WHERE {missing} LIMIT 1", [str(file)]).fetchone():
            raise InputError(f"{path}: a row has no {' + '.join(keys)}; --key names columns that each row has")
        found = memory.execute(twice, [str(file)]).fetchone()
    if found:
        values = ", ".join(f"{key} = {value}" for key, value in zip(keys, found, strict=True))
        raise InputError(f"{path}: two rows have {values}; --key names columns that no two rows share")
