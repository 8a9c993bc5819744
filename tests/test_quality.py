import datetime
import json
import random
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aisle.errors import InputError
from aisle.preprocess.clean import clean_rows
from aisle.preprocess.near import Signer, neighbours
from aisle.preprocess.quality import clean_file
from aisle.preprocess.tables.table import Row, read_labelled, read_rows
from aisle.preprocess.tables.writing import write_rows
from aisle.preprocess.text_profile import script
from aisle.train.core.split import split

from .conftest import aisle

STORY = "这本书的结构颇有特点,从当时流行的计算机话题引入,再用数学和物理学做必要的铺垫,最后回到关键问题"
ROWS: list[Row] = [
    {"id": 1, "text": "红富士苹果 5斤装", "category": "水果"},
    {"id": 2, "text": "红富士苹果，5斤装！", "category": "水果"},
    {"id": 3, "text": "苹果手机壳", "category": "手机壳"},
    {"id": 4, "text": "<b></b>", "category": "手机壳"},
    {"id": 5, "text": "苹果手机壳", "category": "水果"},
    {"id": 6, "text": None, "category": "水果"},
    {"id": 7, "text": STORY, "category": "书籍"},
    {"id": 8, "text": STORY + "。好", "category": "书籍"},
    {"id": 9, "text": STORY + "。好", "category": "水果"},
    {"id": 10, "text": STORY + "啊", "category": "水果"},
    {"id": 11, "text": "联系13800138000,要的加QQ:383161223", "category": "书籍"},
    {"id": 12, "text": "香蕉", "category": ""},
    {"id": 13, "text": "usb-c cable 2m", "category": "数码"},
    {"id": 14, "text": "苹果手机壳", "category": "手机壳"},
]


def cleaned(source: Path, out: Path, **options: Any) -> tuple[list[Row], dict[str, Any]]:
    result = clean_file(source, out, "text", "category", **options)
    return list(read_rows(out)), result


def table(path: Path, rows: list[Row]) -> Path:
    write_rows(path, lambda: iter(rows), list(rows[0]))
    return path


def test_a_file_is_cleaned_as_in_training(sample: Path, tmp_path: Path) -> None:
    expected, report = clean_rows(read_labelled(sample, "text", "category"))
    rows, result = cleaned(sample, tmp_path / "out.csv", near=0)
    assert [row["text"] for row in rows] == expected.texts
    assert [row["category"] for row in rows] == expected.labels
    assert {key: result[key] for key in vars(report)} == vars(report)


def test_near_duplicates_are_dropped(sample: Path, tmp_path: Path) -> None:
    expected, _ = clean_rows(read_labelled(sample, "text", "category"))
    signatures = np.array([Signer()(text) for text in expected.texts])
    numbers = {label: i for i, label in enumerate(dict.fromkeys(expected.labels))}
    found = neighbours(signatures, np.array([numbers[label] for label in expected.labels]), 0.8)
    kept = [text for i, text in enumerate(expected.texts) if found.leader[i] == i]
    rows, result = cleaned(sample, tmp_path / "out.csv", near=0.8)
    assert [row["text"] for row in rows] == kept
    assert result["dropped"]["near-duplicate"] == len(expected.texts) - len(kept) > 0
    again, result = cleaned(tmp_path / "out.csv", tmp_path / "again.csv", near=0.8)
    assert again == rows
    assert result["dropped"] == {}


def test_the_fate_of_each_row_is_recorded(tmp_path: Path) -> None:
    rows, result = cleaned(table(tmp_path / "in.jsonl", ROWS), tmp_path / "out.jsonl")
    assert rows == [
        {"id": 1, "text": "红富士苹果 5斤装", "category": "水果"},
        {"id": 7, "text": STORY, "category": "书籍"},
        {"id": 10, "text": STORY + "啊", "category": "水果"},
        {"id": 11, "text": "联系电话,要的加QQ:账号", "category": "书籍"},
        {"id": 13, "text": "usb-c cable 2m", "category": "数码"},
    ]
    assert result["examples"] == {
        "empty": [4],
        "text missing": [6],
        "label missing": [12],
        "conflicting labels": [3, 5, 8, 9, 14],
        "duplicate": [2],
    }
    assert result["categories"]["水果"] == {"before": 6, "after": 2}
    assert [group["rows"] for group in result["conflicts"]["largest"]] == [3, 2]
    assert result["conflicts"]["largest"][0]["examples"][1] == {"row": 5, "category": "水果", "text": "苹果手机壳"}
    assert [each["row"] for each in result["near_conflicts"]["largest"][0]["examples"]] == [7, 10]
    assert result["languages"] == {"Han": 3, "mixed": 1, "Latin": 1}
    assert result["lengths"]["longest"] == len(STORY) + 1
    assert sum(bar["rows"] for bar in result["lengths"]["histogram"]) == 5
    assert result["personal_data"] == {"phone": 1, "account": 1}


