"""Tables of all kinds: one reader and one rule for all commands, and no silent errors."""

from __future__ import annotations

import bz2
import csv
import datetime
import gzip
import io
import json
import os
import random
import zipfile
from collections.abc import Iterable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xlsxwriter
from hypothesis import given
from hypothesis import strategies as st

from aisle.client import Classifier, Failure, Prediction
from aisle.client import bulk as bulk_module
from aisle.client.bulk import classify_file
from aisle.client.wire import Models
from aisle.errors import InputError
from aisle.preprocess.clean import clean_rows
from aisle.preprocess.labels import Labelling, read_label_map
from aisle.preprocess.quality import clean_file
from aisle.preprocess.tables.delimited import MANY, Records
from aisle.preprocess.tables.encodings import guess
from aisle.preprocess.tables.opening import Reading, set_reading
from aisle.preprocess.tables.table import FaultyRow, fingerprint, read_labelled, read_rows
from aisle.preprocess.tables.writing import BOM, write_rows
from aisle.train.adapt.review import review

from .conftest import aisle


@pytest.fixture(autouse=True)
def usual_reading(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("AISLE_READING", "{}")
    set_reading(Reading())
    yield
    set_reading(Reading())


class Answering:
    """A fake client: these tests are about reading and writing, not about the answers."""

    def __init__(self, version: int = 1, category: str = "数码", model: str = "a1") -> None:
        self.version, self.category, self.model = version, category, model
        self.asked: list[Any] = []

    def probe(self, top_k: int = 1, *, decisions: bool = False, attributes: bool = False, bulk: bool = False) -> None:
        pass

    def models(self, *, bulk: bool = False) -> Models:
        return Models({self.version: self.model} if self.model else {}, has_decisions=False)

    def stream(
        self, texts: Iterable[Any], top_k: int = 1, *, decisions: bool = False, attributes: bool = False
    ) -> Iterator[Prediction | Failure]:
        for text in texts:
            self.asked.append(text)
            try:
                bad = text is None or not text.strip() or not text.encode()
            except UnicodeEncodeError:
                bad = True
            yield Failure("bad") if bad else Prediction((self.category,) * top_k, (0.5,) * top_k, self.version)


def classified(
    source: Path, out: Path, text_column: str = "text", answering: Answering | None = None
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    result = classify_file(cast(Classifier, answering or Answering()), source, out, text_column, 1)
    return list(read_rows(out)), result


def records(text: str, delimiter: str = ",") -> list[list[str]]:
    found = Records(io.StringIO(text, newline=""), delimiter)
    stream = iter(found)
    header = next(stream)
    found.columns = len(header)
    if len(header) == 1:
        found.split_at("")
    return [header, *stream]


CELLS = st.text('ab,;\t"\r\n 好', max_size=12)


@given(
    rows=st.integers(1, 4).flatmap(lambda width: st.lists(st.lists(CELLS, min_size=width, max_size=width), min_size=1)),
    delimiter=st.sampled_from(",\t;"),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
)
def test_proper_quotes_are_read_as_in_csv(rows: list[list[str]], delimiter: str, quoting: Any) -> None:
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=delimiter, quoting=quoting).writerows([["x"] * len(rows[0]), *rows])
    expected = [row for row in csv.reader(io.StringIO(text.getvalue(), newline=""), delimiter=delimiter) if row]
    assert records(text.getvalue(), delimiter) == expected


@pytest.mark.parametrize("delimiter", [",", "\t"])
@pytest.mark.parametrize("seed", range(20))
def test_stray_quotes_lose_no_rows(seed: int, delimiter: str) -> None:
    rng = random.Random(seed)
    titles = ["".join(rng.choice('abc 7"') for _ in range(rng.randint(1, 30))) for _ in range(500)]
    titles[7], titles[90] = '"Best 7 inch tablet', 'tablet 7"'
    lines = [f"{title}{delimiter}{rng.choice(['x', 'y'])}" for title in titles]
    assert len(records("\n".join([f"text{delimiter}category", *lines]) + "\n", delimiter)) == 501


def test_a_lone_quote_at_each_end_of_many_rows_is_not_one_cell() -> None:
    lines = [f"title {i}\tc" for i in range(200)]
    lines[5], lines[5 + MANY] = '"Best 7 inch\tc', 'tablet 7"\tc'
    assert [row[0] for row in records("\n".join(["text\tcategory", *lines]), "\t")[1:]] == [
        line.split("\t")[0] for line in lines
    ]


def test_a_cell_of_several_lines_is_one_cell() -> None:
    text = 'text,category\n"Colour, red\nSize, ""M""\n",a\nx,b\n"p, q\r\n",c\n'
    assert records(text)[1:] == [['Colour, red\nSize, "M"\n', "a"], ["x", "b"], ["p, q\r\n", "c"]]


def test_rows_in_counts_the_data_rows(tmp_path: Path) -> None:
    lines = [f"title {i}\t{'ab'[i % 2]}" for i in range(3000)]
    lines[2499] = '"Best 7 inch tablet\ta'
    (tmp_path / "in.tsv").write_text("\n".join(["text\tcategory", *lines]) + "\n")
    result = clean_file(tmp_path / "in.tsv", tmp_path / "out.tsv", "text", "category", near=0)
    assert (result["rows_in"], result["rows_kept"]) == (3000, 3000)
    rows, _ = classified(tmp_path / "in.tsv", tmp_path / "out.jsonl")
    assert len(rows) == 3000
    assert rows[2499]["text"] == '"Best 7 inch tablet'


def test_a_row_with_too_many_cells_is_never_cut(tmp_path: Path) -> None:
    source = tmp_path / "in.csv"
    source.write_text("text,category\nusb c cable,a\nMen shoes, running, black,b\n")
    answering = Answering()
    rows, result = classified(source, tmp_path / "out.jsonl", answering=answering)
    assert answering.asked == ["usb c cable", None]
    assert result["errors"] == 1
    assert "more cells than columns" in rows[1]["error"]
    assert rows[1]["surplus cells"] == [" black", "b"]
    with pytest.raises(InputError, match="row 2: more cells than columns"):
        list(read_labelled(source, "text", "category"))


def test_the_texts_of_a_table_of_one_column_are_whole_lines(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text('text\nMen shoes, running, black\n"a, ""b"""\n')
    assert [row["text"] for row in read_rows(tmp_path / "in.csv")] == ["Men shoes, running, black", 'a, "b"']


def test_values_that_are_no_text_are_errors_of_their_rows(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    values = ['{"title": "x"}', '["a", "b"]', '""', "null", "true", "7", "NaN", '"ok"']
    source.write_text("".join(f'{{"text": {value}}}\n' for value in values) + '{"text": "a", "text": "b"}\n')
    answering = Answering()
    rows, _ = classified(source, tmp_path / "out.jsonl", answering=answering)
    assert answering.asked == [None, None, "", None, None, "7", None, "ok", None]
    assert [row["error"] is None for row in rows] == [False] * 5 + [True, False, True, False]
    assert rows[0]["text"] == {"title": "x"}
    assert rows[6]["text"] is None
    assert "occurs twice" in rows[8]["error"]


def test_a_repeated_key_is_an_error_of_its_row_at_any_depth(tmp_path: Path) -> None:
    lines = ('{"text": "a", "m": {"id": 1, "id": 2}}', '{"text": "b", "m": [{"n": {"a": 1, "a": 1}}]}', '{"text": "c"}')
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    rows, _ = classified(tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert [row["error"] for row in rows] == [
        "the key 'id' occurs twice; keep one of them",
        "the key 'a' occurs twice; keep one of them",
        None,
    ]


@pytest.mark.parametrize("name", ["out.csv", "out.parquet", "out.xlsx", "out.jsonl"])
def test_a_lone_surrogate_in_a_columns_name_stops_nothing(tmp_path: Path, name: str) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "a", "\\ud83d": 1}\n')
    rows, _ = classified(tmp_path / "in.jsonl", tmp_path / name)
    assert [row["category"] for row in rows] == ["数码"]


def test_a_lone_surrogate_is_an_error_of_its_row(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"sku": 1, "text": "usb"}\n{"sku": 2, "text": "手机 \\ud83d"}\n{"sku": 3, "text": "苹果"}\n')
    for name in ("out.jsonl", "out.json", "out.csv", "out.parquet", "out.xlsx"):
        rows, result = classified(source, tmp_path / name)
        assert result["errors"] == 1
        assert [str(row["sku"]) for row in rows] == ["1", "2", "3"]
        (tmp_path / name).read_bytes().decode("utf-8", "strict" if name[4] in "jc" else "replace")
    assert '"手机 \\ud83d"'.encode("ascii", "backslashreplace") in (tmp_path / "out.jsonl").read_bytes()


def test_parquet_to_parquet_passes_other_columns_through(tmp_path: Path) -> None:
    count = 5000
    table = pa.table(
        {
            "text": pa.array([f"苹果 {i}".encode() for i in range(count)], pa.binary()),
            "category": pa.array(["a", "b"] * (count // 2)).dictionary_encode(),
            "crawled": pa.array([1_700_000_000_123_456_789] * count, pa.timestamp("ns")),
            "never": pa.array([10**18] * count, pa.timestamp("ms")),
            "price": pa.array([Decimal("1.10")] * count, pa.decimal128(20, 2)),
            "picture": pa.array([b"\xff\x00"] * count, pa.binary()),
            "small": pa.array([1] * count, pa.int8()),
        }
    )
    pq.write_table(table, tmp_path / "in.parquet")
    answering = Answering()
    result = classify_file(cast(Classifier, answering), tmp_path / "in.parquet", tmp_path / "out.parquet", "text", 1)
    assert result["errors"] == 0
    assert answering.asked[1] == "苹果 1"
    out = pq.read_table(tmp_path / "out.parquet")
    assert (
        out.rename_columns(["category" if n == "source_category" else n for n in out.column_names])
        .select(range(7))
        .equals(table)
    )
    clean_file(tmp_path / "in.parquet", tmp_path / "clean.parquet", "text", "category", near=0)
    cleaned = pq.read_table(tmp_path / "clean.parquet")
    for name in ("crawled", "never", "price", "picture", "small"):
        assert cleaned[name].equals(table[name])
    assert cleaned.schema.field("text").type == pa.string()
    rows, _ = classified(tmp_path / "in.parquet", tmp_path / "out.jsonl")
    assert rows[0]["crawled"] == "2023-11-14 22:13:20.123456789"


def test_rows_are_dropped_from_every_type_of_column(tmp_path: Path) -> None:
    count = 5000
    table = pa.table({"text": [f"苹果 {i // 2}" for i in range(count)], "category": ["a"] * count})
    names = pa.array([f"n{i}" for i in range(count)], pa.string_view())
    pq.write_table(table.append_column("name", names), tmp_path / "in.parquet")
    report = clean_file(tmp_path / "in.parquet", tmp_path / "out.parquet", "text", "category", near=0)
    assert (report["rows_in"], report["rows_kept"]) == (count, count // 2)
    out = pq.read_table(tmp_path / "out.parquet")
    assert out.schema.field("name").type == pa.string_view()
    assert out["name"].to_pylist() == [f"n{i}" for i in range(0, count, 2)]


def test_labels_of_numbers_with_gaps_are_whole_and_gaps_are_missing(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a", "b", "c"], "category": [1.0, float("nan"), 2.0]}), tmp_path / "in.parquet")
    labels = [label for _, label in read_labelled(tmp_path / "in.parquet", "text", "category")]
    assert labels == ["1", None, "2"]


def test_a_missing_column_of_parquet_is_told_with_those_there_are(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"], "price": [1]}), tmp_path / "in.parquet")
    with pytest.raises(InputError, match="no column 'category'; it has: text, price"):
        list(read_labelled(tmp_path / "in.parquet", "text", "category"))


@pytest.mark.parametrize("name", ["in.csv", "in.tsv", "in.parquet", "in.xlsx"])
def test_two_columns_of_one_name_are_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.endswith("parquet"):
        pq.write_table(pa.Table.from_arrays([pa.array(["a"])] * 2, ["text", "text"]), path)
    elif name.endswith("xlsx"):
        write_rows(path, lambda: iter([{"a": 1}]), ["text", "text"])
    else:
        path.write_text("text,text\na,b\n".replace(",", "\t" if name.endswith("tsv") else ","))
    with pytest.raises(InputError, match="two columns are called 'text'"):
        list(read_rows(path))


def test_no_column_of_the_input_is_lost(tmp_path: Path) -> None:
    source = tmp_path / "in.csv"
    source.write_text("text,category,source_category,error\na,b,c,d\n")
    rows, _ = classified(source, tmp_path / "out.csv")
    assert rows[0]["source_category"] == "c"
    assert rows[0]["source_category_2"] == "b"
    assert rows[0]["source_error"] == "d"
    rows, _ = classified(tmp_path / "out.csv", tmp_path / "again.csv")
    assert {"b", "c", "d", "数码"} <= set(rows[0].values())


def stop(answers: Iterable[Any], _: int) -> Iterator[Any]:
    for number, each in enumerate(answers):
        if number == 4:
            raise KeyboardInterrupt
        yield each


def test_a_partial_file_is_not_continued_with_another_version(tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_rows(source, lambda: ({"text": f"a{i}"} for i in range(10)), ["text"])
    with pytest.raises(KeyboardInterrupt):
        classify_file(cast(Classifier, Answering(1)), source, out, "text", 1, stop)
    with pytest.raises(InputError, match=r"answered by version 1 of the model, and version 2 answers now; delete it"):
        classify_file(cast(Classifier, Answering(2)), source, out, "text", 1)
    result = classify_file(cast(Classifier, Answering(1)), source, out, "text", 1)
    assert (result["resumed_from"], result["versions"]) == (4, {"1": 6})


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        ("a1", "b2", "was answered by another model, which is version 1 too; delete it"),
        ("a1", "", "this server does not tell which model its version 1 is; delete it"),
        ("", "b2", "an earlier Aisle wrote it, or its server did not tell; delete it"),
    ],
)
def test_another_model_of_the_same_number_does_not_go_on(tmp_path: Path, before: str, now: str, message: str) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_rows(source, lambda: ({"text": f"a{i}" if i < 3 else None} for i in range(10)), ["text"])  # an error is last
    with pytest.raises(KeyboardInterrupt):
        classify_file(cast(Classifier, Answering(model=before)), source, out, "text", 1, stop)
    write_rows(source, lambda: ({"text": f"a{i}"} for i in range(10)), ["text"])
    partial = tmp_path / "out.jsonl.partial"
    head, _, answers = partial.read_text().partition("\n")
    partial.write_text(json.dumps(json.loads(head) | {"sha256": fingerprint(source)}) + "\n" + answers)
    with pytest.raises(InputError, match=message):
        classify_file(cast(Classifier, Answering(model=now)), source, out, "text", 1)
    result = classify_file(cast(Classifier, Answering(model=before)), source, out, "text", 1)
    assert result["resumed_from"] == 4
    assert not {"model", "version"} & set(next(read_rows(out)))


def test_two_runs_do_not_write_one_output(tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_rows(source, lambda: ({"text": f"a{i}"} for i in range(10)), ["text"])
    with (
        bulk_module._locked(tmp_path / "out.jsonl.partial"),
        pytest.raises(InputError, match="another run is writing"),
    ):
        classify_file(cast(Classifier, Answering()), source, out, "text", 1)


def test_the_input_is_not_overwritten(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    write_rows(source, lambda: iter([{"text": "a"}]), ["text"])
    (tmp_path / "link.jsonl").hardlink_to(source)
    for out in (source, tmp_path / "link.jsonl", tmp_path / "." / "in.jsonl"):
        with pytest.raises(InputError, match="is the input"):
            classify_file(cast(Classifier, Answering()), source, out, "text", 1)


def test_a_symbolic_link_as_the_output_is_followed(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", lambda: iter([{"text": "a"}]), ["text"])
    (tmp_path / "link.jsonl").symlink_to("target.jsonl")
    classified(tmp_path / "in.jsonl", tmp_path / "link.jsonl")
    assert (tmp_path / "link.jsonl").is_symlink()
    assert [row["category"] for row in read_rows(tmp_path / "target.jsonl")] == ["数码"]


def test_a_pipe_is_refused_because_a_table_is_read_more_than_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.csv")
    write_rows(tmp_path / "in.csv", lambda: iter(ROWS), ["text", "category"])
    for name in (tmp_path / "pipe.csv", "/dev/null"):
        result = aisle("clean", name, "-o", tmp_path / "out.csv")
        assert result.returncode == 2
        assert f"{name} is a pipe or a device; give - and redirect it" in result.stderr
    result = aisle("clean", tmp_path / "in.csv", "-o", tmp_path / "pipe.csv")
    assert result.returncode == 2
    assert "it is a pipe or a device; name a file" in result.stderr
    assert (tmp_path / "pipe.csv").is_fifo()


@pytest.mark.parametrize("label", ["食品（生鲜）", "C++---books", "½ price", "<b>", "A&amp;B", "a  b"])
def test_labels_are_unchanged(label: str) -> None:
    table, _ = clean_rows([("one text", label), ("two text", f" {label} ")])
    assert table.labels == [label, label]


TWINS = [("a1", "fruit > fresh"), ("a2", "fruit > fresh"), ("a3", "FRUIT > FRESH"), ("a4", "Fruit>Fresh"), ("a5", "b")]


def test_labels_that_differ_only_in_form_are_reported() -> None:
    _, report = clean_rows([*TWINS, ("a1", "FRUIT > FRESH"), ("a5", "c")])
    assert report.dropped == {"duplicate": 1, "conflicting labels": 2}
    assert report.label_variants == [["fruit > fresh", "FRUIT > FRESH", "Fruit>Fresh"]]
    assert "--fold-labels" in report.notes()[0]
    folded, report = clean_rows(TWINS, Labelling(fold=True))
    assert set(folded.labels) == {"fruit > fresh", "b"}
    assert report.folded == {"FRUIT > FRESH": "fruit > fresh", "Fruit>Fresh": "fruit > fresh"}


def test_a_file_gets_the_labels_of_training(tmp_path: Path) -> None:
    rows = [*TWINS, ("a1", "FRUIT > FRESH"), ("a6", "old"), ("a7", "x > y > z"), ("a8", "x > y > w")]
    write_rows(tmp_path / "in.csv", lambda: ({"text": t, "category": c} for t, c in rows), ["text", "category"])
    (tmp_path / "map.csv").write_text("from,to\nold,b\n")
    asked = Labelling(read_label_map(tmp_path / "map.csv"), True, 2)
    table, report = clean_rows(rows, asked)
    result = clean_file(tmp_path / "in.csv", tmp_path / "out.csv", "text", "category", near=0, labelling=asked)
    out = list(read_rows(tmp_path / "out.csv"))
    assert ([row["text"] for row in out], [row["category"] for row in out]) == (table.texts, table.labels)
    assert {name: result[name] for name in vars(report)} == vars(report)
    assert report.merged == {"x > y > z": "x > y", "x > y > w": "x > y"}
    assert table.labels.count("b") == 2


def test_rare_categories_join_their_parents_or_are_left_out() -> None:
    rows = [(f"{c}{i}", c) for c, n in [("A > B", 1), ("A > C", 1), ("D", 1), ("E", 3)] for i in range(n)]
    table, report = clean_rows(rows, Labelling(min_rows=2))
    assert report.merged == {"A > B": "A", "A > C": "A"}
    assert report.left_out == {"D": 1}
    assert report.dropped == {"rare category": 1}
    assert table.labels == ["A", "A", "E", "E", "E"]
    table, report = clean_rows(rows, Labelling(min_rows=1), learnable=lambda text: not text.startswith("E"))
    assert report.left_out == {"E": 3}


def test_a_column_that_the_first_row_lacks_is_read_alike(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"sku": 1}\n{"text": "usb c cable", "category": "a", "sku": 2}\n')
    assert list(read_labelled(source, "text", "category")) == [(None, None), ("usb c cable", "a")]
    assert clean_file(source, tmp_path / "c.jsonl", "text", "category")["rows_kept"] == 1
    rows, _ = classified(source, tmp_path / "out.jsonl")
    assert [row["error"] is None for row in rows] == [False, True]
    with pytest.raises(InputError, match="no column 'title'; it has: sku, text, category"):
        list(read_labelled(source, "title", "category"))


@pytest.mark.parametrize(
    ("encoding", "texts", "found"),
    [
        ("gb18030", "红富士苹果,水果", "gb18030"),
        ("big5", "紅富士蘋果,水果", "big5"),
        ("shift_jis", "ワイヤレスイヤホン", "shift_jis"),
        ("cp1252", "Café moulu épicerie façon", None),
        ("cp1251", "Наушники беспроводные", None),
        ("iso8859_2", "Żółty ser", None),
    ],
)
def test_an_encoding_is_named_only_where_it_is_certain(
    tmp_path: Path, encoding: str, texts: str, found: str | None
) -> None:
    assert guess([texts.encode(encoding)]) == found
    path = tmp_path / "in.csv"
    path.write_bytes(f"text,category\n{texts.replace(',', ' ')},a\n".encode(encoding))
    with pytest.raises(InputError, match=rf"line 2: not UTF-8; .*--encoding{f' {found}' if found else '$'}"):
        list(read_rows(path))
    set_reading(Reading(encoding=encoding))
    assert [row["text"] for row in read_rows(path)] == [texts.replace(",", " ")]


WIDE = "text,category\n红富士苹果,水果\n"


@pytest.mark.parametrize(
    ("content", "encoding", "complaint"),
    [
        (WIDE.encode(), "utf-16", "has no byte order mark; give --encoding utf-16-le or utf-16-be"),
        (WIDE.encode(), "utf-16-le", "not utf-16-le"),
        (WIDE.encode("utf-16-be"), "utf-16-le", "not utf-16-le"),
        (WIDE.encode("utf-16")[:-1], "utf-16", "cut short"),
        (WIDE.encode("utf-16"), "utf-32", "not utf-32"),
        (WIDE.encode("utf-32"), "utf-16", "not utf-16"),
        (WIDE.encode("utf-32"), "", "looks like UTF-32; read it with --encoding utf-32"),
        (WIDE.encode("utf-16"), "", "looks like UTF-16; read it with --encoding utf-16"),
        (b"\xff" + WIDE.encode(), "punycode", "not punycode"),
    ],
)
def test_a_wrong_encoding_is_refused(tmp_path: Path, content: bytes, encoding: str, complaint: str) -> None:
    """It must not be reported as a bug, nor read as a header without rows."""
    (tmp_path / "in.csv").write_bytes(content)
    set_reading(Reading(encoding=encoding))
    with pytest.raises(InputError, match=complaint):
        list(read_rows(tmp_path / "in.csv"))


@pytest.mark.parametrize("encoding", ["gb18030", "latin-1", "utf-16-le"])
def test_a_file_in_utf8_is_read_so_whatever_the_encoding_of_the_others(
    tmp_path: Path, encoding: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """In Latin-1, and often in GB18030, UTF-8 decodes to other characters without an error."""
    rows = [{"text": "红富士苹果", "category": "水果"}, {"text": "蓝牙耳机", "category": "数码"}]
    path = tmp_path / "in.csv"
    write_rows(path, lambda: iter(rows), ["text", "category"])
    set_reading(Reading(encoding=encoding))
    assert list(read_rows(path)) == rows
    assert "is UTF-8 and is read so" in capsys.readouterr().err
    text = "Café façon épicerie très légère à réchauffer" if encoding == "latin-1" else "红富士苹果 红富士苹果"
    (tmp_path / "foreign.csv").write_bytes(f"text,category\n{text},a\n".encode(encoding))
    assert [row["text"] for row in read_rows(tmp_path / "foreign.csv")] == [text]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32-be"])
def test_half_a_surrogate_pair_is_an_error_of_its_row_in_any_encoding(tmp_path: Path, encoding: str) -> None:
    content = (WIDE + "手机壳 \ud83d,数码\n").encode(encoding, "surrogatepass")
    (tmp_path / "in.csv").write_bytes(content)
    set_reading(Reading(encoding=encoding))
    classify_file(cast(Classifier, Answering()), tmp_path / "in.csv", tmp_path / "out.jsonl", "text", 1)
    set_reading(Reading())
    assert [row["error"] for row in read_rows(tmp_path / "out.jsonl")] == [None, "bad"]


def test_the_sheet_that_is_read_is_one_that_excel_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with xlsxwriter.Workbook(str(tmp_path / "in.xlsx")) as book:
        for name in ("hidden", "shown", "further"):
            sheet = book.add_worksheet(name)
            sheet.write_column(0, 0, ["text", name])
            if name == "hidden":
                sheet.hide()
            if name == "shown":
                sheet.activate()
                sheet.set_first_sheet()
    rows, _ = classified(tmp_path / "in.xlsx", tmp_path / "out.jsonl")
    assert [row["text"] for row in rows] == ["shown"]
    assert capsys.readouterr().err.count("has 2 sheets; 'shown' is read") == 1  # the table is read several times


def test_other_delimiters_headers_and_first_lines(tmp_path: Path) -> None:
    path = tmp_path / "in.csv"
    path.write_text(" text ;category\na, b;c\n")
    with pytest.raises(InputError, match="give --delimiter ';'"):
        list(read_rows(path))
    set_reading(Reading(delimiter=";"))
    assert list(read_rows(path)) == [{"text": "a, b", "category": "c"}]
    set_reading(Reading())
    path.write_text("sep=;\r\ntext;category\r\na;b\r\n")
    assert list(read_rows(path)) == [{"text": "a", "category": "b"}]
    path.write_text("a,b,c\n")
    set_reading(Reading(header=False))
    assert list(read_rows(path)) == [{"text": "a", "category": "b", "column_3": "c"}]


ROWS = [{"text": "蓝牙,耳机", "category": "数码"}, {"text": "usb", "category": "数码"}]


def test_an_old_spreadsheet_is_read() -> None:
    rows = list(read_rows(Path(__file__).parent / "tables" / "two_sheets.xls"))  # written by xlwt
    assert rows == [
        {"text": "红富士苹果 5斤装", "category": "水果", "price": 39.5, "listed": datetime.date(2026, 11, 11)},
        {"text": "usb c cable 2m", "category": "cables", "price": 3, "listed": None},
        {"text": 12345, "category": "numbers", "price": None, "listed": None},
    ]


@pytest.mark.parametrize(
    "name", ["a.csv.bz2", "a.jsonl.zst", "a.json", "a.json.gz", "a.xlsx", "a.tsv.zst", "a.parquet"]
)
def test_what_is_written_is_read(tmp_path: Path, name: str) -> None:
    write_rows(tmp_path / name, lambda: iter(ROWS), ["text", "category"])
    assert list(read_rows(tmp_path / name)) == ROWS


def test_text_lines_zips_and_arrays(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one, two\n\nthree")
    assert [row["text"] for row in read_rows(tmp_path / "a.txt")] == ["one, two", "", "three"]
    for name, member in (("a.zip", "rows.jsonl"), ("b.csv.zip", "b.csv")):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr(member, '{"text": "x"}\n' if member.endswith("l") else "text\nx\n")
        assert list(read_rows(tmp_path / name)) == [{"text": "x"}]
    with zipfile.ZipFile(tmp_path / "a.zip", "a") as archive:
        archive.writestr("other.csv", "text\n")
    with pytest.raises(InputError, match="holds 2 files"):
        list(read_rows(tmp_path / "a.zip"))
    big = [{"text": "x" * 100_000}, {"text": "y"}]
    (tmp_path / "a.json").write_text(json.dumps(big, indent=1))
    assert list(read_rows(tmp_path / "a.json")) == big
    (tmp_path / "a.json").write_text('[{"text": "a"}, 7]')
    with pytest.raises(InputError, match="element 2: not a JSON object"):
        list(read_rows(tmp_path / "a.json"))
    (tmp_path / "a.json").write_text('[{"text": "a"}')
    with pytest.raises(InputError, match="element 2: not JSON"):
        list(read_rows(tmp_path / "a.json"))
    for rest in ('[{"text": "b"}]', " " * 100_000 + "x"):
        (tmp_path / "a.json").write_text('[{"text": "a"}]\n' + rest)
        with pytest.raises(InputError, match="more data follows the array"):
            list(read_rows(tmp_path / "a.json"))
    (tmp_path / "a.jsonl").write_text('{"text": ' + "[" * 5000 + "]" * 5000 + "}\n")
    with pytest.raises(InputError, match="line 1: not JSON: nested too deeply"):
        list(read_rows(tmp_path / "a.jsonl"))


def test_spreadsheets_keep_text_and_say_what_they_cannot_hold(tmp_path: Path) -> None:
    rows = [{"text": "=1+1", "ean": 6901234567890, "day": datetime.date(2024, 5, 1), "long": 2**60}]
    write_rows(tmp_path / "a.xlsx", lambda: iter(rows), list(rows[0]))
    assert list(read_rows(tmp_path / "a.xlsx")) == [
        {"text": "=1+1", "ean": 6901234567890, "day": "2024-05-01", "long": str(2**60)}
    ]
    write_rows(tmp_path / "in.jsonl", lambda: iter([{"text": "x" * 40_000}]), ["text"])
    with pytest.raises(InputError, match="a sheet holds 32767"):
        classified(tmp_path / "in.jsonl", tmp_path / "out.xlsx")


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("a.csv", b"PK\x03\x04xxxxxl/workbook.xml", "a spreadsheet"),
        ("a.csv", gzip.compress(b"text\nx\n", mtime=0), "a gzip file"),
        ("a.csv.bz2", bz2.compress(b"PAR1xxxx"), "a Parquet file"),
    ],
)
def test_files_with_a_wrong_suffix_are_named(tmp_path: Path, name: str, content: bytes, what: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=what):
        list(read_rows(tmp_path / name))


def test_a_byte_order_mark_for_excel(tmp_path: Path) -> None:
    token = BOM.set(True)
    try:
        write_rows(tmp_path / "a.csv", lambda: iter(ROWS), ["text", "category"])
        with pytest.raises(InputError, match="--bom is for"):
            write_rows(tmp_path / "a.jsonl", lambda: iter(ROWS), ["text", "category"])
    finally:
        BOM.reset(token)
    assert (tmp_path / "a.csv").read_bytes().startswith(b"\xef\xbb\xbftext")
    assert list(read_rows(tmp_path / "a.csv")) == ROWS


def test_review_passes_over_rows_that_cannot_be_used(tmp_path: Path) -> None:
    source = tmp_path / "in.csv"
    source.write_text("text,category,confidence\nMen shoes, black,a,0.3\nusb c cable,a,0.4\n")
    result = review(source, tmp_path / "out.csv", rows=5)
    assert result["skipped"] == {"too many cells": 1}
    assert [row["text"] for row in read_rows(tmp_path / "out.csv")] == ["usb c cable"]


def test_a_bad_row_is_still_a_row(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,category\na,b,c\n")
    (row,) = read_rows(tmp_path / "a.csv")
    assert isinstance(row, FaultyRow)
    assert row["text"] == "a"


def test_columns_of_several_types_become_text_in_parquet(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"text": "a", "x": 1}, {"text": "b", "x": "y"}, {"text": "c", "x": {"z": [1]}}]
    write_rows(tmp_path / "a.parquet", lambda: iter(rows), ["text", "x"])
    assert [row["x"] for row in read_rows(tmp_path / "a.parquet")] == ["1", "y", '{"z": [1]}']


def test_the_commands_options(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("a b;x\nc d;y\n")
    done = aisle(
        "clean", tmp_path / "in.csv", "-o", tmp_path / "out.csv", "--delimiter", ";", "--no-header", "--bom", "--json"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows_kept"] == 2
    assert (tmp_path / "out.csv").read_bytes().startswith(b"\xef\xbb\xbftext,category")
    done = aisle("clean", tmp_path / "in.csv", "-o", tmp_path / "out.csv", "--encoding", "klingon")
    assert (done.returncode, "unknown encoding" in done.stderr) == (2, True)
    (tmp_path / "in.jsonl").write_text('{"text": "a", "category": "b"}\n')
    done = aisle("clean", tmp_path / "in.jsonl", "-o", tmp_path / "out.csv", "--delimiter", ";")
    assert (done.returncode, "none is read" in done.stderr) == (2, True)
