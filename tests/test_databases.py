"""Tables of PostgreSQL, DuckDB and Delta Lake as input and output, against the real ones."""

from __future__ import annotations

import datetime
import itertools
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote

import adbc_driver_postgresql.dbapi as dbapi
import deltalake
import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aisle.client import Classifier
from aisle.client.bulk import classify_file
from aisle.errors import InputError
from aisle.preprocess.tables import databases, upsert
from aisle.preprocess.tables.duck import Duck
from aisle.preprocess.tables.place import as_argument, place_of, quoted
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


def classify(
    source: str | Path, out: str | Path, answering: Answering | None = None, stopping_at: int = -1, **options: Any
) -> dict[str, Any]:
    def track(answers: Iterable[Any], _: int) -> Iterator[Any]:
        for number, each in enumerate(answers):
            if number == stopping_at:
                raise KeyboardInterrupt
            yield each

    given = (Path(as_argument(str(each))) for each in (source, out))
    return classify_file(cast(Classifier, answering or Answering()), *given, "text", 1, track, **options)


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


KINDS = ("postgresql", "duckdb", "delta")
NOON = datetime.datetime(2026, 11, 28, 12, tzinfo=datetime.UTC)
Make = Callable[[str, str], str]  # returns the address of a table, by the kind of database and the table's name


@pytest.fixture
def address(tmp_path: Path, request: pytest.FixtureRequest) -> Make:
    def make(kind: str, name: str) -> str:
        if kind == "postgresql":
            return str(request.getfixturevalue("postgres").url(quote(name)))
        return f"duckdb:{tmp_path}/tables.duckdb?table={quote(name)}" if kind == "duckdb" else f"delta:{tmp_path}/{name}"

    return make


def product(number: int, second: int | None = None, text: str | None = "耳机") -> dict[str, Any]:
    at = None if second is None else NOON + datetime.timedelta(seconds=second)
    return {"id": number, "text": text, "updated_at": at, '"标 签': ["a", "b"], "warning": "old"}


def fill(where: str, rows: list[dict[str, Any]]) -> None:
    """Replace a table's rows."""
    kind = pa.schema(
        [
            *[("id", pa.int64()), ("text", pa.string()), ("updated_at", pa.timestamp("us", "UTC"))],
            *[('"标 签', pa.list_(pa.string())), ("warning", pa.string())],
        ]
    )
    table, place = pa.Table.from_pylist(rows, kind), place_of(Path(where))
    if place.scheme == "delta":
        deltalake.write_deltalake(place.address, table, mode="overwrite")
    elif place.scheme == "duckdb":
        with duckdb.connect(place.address) as database:
            database.register("rows", table)
            database.execute(f"CREATE OR REPLACE TABLE {quoted(*place.table)} AS SELECT * FROM rows")
    else:
        with dbapi.connect(place.address) as connection, connection.cursor() as cursor:
            cursor.execute(f"DROP TABLE IF EXISTS {quoted(*place.table)}")
            cursor.adbc_ingest(place.table[0], table)
            connection.commit()


def written(where: str) -> list[tuple[Any, ...]]:
    """Return what a table of answers holds, by id."""
    databases.forget()
    rows = sorted(read_rows(Path(as_argument(where))), key=lambda row: row["id"])
    return [(row["id"], row["text"], row["updated_at"], row["category"], row["error"]) for row in rows]


def answered(rows: list[dict[str, Any]], category: str = "数码") -> list[tuple[Any, ...]]:
    found = [(row["id"], row["text"], row["updated_at"], category if row["text"] else None) for row in rows]
    return [(*each, None if each[1] else "bad") for each in found]


@pytest.mark.parametrize("into", KINDS)
@pytest.mark.parametrize("from_", KINDS)
def test_a_row_replaces_the_one_with_its_key(address: Make, from_: str, into: str) -> None:
    source, out = address(from_, "商品"), address(into, "类目")
    rows = [product(n, n, text=None if n == 2 else "耳机") for n in range(5)]
    fill(source, rows)
    for _ in range(2):
        assert classify(source, out, keys=["id"])["errors"] == 1
        assert written(out) == answered(rows)
    fill(source, changed := [product(1, 9, "改"), product(7, 7)])
    classify(source, out, Answering(category="家居"), keys=["id"])
    assert written(out) == sorted(answered(changed, "家居") + [each for each in answered(rows) if each[0] != 1])
    (row,) = [row for row in read_rows(Path(out)) if row["id"] == 1]
    assert (row['"标 签'], row["source_warning"], row["warning"]) == (["a", "b"], "old", None)


@pytest.mark.parametrize("into", KINDS)
@pytest.mark.parametrize("from_", KINDS)
def test_since_reads_only_what_is_new(address: Make, from_: str, into: str) -> None:
    """Rows with the greatest value and rows without one are read again, so that none is lost."""
    source, out = address(from_, "s"), address(into, "o")
    rows = [product(1, 5), product(2, 3), product(3, None), product(4, 5), product(5, 4)]
    fill(source, rows)
    options: dict[str, Any] = {"keys": ["id"], "since": "updated_at"}
    assert classify(source, out, **options)["rows"] == 5
    fill(source, rows := [*rows, product(6, 5), product(7, 6)])
    assert classify(source, out, **options)["rows"] == 5  # 1, 4 and 6 at second 5; 7; and 3 without a time
    assert written(out) == answered(rows)
    assert classify(source, out, **options)["rows"] == 2
    assert written(out) == answered(rows)


@pytest.mark.parametrize("into", KINDS)
def test_a_row_is_not_replaced_by_an_older_one(address: Make, into: str) -> None:
    """Two runs at once may write in any order."""
    source, late, out = address("duckdb", "s"), address("duckdb", "late"), address(into, "o")
    fill(source, [product(1, 8, "新")])
    classify(source, out, keys=["id"])
    fill(late, [product(1, 2, "旧"), product(2, 9)])
    databases.snapshot(Path(late))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(upsert, "forget", lambda path: None)  # as if it had read before
        classify(late, out, keys=["id"], since="updated_at")
    assert written(out) == answered([product(1, 8, "新"), product(2, 9)])


@pytest.mark.parametrize("into", KINDS)
def test_a_stopped_run_goes_on_where_it_was(address: Make, into: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = address("duckdb", "s"), address(into, "o")
    fill(source, rows := [product(n, n // 2) for n in range(20)])
    monkeypatch.setattr(type(databases.database(Path(out))), "rows_at_once", 3)
    first, options = Answering(), {"keys": ["id"], "since": "updated_at"}
    with pytest.raises(KeyboardInterrupt):
        classify(source, out, first, **options, stopping_at=11)
    assert written(out) == answered(rows[:9])
    second = classify(source, out, **options)
    assert second["rows"] == 12  # of the row with the greatest time, the other is read again too
    assert written(out) == answered(rows)


@pytest.mark.parametrize("into", KINDS)
def test_a_stopped_run_over_all_rows_writes_none(address: Make, into: str) -> None:
    """Otherwise a later run with --since would take a part for the whole."""
    source, out = address("duckdb", "s"), address(into, "o")
    fill(source, rows := [product(n, n) for n in range(20)])
    with pytest.raises(KeyboardInterrupt):
        classify(source, out, keys=["id"], stopping_at=11)
    assert written(out) == []
    assert classify(source, out, keys=["id"], since="updated_at")["rows"] == 20
    assert written(out) == answered(rows)