def test_the_page_and_the_json_have_the_same_figures(tmp_path: Path) -> None:
    source = table(tmp_path / "in.csv", [*ROWS, {"id": 15, "text": "<script>x</script>A<&B", "category": "a<b"}])
    _, result = cleaned(source, tmp_path / "out.csv.gz", page=tmp_path / "pages" / "quality.html")
    assert json.loads((tmp_path / "pages" / "quality.json").read_text()) == result
    html = (tmp_path / "pages" / "quality.html").read_text()
    assert html.count("<svg") == 3
    for shown in ("conflicting labels", "苹果手机壳", "3, 5, 8, 9, 14", "Han"):
        assert shown in html
    for hidden in ("13800138000", "383161223", "<script"):
        assert hidden not in html
    assert {path.name for path in tmp_path.iterdir()} == {"in.csv", "out.csv.gz", "pages"}


@pytest.mark.parametrize("name", ["out.csv", "out.tsv", "out.jsonl.gz", "out.parquet"])
def test_other_columns_are_unchanged(tmp_path: Path, name: str) -> None:
    day = datetime.date(2024, 5, 1)
    rows = [{"sku": i, "text": f"商品{i}", "category": "ab"[i % 2], "tel": "13800138000", "day": day} for i in range(9)]
    out, _ = cleaned(table(tmp_path / "in.parquet", rows), tmp_path / name)
    typed = [row if name.endswith("parquet") else {**row, "day": "2024-05-01"} for row in rows]
    if name in ("out.csv", "out.tsv"):
        typed = [{key: str(value) for key, value in row.items()} for row in typed]
    assert out == typed


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("苹果", "Han"),
        ("苹果 5kg 一箱好吃不贵的水果", "mixed"),
        ("苹果iPhone", "mixed"),
        ("Ünlü marka", "Latin"),
        ("яблоко 苹果", "other"),
        ("りんご", "other"),
        ("5!", "no letters"),
    ],
)
def test_scripts(text: str, expected: str) -> None:
    assert script(text) == expected


def jaccard(a: str, b: str) -> float:
    one, other = ({text[i : i + 3] for i in range(len(text) - 2)} for text in (a, b))
    return len(one & other) / len(one | other)


def test_pairs_over_the_threshold_are_found_and_pairs_under_it_are_not(rng: random.Random) -> None:
    letters = (
        "的一是了我不在人有这个上们来到时大地为子中你说生国年着就那和要她出也得里后自以会家可下而过天去能对小多然于心学"
    )
    texts, similarities = [], []
    for changes in [1, 2, 3, 4, 6, 8, 12, 20] * 25:
        text = [rng.choice(letters) for _ in range(100)]
        other = list(text)
        for place in rng.sample(range(100), changes):
            other[place] = rng.choice(letters)
        texts += ["".join(text), "".join(other)]
        similarities.append(jaccard(texts[-2], texts[-1]))
    signatures = np.array([Signer()(text) for text in texts])
    found = neighbours(signatures, np.zeros(len(texts), np.int64), 0.8)
    joined = found.leader[1::2] == np.arange(0, len(texts), 2)
    over, under = np.array(similarities) > 0.9, np.array(similarities) < 0.65
    assert over.sum() > 20
    assert under.sum() > 20
    assert joined[over].mean() > 0.95
    assert not joined[under].any()
    assert (found.leader[::2] == np.arange(0, len(texts), 2)).all()


@pytest.mark.parametrize("threshold", [0.05, 0.5, 1.0])
def test_all_thresholds_are_supported(threshold: float) -> None:
    signatures = np.array([Signer()(text) for text in ("苹果", "苹果!", "香蕉", "苹果", "x")])
    found = neighbours(signatures, np.array([0, 0, 1, 1, -1]), threshold)
    assert found.leader.tolist() == [0, 0, 2, 3, 4]
    assert found.rival.tolist() == [-1, -1, -1, 0, -1]


