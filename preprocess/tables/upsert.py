"""What `classify` needs to write to a table of a database: its checks before the work, and the parts it writes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from aisle.errors import InputError
from aisle.preprocess.tables import columnar
from aisle.preprocess.tables.databases import Database, check_keys, database, forget, snapshot
from aisle.preprocess.tables.duck import load_duckdb
from aisle.preprocess.tables.opening import kind_of, local
from aisle.preprocess.tables.place import Since, is_database
from aisle.preprocess.tables.shard import Shard
from aisle.preprocess.tables.table import missing_column, read_rows


def target_of(source: Path, out: Path, keys: Sequence[str], since: str | None, shard: Shard | None) -> Database | None:
    """Return the table of a database that is written; None for a file. A source in a database is read here.

    Raises:
        InputError: the options do not fit together, or one of the databases cannot be read.
    """
    from_database, to_database = is_database(source), is_database(out)
    if shard and (from_database or to_database):
        raise InputError("--shard is for files: each worker would read another state of a table; copy it to a file")
    if (keys or since) and not to_database:
        raise InputError("--key and --since are for a database as the output, such as -o 'duckdb:FILE?table=NAME'")
    if to_database and not keys:
        raise InputError("a database as the output needs --key COLUMN: a row replaces the one with the same key")
    if since and not from_database:
        raise InputError("--since is for a database as FILE; all rows of a file are classified")
    target = database(out) if to_database else None
    if target:
        load_duckdb()  # checks the keys, whatever the target is
    if from_database:
        forget(source)
        snapshot(source, Since(since, target.greatest(since)) if target and since else None)
    return target


def check_columns(
    source: Path, columns: Sequence[str], renamed: Mapping[str, str], keys: Sequence[str], since: str | None
) -> None:
    """Check that each row of the source has a key of its own.

    Raises:
        InputError: a column is missing or has the name of an answer, a row has no key, or two rows have the same.
    """
    lacking = next((name for name in keys if name not in columns), None)
    if lacking is not None:
        raise missing_column(source, lacking, list(columns), "--key")
    taken = next((name for name in [*keys, since] if name in renamed), None)
    if taken is not None:
        raise InputError(f"{source}: {taken!r} is the name of a column that is added; rename it, as in a view")
    if kind_of(source) == "parquet":
        check_keys(source, local(source), list(keys))
        return
    with tempfile.TemporaryDirectory(prefix="aisle-keys-") as folder:
        file, names = Path(folder, "keys.parquet"), list(keys)
        columnar.write_parquet(
            file, lambda: ({name: _filled(row.get(name)) for name in names} for row in read_rows(source)), names
        )
        check_keys(source, file, names)


def _filled(value: Any) -> Any:
    """Return a value of a file, None for an empty cell."""
    return None if isinstance(value, str) and not value.strip() else value


def portions(total: int, size: int) -> Iterator[range]:
    """Yield the rows of each transaction. The first has none: it makes the table, and fails early if it cannot."""
    yield range(0)
    for start in range(0, total, size):
        yield range(start, min(start + size, total))
