"""Tables of PostgreSQL, DuckDB and Delta Lake as input and output, against the real ones."""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from decimal import Decimal
from functools import partial
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
from aisle.commands.serving import _after_stop
from aisle.errors import InputError
from aisle.preprocess.tables import databases, upsert
from aisle.preprocess.tables.delta import Delta
from aisle.preprocess.tables.place import as_argument, place_of, quoted
from aisle.preprocess.tables.table import fingerprint, read_rows

from .conftest import Server, aisle, wait_for
from .databases import PASSWORD, Postgres, running
from .test_tables import Answering

NAME = '"商品.t""x"'  # a table's name that needs quotes


@pytest.fixture(scope="session")
def server_of_tables(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    # Folders of pytest can be read by their owner alone, and the server runs as another user.
    with tempfile.TemporaryDirectory(prefix="aisle-postgres-") as folder, running(Path(folder)) as server:
        yield server


@pytest.fixture
def postgres(server_of_tables: Postgres, monkeypatch: pytest.MonkeyPatch) -> Postgres:
    monkeypatch.setenv("PGPASSWORD", PASSWORD)
    server_of_tables.run("DROP SCHEMA public CASCADE", "CREATE SCHEMA public", "GRANT USAGE ON SCHEMA public TO PUBLIC")
    return server_of_tables


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

    given, to = (Path(as_argument(str(each))) for each in (source, out))
    return classify_file(cast(Classifier, answering or Answering()), given, to, "text", 1, track, **options)


PRODUCTS = """CREATE TABLE products (id bigint PRIMARY KEY, text text, price numeric(12,4), code uuid, about jsonb,
    updated_at timestamptz, day date, tags text[], picture bytea, lasts interval, cost money, grid int[], maker maker,
    moods mood[])"""
TYPES = ("CREATE TYPE maker AS (name text, since int)", "CREATE TYPE mood AS ENUM ('good', 'bad')")
FILL = """INSERT INTO products SELECT n, CASE WHEN n % 7 = 3 THEN NULL ELSE '耳机 ' || n END, n * 1.5,
    gen_random_uuid(), '{"a": [1]}', '2026-11-01 08:00Z'::timestamptz + n * '1 s'::interval, '2026-11-01',
    ARRAY['a,b', NULL], '\\x00ff', '1 day 02:00', '12.50', ARRAY[[1, 2], [3, 4]],
    ROW('华为'::text, 1987)::maker, ARRAY['bad'::mood] FROM generate_series(1, 20) AS n"""


def test_from_postgresql_to_postgresql_every_type_is_kept(postgres: Postgres) -> None:
    postgres.run(*TYPES, PRODUCTS, FILL, "INSERT INTO products (id, price, day) VALUES (99, 'NaN', '0044-03-15 BC')")
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
PAIRS = (("postgresql", "postgresql"), ("postgresql", "delta"), ("delta", "duckdb"), ("duckdb", "postgresql"))
NOON = datetime.datetime(2024, 11, 1, 12, tzinfo=datetime.UTC)
Make = Callable[[str, str], str]  # returns the address of a table, by the kind of database and the table's name


@pytest.fixture
def address(tmp_path: Path, request: pytest.FixtureRequest) -> Make:
    def make(kind: str, name: str) -> str:
        if kind == "postgresql":
            return str(request.getfixturevalue("postgres").url(quote(name)))
        return (
            f"duckdb:{tmp_path}/tables.duckdb?table={quote(name)}" if kind == "duckdb" else f"delta:{tmp_path}/{name}"
        )

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


@pytest.mark.parametrize(("from_", "into"), PAIRS)
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


@pytest.mark.parametrize(("from_", "into"), PAIRS)
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
def test_one_wrong_time_does_not_hide_later_rows(address: Make, into: str) -> None:
    """A time far ahead is not taken for the greatest; its row is read again."""
    source, out = address("duckdb", "s"), address(into, "o")
    options: dict[str, Any] = {"keys": ["id"], "since": "updated_at"}
    fill(source, rows := [product(1, 1), product(2, 2), product(3, 40 * 365 * 86400)])
    classify(source, out, **options)
    fill(source, rows := [*rows, product(4, 3)])
    assert classify(source, out, **options)["rows"] == 3
    assert written(out) == answered(rows)
    fill(source, rows := [*rows[:2], product(3, 4), rows[3]])
    classify(source, out, **options)
    assert written(out) == answered(rows)


@pytest.mark.parametrize(
    ("kind", "into"),
    [("timestamp", "delta"), ("timestamp", "postgresql"), ("date", "duckdb"), ("date", "delta"), ("bigint", "duckdb")],
)
def test_since_takes_times_dates_and_whole_numbers(address: Make, kind: str, into: str, tmp_path: Path) -> None:
    source, out = address("duckdb", "s"), address(into, "o")
    options: dict[str, Any] = {"keys": ["id"], "since": "at"}
    value = "n" if kind == "bigint" else f"('2024-11-01'::DATE + n::INT)::{kind}"
    for rows, read in ((3, 3), (5, 3)):
        with duckdb.connect(place_of(Path(source)).address) as database:
            database.execute(
                f"CREATE OR REPLACE TABLE s AS SELECT n AS id, 'a' AS text, {value} AS at FROM range({rows}) AS t(n)"
            )
        assert classify(source, out, **options)["rows"] == read


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


def test_many_rows_replace_those_of_a_delta_table(address: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than one merge takes; columns that only the table has are kept."""
    source, out = address("postgresql", "s"), address("delta", "o")
    fill(source, rows := [product(n, n) for n in range(5)])
    classify(source, out, keys=["id"])
    table = deltalake.DeltaTable(place_of(Path(out)).address)
    table.alter.add_columns(
        [deltalake.Field("note", deltalake.Schema.from_arrow(pa.schema([("n", pa.string())])).fields[0].type)]
    )
    table.update({"note": "'mine'"}, predicate="id = 3")
    monkeypatch.setattr(Delta, "rows_at_once", 2)
    fill(source, changed := [product(n, n, "改") for n in range(3, 8)])
    classify(source, out, keys=["id", "updated_at"])
    assert written(out) == answered([*rows[:3], *changed])
    assert [row["note"] for row in read_rows(Path(out)) if row["id"] == 3] == ["mine"]
    versions = table.version() + 1
    classify(source, out, keys=["id"])
    assert deltalake.DeltaTable(place_of(Path(out)).address).version() == versions + 1


@pytest.mark.parametrize("into", KINDS)
def test_a_stopped_run_goes_on_where_it_was(address: Make, into: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = address("duckdb", "s"), address(into, "o")
    fill(source, rows := [product(n, n // 2) for n in range(20)])
    monkeypatch.setattr(type(databases.database(Path(out))), "rows_at_once", 3)
    options: dict[str, Any] = {"keys": ["id"], "since": "updated_at"}
    with pytest.raises(KeyboardInterrupt):
        classify(source, out, **options, stopping_at=11)
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


def refused(*arguments: object) -> str:
    """Run a command that must end with exit code 2 and one line; return that line."""
    done = aisle("classify", *arguments)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert PASSWORD not in done.stderr
    return done.stderr


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"user": "nobody"}, 'password authentication failed for user "nobody"; give it by PGPASSWORD, ~/.pgpass'),
        ({"database": "none"}, 'database "none" does not exist'),
        ({"port": 1}, "port 1 failed: Connection refused"),
        ({"host": "no-such-host.invalid"}, 'could not translate host name "no-such-host.invalid"'),
        ({"table": "missing"}, 'relation "missing" does not exist; check ?table='),
        ({"table": "nowhere.missing"}, 'relation "nowhere.missing" does not exist'),
        ({"table": "a..b"}, "end it with ?table=NAME"),
        ({"table": ""}, "end it with ?table=NAME"),
        ({"table": "words&colour=red"}, 'invalid URI query parameter: "colour"'),
        ({"table": "words"}, "no column 'text'; it has: word; give the right one with --text-column"),
        ({"user": "reader"}, "permission denied for table t; ask for the rights: SELECT to read"),
        ({"password": PASSWORD}, "an address of PostgreSQL has a password; leave the password out"),
        ({"table": f"t&password={PASSWORD}"}, "an address of PostgreSQL has a password; leave the password out"),
    ],
)
def test_a_source_that_cannot_be_read_is_one_line(
    postgres: Postgres, tmp_path: Path, change: dict[str, str], complaint: str
) -> None:
    postgres.run("CREATE TABLE t (text text)", "CREATE TABLE words (word text)", "INSERT INTO words VALUES ('a')")
    if "user" in change:
        postgres.run("DROP ROLE IF EXISTS reader", f"CREATE ROLE reader LOGIN PASSWORD '{PASSWORD}'")
    at: dict[str, Any] = {
        "host": "127.0.0.1",
        "port": postgres.port,
        "database": postgres.database,
        "user": "owner",
        "table": "t",
    }
    at |= change
    user = at["user"] + (f":{change['password']}" if "password" in change else "")
    source = f"postgresql://{user}@{at['host']}:{at['port']}/{at['database']}?table={at['table']}"
    message = refused(source, "-o", tmp_path / "out.jsonl")
    assert complaint in message
    assert "password" in change or "&password" in at["table"] or f"aisle: {source}".split("?")[0] in message
    assert list(tmp_path.iterdir()) == []


def test_a_password_is_needed(postgres: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PGPASSWORD")
    monkeypatch.setenv("PGPASSFILE", str(tmp_path / "pgpass"))
    out, table = tmp_path / "out.jsonl", postgres.url("t")
    assert "no password supplied; give it by PGPASSWORD, ~/.pgpass or PGSERVICE" in refused(table, "-o", out)
    (tmp_path / "pgpass").write_text(f"127.0.0.1:{postgres.port}:*:owner:{PASSWORD}\n")
    (tmp_path / "pgpass").chmod(0o600)
    assert 'relation "t" does not exist' in refused(table, "-o", out)
    (tmp_path / "services").write_text(
        f"[shop]\nhost=127.0.0.1\nport={postgres.port}\nuser=owner\ndbname={postgres.database}\npassword={PASSWORD}\n"
    )
    (tmp_path / "pgpass").unlink()
    monkeypatch.setenv("PGSERVICEFILE", str(tmp_path / "services"))
    assert 'relation "t" does not exist' in refused("postgresql:///?service=shop&table=t", "-o", out)
    monkeypatch.setenv("PGSERVICE", "shop")
    assert 'relation "t" does not exist' in refused("postgresql:///?table=t", "-o", out)


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("duckdb:{0}/none.duckdb?table=t", "database does not exist"),
        ("duckdb:{0}/text.txt?table=t", "not a valid DuckDB database file"),
        ("duckdb:{0}/tables.duckdb?table=none", "Table with name none does not exist"),
        ("duckdb:{0}/tables.duckdb", "end it with ?table=NAME"),
        ("delta:{0}/none", "does not exist"),
        ("delta:{0}", "No files in log segment"),
    ],
)
def test_a_file_that_is_no_table_is_one_line(tmp_path: Path, source: str, complaint: str) -> None:
    duckdb.connect(str(tmp_path / "tables.duckdb")).close()
    (tmp_path / "text.txt").write_text("no database\n" * 1000)
    assert complaint in refused(source.format(tmp_path), "-o", tmp_path / "out.jsonl")


def test_a_duckdb_file_that_another_program_writes_is_one_line(tmp_path: Path) -> None:
    code = f"import duckdb; database = duckdb.connect('{tmp_path}/a.duckdb'); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        message = refused(f"duckdb:{tmp_path}/a.duckdb?table=t", "-o", tmp_path / "out.jsonl")
        other.communicate(b"\n")
    assert "Could not set lock on file" in message
    assert message.endswith("; close the program that writes it\n")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["{csv}", "-o", "{table}"], "a database as the output needs --key COLUMN"),
        (["{csv}", "-o", "{out}", "--key", "id"], "--key and --since are for a database as the output"),
        (["{csv}", "-o", "{table}", "--key", "id", "--since", "at"], "--since is for a database as FILE"),
        (["{csv}", "-o", "{table}", "--key", "id", "--shard", "1/2"], "--shard is for files"),
        (["{table}", "-o", "{out}", "--shard", "1/2"], "--shard is for files"),
        (["{table}", "-o", "{table}", "--key", "id"], "is the input; choose another output"),
        (["{table}"], "give the output with -o"),
        (["{csv}", "-o", "{table}", "--key", "id", "--bom"], "--bom is for .csv and .tsv"),
    ],
)
def test_options_that_do_not_fit_are_one_line(tmp_path: Path, options: list[str], complaint: str) -> None:
    csv, out = tmp_path / "in.csv", tmp_path / "out.csv"
    names = {"csv": csv, "out": out, "table": f"duckdb:{tmp_path}/a.duckdb?table=t"}
    csv.write_text("id,text\n1,a\n")
    assert complaint in refused(*(each.format(**names) for each in options))


def test_other_commands_do_not_write_to_a_database(tmp_path: Path) -> None:
    done = aisle("clean", tmp_path / "in.csv", "-o", f"duckdb:{tmp_path}/a.duckdb?table=t")
    assert (done.returncode, done.stdout) == (2, "")
    assert "only `aisle classify` writes to a database" in aisle("sample", "-o", "delta:a").stderr


@pytest.mark.parametrize("module", ["adbc_driver_postgresql", "duckdb", "deltalake"])
def test_a_missing_package_names_its_extra(tmp_path: Path, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = {
        "adbc_driver_postgresql": "postgresql:///d?table=t",
        "duckdb": "duckdb:a?table=t",
        "deltalake": "delta:a",
    }
    for name in [each for each in sys.modules if each.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    assert "[sql]'" in refused(sources.get(module, "delta:a"), "-o", tmp_path / "out.jsonl")


@pytest.mark.parametrize(
    ("rows", "options", "complaint"),
    [
        ([product(1, 1), product(1, 2)], {}, "two rows have id = 1; --key names columns that no two rows share"),
        ([product(1, 1), product(1, 2)], {"keys": ["id", "updated_at"]}, ""),
        ([product(1, None)], {"keys": ["id", "updated_at"]}, r"a row has no id \+ updated_at"),
        ([product(1, 1)], {"keys": ["sku"]}, "no column 'sku'; it has: id, text, .* with --key"),
        ([product(1, 1)], {"keys": ["warning"]}, "'warning' is the name of a column that is added"),
        ([product(1, 1)], {"since": "sku"}, "--since sku: no such column; the table has: id, text"),
        ([product(1, 1)], {"since": "text"}, "--since text: it holds string; name a column of times"),
    ],
)
def test_keys_are_checked_before_the_work(
    address: Make, rows: list[dict[str, Any]], options: dict[str, Any], complaint: str
) -> None:
    source, out, answering = address("duckdb", "s"), address("duckdb", "o"), Answering()
    fill(source, rows)
    if not complaint:
        assert classify(source, out, answering, **options)["rows"] == 2
        return
    with pytest.raises(InputError, match=complaint):
        classify(source, out, answering, **{"keys": ["id"], **options})
    assert answering.asked == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("since", [None, "updated_at"])
def test_a_table_without_rows_is_no_error(address: Make, kind: str, since: str | None) -> None:
    """A staging table is empty between two loads."""
    source, out = address(kind, "s"), address(kind, "o")
    fill(source, [product(1, 1)])
    assert classify(source, out, keys=["id"], since=since)["rows"] == 1
    fill(source, [])
    assert classify(source, out, keys=["id"], since=since)["rows"] == 0
    assert len(written(out)) == 1


def test_an_empty_cell_of_a_file_is_no_key(tmp_path: Path) -> None:
    source, answering = tmp_path / "in.csv", Answering()
    source.write_text("id,text\n1,耳机\n,键盘\n,鼠标\n", "utf-8")
    with pytest.raises(InputError, match=r"a row has no id; --key names columns that each row has"):
        classify(source, f"duckdb:{tmp_path}/t.duckdb?table=o", answering, keys=["id"])
    assert answering.asked == []


def test_a_stop_says_what_the_next_run_does(address: Make) -> None:
    out = Path(as_argument(address("duckdb", "o")))
    assert _after_stop(out, None) == "to start again; nothing was written"
    assert _after_stop(out, "updated_at") == "to go on after the last rows that were written"
    assert _after_stop(Path("out.csv"), None) == "to resume"


@pytest.mark.parametrize("into", KINDS)
def test_an_output_of_other_columns_is_refused_before_the_work(address: Make, into: str) -> None:
    source, out, answering = address("duckdb", "s"), address(into, "o"), Answering()
    fill(source, [product(1, 1)])
    fill(out, [product(1, 1)])
    with pytest.raises(InputError, match="has no column 'source_warning', 'category', 'confidence', 'error'; add it"):
        classify(source, out, answering, keys=["id"])
    assert answering.asked == []


@pytest.mark.parametrize(
    ("prepared", "complaint"),
    [
        ("CREATE TABLE o (id int, text text, {added})", "make the columns of --key unique in it: CREATE UNIQUE INDEX"),
        ("CREATE TABLE o (id int PRIMARY KEY, text text, {added}); GRANT SELECT, INSERT ON o TO writer", "permission"),
        ("SELECT 1", "permission denied for schema public; ask for the rights"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_before_the_work(
    postgres: Postgres, tmp_path: Path, prepared: str, complaint: str
) -> None:
    postgres.run("DROP ROLE IF EXISTS writer", f"CREATE ROLE writer LOGIN PASSWORD '{PASSWORD}'")
    added = "category text, confidence float, warning text, error text"
    postgres.run(*prepared.format(added=added).split(";"))
    (tmp_path / "in.csv").write_text("id,text\n1,耳机\n", "utf-8")
    answering = Answering()
    user = "owner" if "INDEX" in complaint else "writer"
    with pytest.raises(InputError, match=complaint):
        classify(tmp_path / "in.csv", postgres.url("o", user), answering, keys=["id"])
    assert answering.asked == []
    postgres.run("DROP OWNED BY writer", "DROP ROLE writer")


def test_a_table_of_other_types_takes_what_fits(postgres: Postgres, tmp_path: Path) -> None:
    """A file has texts only; the table's own types and defaults apply. A value that does not fit is one line."""
    postgres.run(
        """CREATE TABLE o (id int PRIMARY KEY, text varchar(9), price numeric, category varchar, confidence real,
        warning text, error text, made timestamptz DEFAULT now())"""
    )
    source, out = tmp_path / "in.csv", postgres.url("o")
    source.write_text("id,text,price\n1,耳机\0x,12.50\n2,a,5,c\n3,,\n", "utf-8")
    result = classify(source, out, keys=["id"])
    assert result["errors"] == 2
    rows = postgres.rows("o", ["id", "text", "price::text", "category", "error IS NULL", "made IS NULL"])
    assert rows[0] == (1, "耳机\ufffdx", "12.50", "数码", True, False)
    assert [row[3:] for row in rows[1:]] == [(None, False, False)] * 2
    source.write_text("id,text,price\n1,far too long,1\n4,b,1\n", "utf-8")
    with pytest.raises(InputError, match=r"value too long for type character varying\(9\)"):
        classify(source, out, keys=["id"])
    assert postgres.rows("o", ["id"]) == [(1,), (2,), (3,)]


@pytest.mark.parametrize("kind", KINDS)
def test_types_that_a_database_lacks_become_the_nearest(address: Make, kind: str, tmp_path: Path) -> None:
    """Of lists and objects in PostgreSQL, and of times in Delta Lake, that is text."""
    columns = {
        "id": pa.array([1, 2]),
        "large": pa.array([2**64 - 1, None], pa.uint64()),
        "half": pa.array([1.5, None], pa.float32()).cast(pa.float16()),
        "wide": pa.array([Decimal("1.25"), None], pa.decimal256(50, 2)),
        "at": pa.array([datetime.time(8), None]),
        "zone": pa.array([0, None], pa.timestamp("s", "Asia/Shanghai")),
        "lists": pa.array([[["a"]], None]),
        "object": pa.array([{"a": 1}, None]),
        "word": pa.array(["a", None]).dictionary_encode(),
        "none": pa.nulls(2),
    }
    pq.write_table(pa.table(columns), file := tmp_path / "rows.parquet")
    path = Path(address(kind, "t"))
    for _ in range(2):
        databases.database(path).write(file, ["id"], None)
    first, second = sorted(read_rows(path), key=lambda row: row["id"])
    assert second == dict.fromkeys(columns) | {"id": 2}
    assert [str(first[name]) for name in ("large", "half", "wide")] == ["18446744073709551615", "1.5", "1.25"]
    assert (first["zone"], first["word"], first["none"]) == (
        datetime.datetime.fromtimestamp(0, datetime.UTC),
        "a",
        None,
    )
    assert first["at"] == ("08:00:00.000000" if kind == "delta" else datetime.time(8))
    as_text = kind == "postgresql"
    assert (first["lists"], first["object"]) == (('[["a"]]', '{"a": 1}') if as_text else ([["a"]], {"a": 1}))


@pytest.mark.parametrize(
    ("kind", "into"), [("postgresql", "out.parquet"), ("duckdb", "out.csv"), ("delta", "out.jsonl")]
)
def test_a_table_becomes_a_file(address: Make, kind: str, into: str, tmp_path: Path) -> None:
    fill(source := address(kind, NAME if kind != "delta" else "x"), rows := [product(n, n) for n in range(3)])
    result = classify(source, tmp_path / into)
    assert result["rows"] == 3
    found = list(read_rows(tmp_path / into))
    assert [str(row["id"]) for row in found] == ["0", "1", "2"]
    if into == "out.parquet":
        assert [row["updated_at"] for row in found] == [row["updated_at"] for row in rows]


def test_all_commands_read_a_table(address: Make, tmp_path: Path) -> None:
    """One reading of a table is one state of it, whose SHA-256 is the same as long as the rows are."""
    fill(source := address("postgresql", "s"), [product(n, n, f"耳机 {n}") for n in range(30)])
    done = aisle("clean", source, "-o", tmp_path / "clean.csv", "--label-column", "warning", "--json")
    assert done.returncode == 0, done.stderr
    assert len(list(read_rows(tmp_path / "clean.csv"))) == 30
    before = fingerprint(Path(source))
    databases.forget()
    assert fingerprint(Path(source)) == before
    fill(source, [product(n, n, f"耳机 {n}") for n in range(31)])
    assert fingerprint(Path(source)) == before  # this process reads it once
    databases.forget()
    assert fingerprint(Path(source)) != before


def test_several_processes_do_not_read_several_states(address: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="each read another state of it"):
        next(read_rows(Path(address("duckdb", "s"))))


@pytest.mark.parametrize(
    ("given", "address_of", "table"),
    [
        ("postgresql:///d?table=t", "postgresql://@/d", ("t",)),
        ("postgres://u@h:1/d?table=s.t&sslmode=require", "postgresql://u@h:1/d?sslmode=require", ("s", "t")),
        ('postgresql://h/d?table=s."t.x"', "postgresql://h/d", ("s", "t.x")),
        ('postgresql://h/d?table=%E5%95%86"; DROP TABLE x', "", ()),
        ("postgresql://h/d?table=商; DROP TABLE x; --", "postgresql://h/d", ("商; DROP TABLE x; --",)),
        ("postgresql:///d?host=/run/postgresql&table=t", "postgresql://@/d?host=/run/postgresql", ("t",)),
        ("duckdb:a/b.duckdb?table=t", "a/b.duckdb", ("t",)),
        ("duckdb://a/b.duckdb?table=t", "a/b.duckdb", ("t",)),
        ("duckdb:///a/b.duckdb?table=m.t", "/a/b.duckdb", ("m", "t")),
        ("delta:a/b", "a/b", ()),
        ("delta:///a/b", "/a/b", ()),
        ("delta:s3://bucket/b", "s3://bucket/b", ()),
    ],
)
def test_an_address_survives_the_command_line(given: str, address_of: str, table: tuple[str, ...]) -> None:
    path = Path(as_argument(given))
    if not table and "delta" not in given:
        with pytest.raises(InputError, match="end it with"):
            place_of(path)
        return
    assert (place_of(path).address, place_of(path).table) == (address_of, table)
    assert as_argument(f"--data={given}") == f"--data={as_argument(given)}"


def test_the_command_of_the_manual(server: Server, address: Make) -> None:
    """The real command and the real server: a first run, and one over what is new."""
    source, out = address("duckdb", "products"), address("delta", "classified")
    fill(source, [product(1, 1, "苹果"), product(2, 2, None)])
    command = ["classify", source, "-o", out, "--key", "id", "--since", "updated_at", "--url", server.url]
    done = aisle(*command)
    assert done.returncode == 0, done.stderr
    assert f"2 rows, 1 errors, 0 warnings in {out}; next: aisle review {out} -o" in done.stderr
    fill(source, [product(1, 1, "苹果"), product(2, 2, None), product(3, 3, "香蕉")])
    result = json.loads(aisle(*command, "--json").stdout)
    assert (result["rows"], result["errors"], result["output"]) == (2, 1, out)
    databases.forget()
    assert [row["category"] is None for row in read_rows(Path(out))].count(True) == 1


@pytest.mark.long
def test_a_run_killed_again_and_again_loses_nothing_and_writes_nothing_twice(
    server: Server, postgres: Postgres
) -> None:
    """kill -9 of the real command, against the real servers, each time after it has written some more."""
    postgres.run(
        "CREATE TABLE s (id int PRIMARY KEY, text text, at timestamptz)",
        "INSERT INTO s SELECT n, '苹果 ' || n, now() + n / 3 * '1 s'::interval FROM generate_series(1, 3000) AS n",
    )
    few = "from aisle.preprocess.tables.postgres import Postgres; Postgres.rows_at_once = 300"
    command = [sys.executable, "-c", f"{few}; from aisle.cli import main; main()", "classify", postgres.url("s")]
    command += ["-o", postgres.url("o"), "--key", "id", "--since", "at", "--url", server.url, "--json"]
    for goal in (300, 900, 1500):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for(partial(has_rows, postgres, goal, process))
        process.kill()
        process.wait()
    result = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert result["rows"] <= 1503
    assert postgres.run("SELECT id, text, at FROM s EXCEPT SELECT id, text, at FROM o") == []
    assert postgres.run("SELECT count(*), count(DISTINCT id), count(category) FROM o") == [(3000, 3000, 3000)]


def has_rows(postgres: Postgres, goal: int, process: subprocess.Popen[bytes]) -> bool:
    """Return whether the table `o` has so many rows; the process must not have ended."""
    assert process.poll() is None
    (made,) = postgres.run("SELECT to_regclass('o') IS NOT NULL")[0]
    return bool(made and postgres.run("SELECT count(*) FROM o")[0][0] >= goal)
