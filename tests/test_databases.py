"""Tables of PostgreSQL, DuckDB and Delta Lake as input and output, against the real ones."""

from __future__ import annotations

import datetime
import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import deltalake
import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aisle.client import Classifier
from aisle.client.bulk import classify_file
from aisle.errors import InputError
from aisle.preprocess.tables import databases
from aisle.preprocess.tables.duck import Duck
from aisle.preprocess.tables.place import as_argument, place_of
from aisle.preprocess.tables.postgres import Postgres as PostgresTable
from aisle.preprocess.tables.table import fingerprint, read_rows

from .conftest import aisle
from .databases import PASSWORD, Postgres, running
from .test_tables import Answering

NAME = '商品.t"x'  # a table's name that needs quotes, in a schema
NAMES = itertools.count()


@pytest.fixture(scope="session")
def server_of_tables(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    # Folders of pytest can be read by their owner alone, and the server runs as another user.
    with tempfile.TemporaryDirectory(prefix="aisle-postgres-") as folder, running(Path(folder)) as server:
        yield server


@pytest.fixture
def postgres(server_of_tables: Postgres, monkeypatch: pytest.MonkeyPatch) -> Postgres:
    monkeypatch.setenv("PGPASSWORD", PASSWORD)
    name = f"d{next(NAMES)}"
    server_of_tables.run(f"CREATE DATABASE {name}")
    return Postgres(server_of_tables.port, name)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    yield
    databases.forget()


def classify(source: str | Path, out: str | Path, answering: Answering | None = None, **options: Any) -> dict[str, Any]:
    given = (Path(as_argument(str(each))) for each in (source, out))
    return classify_file(cast(Classifier, answering or Answering()), *given, "text", 1, **options)


PRODUCTS = """CREATE TABLE products (id bigint PRIMARY KEY, text text, price numeric(12,4), code uuid, about jsonb,
    updated_at timestamptz, day date, tags text[], picture bytea, lasts interval)"""
FILL = """INSERT INTO products SELECT n, CASE WHEN n % 7 = 3 THEN NULL ELSE '耳机 ' || n END, n * 1.5, gen_random_uuid(),
    '{"a": [1]}', '2026-11-01 08:00Z'::timestamptz + n * '1 s'::interval, '2026-11-01', ARRAY['a,b', NULL], '\\x00ff',
    '1 day 02:00' FROM generate_series(1, 20) AS n"""


def test_from_postgresql_to_postgresql_every_type_is_kept(postgres: Postgres) -> None:
    postgres.run(PRODUCTS, FILL, "INSERT INTO products (id, price, day) VALUES (99, 'NaN', '0044-03-15 BC')")
    result = classify(postgres.url("products"), postgres.url("classified"), keys=["id"])
    assert (result["rows"], result["errors"], result["output"]) == (21, 4, postgres.url("classified"))
    types = """SELECT attname, atttypid::regtype::text FROM pg_attribute
        WHERE attrelid = '{}'::regclass AND attnum > 0 ORDER BY attnum"""
    made, source = (dict(postgres.run(types.format(table))) for table in ("classified", "products"))
    assert made == source | {"category": "text", "confidence": "double precision", "warning": "text", "error": "text"}
    assert postgres.run(f"SELECT * FROM products EXCEPT SELECT {', '.join(source)} FROM classified") == []
    answers = postgres.rows("classified", ["category", "error"], "id")
    assert answers[:3] == [("数码", None), ("数码", None), (None, "bad")]


def test_infinite_dates_are_read_as_missing(postgres: Postgres) -> None:
    postgres.run("CREATE TABLE t (id int, text text, at timestamp, day date)")
    postgres.run("INSERT INTO t VALUES (1, 'a', 'infinity', '-infinity'), (2, 'b', '2026-11-01', '2026-11-01')")
    rows = list(read_rows(Path(postgres.url("t"))))
    at = datetime.datetime(2026, 11, 1)
    assert [(row["at"], row["day"]) for row in rows] == [(None, None), (at, at.date())]