@pytest.mark.long
def test_memory_does_not_grow_with_the_texts(tmp_path: Path) -> None:
    """Rows of 8 KiB: only a fraction of each is kept in memory."""
    letters = "".join(map(chr, range(0x4E00, 0x4E00 + 3000)))

    def rows() -> Iterator[Row]:
        rng = random.Random(0)
        for i in range(1500):
            yield {"text": "".join(rng.choices(letters, k=2700)), "category": "ab"[i % 2]}

    write_rows(tmp_path / "in.csv", rows, ["text", "category"])
    size = (tmp_path / "in.csv").stat().st_size
    clean_file(tmp_path / "in.csv", tmp_path / "warm.csv", "text", "category")
    tracemalloc.start()
    clean_file(tmp_path / "in.csv", tmp_path / "out.csv", "text", "category")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size > 12e6
    assert peak < size / 2


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.csv", "text,category\n红富士苹果,水果\n".encode("gbk"), r"line 2: not UTF-8; it looks like GBK; .* iconv"),
        ("a.csv", "标题,category\napple,fruit\n".encode("gbk"), "line 1: not UTF-8"),
        ("a.csv", "text,category\nb,c\ncafé au lait,drinks\n".encode("latin-1"), "line 3: not UTF-8; convert"),
        ("a.csv", "text,category\n苹果,水果\n".encode("utf-16"), "UTF-16"),
        ("a.csv", b"text;category\na;b\n", "line 1: columns are separated by ';', but .csv means ','"),
        ("a.tsv", b"text,category\na,b\n", "line 1: columns are separated by ',', but .tsv means"),
        ("a.csv", b"text,label\na,b\n", "no column 'category'; it has: text, label; .* --label-column"),
        ("a.csv", b"x" * ((1 << 24) + 1) + b",category\na,b\n", "row at line 1: .* is a quote left open"),
        ("a.csv", b'text,category\na,b\n"' + b"x" * (1 << 24) + b"y,b\n", "row at line 3: .* is a quote left open"),
        ("a.csv", b"", "no usable row"),
        (
            "a.csv",
            b"text,category\n,b\na,\n",
            "no usable row .1 empty, for example row 1; 1 label missing, for example row 2",
        ),
        ("a.csv", b"text,category\na,b\na,c\n", "no row is left .2 conflicting labels"),
    ],
)
def test_bad_tables_are_one_line(tmp_path: Path, name: str, content: bytes, complaint: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=complaint) as caught:
        clean_file(tmp_path / name, tmp_path / "out.csv", "text", "category")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_unreadable_rows_are_dropped_and_listed(tmp_path: Path) -> None:
    lines = [
        b"text,category",
        "好,不错,书籍".encode(),
        "尚可,书籍,".encode(),
        b"\xff\xfe,c",
        b"apple,\xc9",
        "葡萄,水果".encode(),
    ]
    (tmp_path / "in.csv").write_bytes(b"\n".join(lines))
    rows, result = cleaned(tmp_path / "in.csv", tmp_path / "out.csv")
    assert [list(row.values()) for row in rows] == [["尚可", "书籍"], ["葡萄", "水果"]]
    assert result["examples"] == {"too many cells": [1], "not UTF-8": [3], "label not UTF-8": [4]}
    with pytest.raises(InputError, match="row 1: more cells than columns"):
        list(read_labelled(tmp_path / "in.csv", "text", "category"))


@pytest.mark.parametrize(
    ("labels", "complaint"),
    [(["水果"] * 50, "'水果'"), (["水果"] * 50 + ["书籍"] * 50 + ["奶"], "'奶'")],
)
def test_one_class_and_a_class_of_one_row_are_named(labels: list[str], complaint: str) -> None:
    rows = [(f"商品{i * 7919}", label) for i, label in enumerate(labels)]
    with pytest.raises(InputError, match=complaint):
        split(clean_rows(rows)[0])


def test_the_command(tmp_path: Path) -> None:
    source = table(tmp_path / "in.csv", ROWS)
    done = aisle("clean", source, "-o", tmp_path / "out.csv", "--near", "0.9", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads((tmp_path / "out.report.json").read_text())
    assert (tmp_path / "out.report.html").is_file()
    done = aisle("clean", source, "-o", source)
    assert done.returncode == 2
    assert "is the input" in done.stderr
    assert "conflicting labels" in aisle("clean", source, "-o", tmp_path / "out.csv").stdout


def test_one_column_may_be_text_and_category(tmp_path: Path) -> None:
    """As in a list of category names that is to be checked; the category's form is written."""
    source, out = tmp_path / "names.csv", tmp_path / "out.csv"
    source.write_text("name\n水果 > 苹果\n手机壳\n")
    assert clean_file(source, out, "name", "name")["rows_kept"] == 2
    assert [row["name"] for row in read_rows(out)] == ["水果 > 苹果", "手机壳"]
