"""Shards: workers share one table, each writes a part file, and together they hold each row once."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aisle.client import Classifier
from aisle.client.bulk import classify_file
from aisle.errors import InputError
from aisle.preprocess.tables import columnar
from aisle.preprocess.tables.shard import JOB, Shard, read_shard
from aisle.preprocess.tables.table import read_range, read_rows
from aisle.preprocess.tables.writing import write_rows

from .conftest import aisle
from .test_tables import Answering, stop

ROWS: list[dict[str, Any]] = [
    {"text": "" if n % 9 == 4 else f'title {n}, 7" long\nsecond line' if n % 5 == 1 else f"耳机 {n}", "sku": n}
    for n in range(23)
]


def source_of(folder: Path, name: str) -> Path:
    path = folder / name
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=5)
    else:
        rows = [row | ({"late": "x"} if row["sku"] == 20 else {}) for row in ROWS]  # only a late row has this column
        write_rows(path, lambda: iter(rows if "json" in name else ROWS), ["text", "sku"])
    return path


def parts(source: Path, out: Path, count: int) -> list[Path]:
    for number in reversed(range(1, count + 1)):
        classify_file(cast(Classifier, Answering()), source, out, "text", 1, shard=Shard(number, count))
    return sorted(out.parent.glob(f"{out.name.partition('.')[0]}-*"))


@pytest.mark.parametrize("count", [1, 4, 30])
@pytest.mark.parametrize(
    ("name", "written"),
    [("in.parquet", "out.parquet"), ("in.csv", "out.csv.gz"), ("in.jsonl", "out.jsonl"), ("in.jsonl", "out.parquet")],
)
def test_all_shards_together_equal_the_unsharded_result(tmp_path: Path, name: str, written: str, count: int) -> None:
    """With 30 shards of 23 rows, some are empty."""
    source, whole, out = source_of(tmp_path, name), tmp_path / f"whole-{written}", tmp_path / written
    classify_file(cast(Classifier, Answering()), source, whole, "text", 1)
    found = parts(source, out, count)
    assert len(found) == count
    assert [row for part in found for row in read_rows(part)] == list(read_rows(whole))
    assert not list(tmp_path.glob("*.partial"))
    if written.endswith(".parquet"):
        assert len({pq.read_schema(part) for part in found}) == 1
        assert pq.read_table([*map(str, found)]).num_rows == len(ROWS)
    elif "csv" in written:
        assert len({tuple(next(csv.reader([read_head(part)]))) for part in found}) == 1


def read_head(path: Path) -> str:
    import gzip

    with gzip.open(path, "rt", encoding="utf-8") as file:
        return file.readline()


@given(st.integers(0, 500), st.integers(1, 40))
def test_each_row_is_in_one_shard(total: int, count: int) -> None:
    shares = [Shard(number, count).rows(total) for number in range(1, count + 1)]
    assert [row for share in shares for row in share] == list(range(total))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_only_the_row_groups_of_a_shard_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = source_of(tmp_path, "in.parquet")
    read: list[list[int]] = []
    opened = columnar.open_parquet

    class Watched:
        def __init__(self, path: Path, where: Path) -> None:
            self._file = opened(path, where)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

        def iter_batches(self, size: int, row_groups: list[int], columns: list[str]) -> Any:
            read.append(row_groups)
            return self._file.iter_batches(size, row_groups=row_groups, columns=columns)

    monkeypatch.setattr(columnar, "open_parquet", Watched)
    assert [row["sku"] for row in read_range(source, range(8, 12))] == [8, 9, 10, 11]
    assert list(read_range(source, range(5, 5))) == []
    assert read == [[1, 2]]


def test_a_shard_resumes(tmp_path: Path) -> None:
    source, out = source_of(tmp_path, "in.parquet"), tmp_path / "out.parquet"
    shard = Shard(2, 2)
    with pytest.raises(KeyboardInterrupt):
        classify_file(cast(Classifier, Answering()), source, out, "text", 1, stop, shard=shard)
    assert [path.name for path in tmp_path.glob("out*")] == ["out-00002-of-00002.parquet.partial"]
    answering = Answering()
    result = classify_file(cast(Classifier, answering), source, out, "text", 1, shard=shard)
    assert (result["rows"], result["resumed_from"], result["source_rows"], result["first_row"]) == (12, 4, 23, 12)
    assert len(answering.asked) == 8
    assert [row["sku"] for row in read_rows(tmp_path / "out-00002-of-00002.parquet")] == list(range(11, 23))


def test_a_journal_of_another_number_of_shards_is_refused(tmp_path: Path) -> None:
    source, out = source_of(tmp_path, "in.csv"), tmp_path / "out.csv"
    with pytest.raises(KeyboardInterrupt):
        classify_file(cast(Classifier, Answering()), source, out, "text", 1, stop, shard=Shard(1, 2))
    (tmp_path / "out-00001-of-00002.csv.partial").rename(tmp_path / "out-00001-of-00003.csv.partial")
    with pytest.raises(InputError, match="belongs to another job"):
        classify_file(cast(Classifier, Answering()), source, out, "text", 1, shard=Shard(1, 3))


@pytest.mark.parametrize("given", ["0/16", "17/16", "1/0", "0/0"])
def test_a_number_outside_of_the_shards_is_refused(given: str) -> None:
    with pytest.raises(InputError, match=f"--shard {given}: shards are numbered from 1 to their count, such as 1/"):
        read_shard(given)


@pytest.mark.parametrize("given", ["a/b", "3", "3/", "/16", "-1/16", "1.5/16", "3/16/2", "３/16", ""])
def test_what_is_no_shard_is_refused(given: str) -> None:
    with pytest.raises(InputError, match="write it as 3/16"):
        read_shard(given)


def test_the_number_comes_from_an_indexed_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(JOB, "2")
    assert read_shard("job/16") == Shard(3, 16)
    with pytest.raises(InputError, match="pod 2: shards are numbered"):
        read_shard("job/2")
    monkeypatch.delenv(JOB)
    with pytest.raises(InputError, match=f"{JOB} is not set"):
        read_shard("job/16")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--shard", "17/16"), "numbered from 1"),
        (("--shard", "a/b"), "write it as 3/16"),
        (("--shard", "1/2", "-o", "-"), "--shard writes a part file"),
    ],
)
def test_bad_shards_are_one_line(tmp_path: Path, arguments: tuple[str, ...], complaint: str) -> None:
    source = source_of(tmp_path, "in.csv")
    where = () if "-o" in arguments else ("-o", tmp_path / "out.csv")
    done = aisle("classify", source, *where, *arguments, "--url", "localhost:1")
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1), done.stderr
    assert complaint in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["in.csv"]


def test_shards_need_a_file() -> None:
    done = aisle("classify", "a text", "--shard", "1/2")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "--shard: needs a file" in done.stderr


def test_part_files_keep_the_ending() -> None:
    names = ("out.parquet", "a.b.csv", "out.csv.gz", "titles.jsonl.zst")
    assert [Shard(3, 16).part_of(Path("x", name)).name for name in names] == [
        "out-00003-of-00016.parquet",
        "a.b-00003-of-00016.csv",
        "out-00003-of-00016.csv.gz",
        "titles-00003-of-00016.jsonl.zst",
    ]


def test_a_served_model_classifies_the_shards(server: Any, tmp_path: Path) -> None:
    """The command with the real server: two shards, in a table of five rows."""
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"text": f"红富士苹果 {n}"}) + "\n" for n in range(5)))
    told = []
    for shard in ("1/2", "2/2"):
        done = aisle("classify", source, "-o", tmp_path / "out.jsonl", "--shard", shard, "--url", server.url, "--json")
        assert done.returncode == 0, done.stderr
        told.append(json.loads(done.stdout))
    assert [(each["shard"], each["rows"], each["first_row"]) for each in told] == [("1/2", 2, 1), ("2/2", 3, 3)]
    rows = [row for each in told for row in read_rows(Path(each["output"]))]
    assert [row["text"] for row in rows] == [f"红富士苹果 {n}" for n in range(5)]
    assert all(row["category"] for row in rows)


@pytest.mark.parametrize("shard", [None, Shard(2, 3)])
def test_a_table_without_rows_keeps_its_columns_and_a_killed_run_leaves_nothing(
    tmp_path: Path, shard: Shard | None
) -> None:
    source, out = tmp_path / "in.csv", tmp_path / "out.csv"
    source.write_text("text,sku,category\n", "utf-8")
    written = shard.part_of(out) if shard else out
    left = [
        tmp_path / f".{written.name}.0a1b2c3d.writing.csv",
        tmp_path / f".other-{written.name}.0a1b2c3d.writing.csv",
    ]
    for each in left:
        each.write_text("half a row")
    classify_file(cast(Classifier, Answering()), source, out, "text", 1, shard=shard)
    with written.open(encoding="utf-8", newline="") as file:
        assert next(csv.reader(file)) == [
            "text",
            "sku",
            "source_category",
            "category",
            "confidence",
            "warning",
            "error",
        ]
    assert [each.exists() for each in left] == [False, True]
    with pytest.raises(InputError, match="no column 'title'"):
        classify_file(cast(Classifier, Answering()), source, tmp_path / "other.csv", "title", 1, shard=shard)
