import io
import zipfile
from pathlib import Path

import pytest

from aisle.errors import InputError
from aisle.preprocess.tables.delimited import LONGEST
from aisle.preprocess.tables.table import read_labelled, read_rows
from aisle.preprocess.tables.writing import write_rows

ROWS = [{"text": '蓝牙,"耳机"\n降噪', "category": "数码"}, {"text": "usb-c cable", "category": "数码"}]


def _damaged_lzma() -> bytes:
    """Return a .zip whose only file is compressed with LZMA and damaged."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("a.csv", "text,category\nx,y\n")
    content = bytearray(file.getvalue())
    start = 30 + len("a.csv") + 9  # the headers of the entry and of LZMA
    content[start : start + 4] = b"\xff" * 4
    return bytes(content)


DAMAGED_LZMA = _damaged_lzma()


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
        ("a.doc", b"x", "unknown file format"),
        ("a.jsonl", b'{"text": "a", "category": "b"}\nnot json\n', "line 2: not JSON"),
        ("a.jsonl", b"[1]\n", "line 1: not a JSON object"),
        ("a.csv", b"title,category\nx,y\n", "no column 'text'; it has: title, category"),
        ("a.csv.gz", b"no gzip", "gzip"),
        ("a.parquet", b"no parquet", "not a Parquet file"),
        ("a.csv.zip", DAMAGED_LZMA, "damaged, or not what its name says"),
        ("a.txt", b"x" * (LONGEST + 1) + b"\ny\n", "line 1: a line has more than"),
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


def test_undecodable_bytes_reach_cleaning(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"text,category\n\xff,b\n" + "好,c\n".encode())
    texts = [text for text, _ in read_labelled(path, "text", "category")]
    assert texts == ["\udcff", "好"]
