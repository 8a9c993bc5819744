from pathlib import Path

import pytest

from aisle.errors import InputError
from aisle.preprocess.table import read_labelled, read_rows, write_rows

ROWS = [{"text": '蓝牙,"耳机"\n降噪', "category": "数码"}, {"text": "usb-c cable", "category": "数码"}]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.csv.gz", "a.jsonl.gz", "a.parquet"])
def test_what_is_written_is_read(tmp_path: Path, name: str) -> None:
    write_rows(tmp_path / name, lambda: iter(ROWS), ["text", "category"])
    assert list(read_rows(tmp_path / name)) == ROWS


def test_parquet_columns_may_be_empty_at_first(tmp_path: Path) -> None:
    rows = [{"text": "a", "error": None}] * 5000 + [{"text": "b", "error": "bad"}]
    write_rows(tmp_path / "a.parquet", lambda: iter(rows), ["text", "error"])
    assert list(read_rows(tmp_path / "a.parquet")) == rows


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.txt", b"x", "unknown kind of file"),
        ("a.jsonl", b'{"text": "a", "category": "b"}\nnot json\n', "line 2: not JSON"),
        ("a.jsonl", b"[1]\n", "line 1: not a JSON object"),
        ("a.csv", b"title,category\nx,y\n", "no column 'text'; it has: title, category"),
        ("a.csv.gz", b"no gzip", "gzip"),
        ("a.parquet", b"no parquet", "not a Parquet file"),
    ],
)
def test_bad_tables_are_named(tmp_path: Path, name: str, content: bytes, complaint: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=complaint):
        list(read_labelled(path, "text", "category"))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        list(read_rows(tmp_path / "none.csv"))


def test_stray_bytes_come_through_for_cleaning_to_judge(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"text,category\n\xff,b\n" + "好,c\n".encode())
    texts = [text for text, _ in read_labelled(path, "text", "category")]
    assert texts == ["\udcff", "好"]
