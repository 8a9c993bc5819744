"""Missing values: `aisle clean --fill`, from rows of the same product and from the texts."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aisle.preprocess.fill import Filling
from aisle.preprocess.mentions import DISPUTED, MISSING, agreed
from aisle.preprocess.quality import clean_file
from aisle.preprocess.tables.table import Row, read_rows
from aisle.preprocess.tables.writing import write_rows

from .conftest import aisle

BRANDS = ("Bosch", "Best", "华为", "华为智选", "苹果", "Sony")


def shop(brands: dict[str, int] | None = None) -> list[Row]:
    """Titles that start with their brand, each with words of its own."""
    rng = random.Random(0)
    counts = brands or dict.fromkeys(BRANDS, 30)
    rows = [
        {"text": f"{brand} {rng.getrandbits(64):x} {rng.getrandbits(64):x}", "category": "ab"[n % 2], "brand": brand}
        for brand, count in counts.items()
        for n in range(count)
    ]
    rng.shuffle(rows)
    return rows


def ask(text: str, **cells: Any) -> Row:
    return {"text": text, "category": "a", "brand": "", **cells}


def table(path: Path, rows: list[Row]) -> Path:
    write_rows(path, lambda: iter(rows), list(rows[0]))
    return path


def filled(folder: Path, rows: list[Row], by: str | None = None, near: float = 0) -> tuple[dict[str, Row], Any]:
    """Return the cleaned rows by text, and the figures."""
    source, out = table(folder / "in.jsonl", rows), folder / "out.jsonl"
    result = clean_file(source, out, "text", "category", near, filling=Filling(["brand"], by))
    return {row["text"]: row for row in read_rows(out)}, result["fill"]["brand"]


def answer(row: Row) -> tuple[Any, Any]:
    return row["brand"], row["brand_filled"]


def test_values_come_from_equal_products_and_from_texts(tmp_path: Path) -> None:
    ordinary = [
        ask(f"{brand} best price {n} {brand}{n}", brand=brand) for brand in ("Bosch", "Sony") for n in range(20)
    ]
    rows, found = filled(
        tmp_path,
        [
            *shop(),
            *ordinary,
            ask("Kettle, 2 litres"),
            ask("kettle 2 LITRES!", brand="Acme"),
            ask("Toaster", brand="Acme"),
            ask("toaster", brand="Other"),
            ask("lamp"),
            ask("Drill by BOSCH"),
            ask("best drill"),
            ask("boschette"),
            ask("新款华为手机"),
            ask("华为智选台灯"),
            ask("Bosch bag for Sony"),
        ],
    )
    assert answer(rows["Kettle, 2 litres"]) == ("Acme", "product")
    assert answer(rows["Toaster"]) == ("Acme", None)
    assert answer(rows["Drill by BOSCH"]) == ("Bosch", "title")
    assert answer(rows["新款华为手机"]) == ("华为", "title")
    assert answer(rows["华为智选台灯"]) == ("华为智选", "title")
    for empty in ("best drill", "boschette", "lamp", "Bosch bag for Sony"):
        assert answer(rows[empty]) == ("", None)
    assert found["missing"] == 9 - 1
    assert found["filled"] == {"product": 1, "title": 3}
    assert found["disputed"] == {"product": 0, "title": 1}
    used = {each["value"]: each["used"] for each in found["values"]}
    assert used["Bosch"]
    assert not used["Best"]


def test_no_label_changes_and_rows_stay_the_same(tmp_path: Path) -> None:
    rows = [*shop(), ask("Drill by Bosch", id=1)]
    table(tmp_path / "in.csv", rows)
    clean_file(tmp_path / "in.csv", tmp_path / "plain.csv", "text", "category")
    clean_file(tmp_path / "in.csv", tmp_path / "out.csv", "text", "category", filling=Filling(["brand"]))
    plain, out = list(read_rows(tmp_path / "plain.csv")), list(read_rows(tmp_path / "out.csv"))
    assert list(out[0]) == [*plain[0], "brand_filled"]
    for before, after in zip(plain, out, strict=True):
        marked = after.pop("brand_filled") or ""
        assert marked == ("title" if before["text"] == "Drill by Bosch" else "")
        assert after == (before | {"brand": "Bosch"} if marked else before)


def test_a_product_is_named_by_a_column(tmp_path: Path) -> None:
    rows = [
        ask("red kettle", sku="1", brand="Acme"),
        ask("kettle in red", sku=1),
        ask("blue kettle", sku="2", brand="Acme"),
        ask("kettle in blue", sku="2", brand="Other"),
        ask("a blue kettle", sku="2"),
        ask("no number", brand="Acme"),
        ask("none either"),
    ]
    out, found = filled(tmp_path, rows, "sku")
    assert answer(out["kettle in red"]) == ("Acme", "product")
    assert answer(out["a blue kettle"]) == ("", None)
    assert answer(out["none either"]) == ("", None)
    assert found["disputed"]["product"] == 1
    # "red kettle" is the only one of its product; each of the two of product 2 would be filled with the other's value.
    assert found["held_out"]["product"] == {"hidden": 4, "filled": 2, "right": 0, "precision": 0, "at_least": 0}


def test_a_value_is_used_only_if_it_proves_itself(tmp_path: Path) -> None:
    """14 right mentions of 14 are the fewest whose lower bound is over 0.8."""
    rows, found = filled(tmp_path, [*shop({"Few": 13, "Enough": 14, "X": 40}), ask("few"), ask("enough"), ask("x 1")])
    assert [rows[text]["brand"] for text in ("few", "enough", "x 1")] == ["", "Enough", ""]
    figures = {each["value"]: each for each in found["values"]}
    assert figures["Enough"] == {
        "value": "Enough",
        "texts": 14,
        "right": 14,
        "at_least": pytest.approx(0.05 ** (1 / 14)),
        "used": True,
        "mentions": 1,
        "filled": 1,
    }
    assert not figures["Few"]["used"]
    assert "X" not in figures  # one character is not looked for


def test_the_estimate_counts_what_a_hidden_value_would_become(tmp_path: Path) -> None:
    """A brand in texts of other brands: the estimate shows the errors that filling makes."""
    wrong = [ask(f"Sony case {n}", brand=f"maker{n}") for n in range(3)]
    _, found = filled(tmp_path, [*shop({"Sony": 60, "Bosch": 60}), *wrong])
    title = found["held_out"]["title"]
    assert (title["hidden"], title["filled"], title["right"]) == (123, 123, 120)
    assert title["at_least"] < title["precision"] == pytest.approx(120 / 123)


def test_copies_of_one_text_prove_nothing(tmp_path: Path) -> None:
    rows, found = filled(tmp_path, [*[ask("Acme kettle", brand="Acme")] * 50, ask("an acme lamp"), *shop({"Sony": 20})])
    assert answer(rows["an acme lamp"]) == ("", None)
    assert found["values"][0]["texts"] == 1


def test_variants_are_one_value_in_its_most_frequent_spelling(tmp_path: Path) -> None:
    rows = [
        row | {"brand": brand} for brand, row in zip(["BOSCH", "Bosch", "Bosch"] * 10, shop({"bosch": 30}), strict=True)
    ]
    out, _ = filled(tmp_path, [*rows, ask("drill of bosch")])
    assert answer(out["drill of bosch"]) == ("Bosch", "title")


def test_what_the_other_rows_of_a_group_say(rng: random.Random) -> None:
    groups = [rng.randrange(20) for _ in range(60)]
    values = [rng.choice([MISSING, MISSING, 0, 1]) for _ in groups]
    for without_own in (True, False):
        expected = []
        for row, group in enumerate(groups):
            others = {v for i, v in enumerate(values) if groups[i] == group and not (without_own and i == row)} - {
                MISSING
            }
            expected.append(MISSING if not others else DISPUTED if len(others) > 1 else others.pop())
        assert agreed(np.array(values), np.array(groups), without_own).tolist() == expected
    assert agreed(np.array([MISSING, MISSING]), np.array([0, 0]), True).tolist() == [MISSING, MISSING]


def test_parquet_columns_keep_their_types(tmp_path: Path) -> None:
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = ["kettle", "Kettle", "lamp", "toaster"]
    columns = {
        "text": texts,
        "category": ["a"] * 4,
        "volts": pa.array([None, 230, 12, None], pa.int16()),
        "brand": pa.array([None, "Acme", "Other", None]).dictionary_encode(),
        "tags": pa.array([None, ["x"], ["y"], None]),
    }
    parquet.write_table(pa.table(columns), tmp_path / "in.parquet")
    filling = Filling(["volts", "brand", "tags"])
    result = clean_file(tmp_path / "in.parquet", tmp_path / "out.parquet", "text", "category", 0, filling=filling)
    out = parquet.read_table(tmp_path / "out.parquet")
    assert [out.schema.field(name).type for name in columns] == [
        parquet.read_schema(tmp_path / "in.parquet").field(n).type for n in columns
    ]
    assert out.column("volts").to_pylist() == [230, 12, None]
    assert out.column("brand").to_pylist() == ["Acme", "Other", None]
    assert out.column("tags").to_pylist() == [None, ["y"], None]
    assert out.column("brand_filled").to_pylist() == ["product", None, None]
    assert result["fill"]["tags"]["filled"] == {"product": 0, "title": 0}


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--fill", "category"], "--fill category: this is the label, which is never filled"),
        (["--fill", "text"], "--fill text: this is the text"),
        (["--fill", "brand", "--fill", "brand"], "--fill: brand is given twice; give it once"),
        (["--fill", "sku", "--fill-by", "sku"], "--fill sku: this is the column of --fill-by"),
        (["--fill-by", "sku"], "--fill-by sku needs --fill COLUMN"),
        (["--fill", "maker"], "no column 'maker'; it has: text, category, brand, sku, sku_filled; .* or --fill-by"),
        (["--fill", "sku"], "--fill sku adds the column 'sku_filled'; the table has one"),
        (["--fill", "a+b"], r"a column whose name has a \+ inside must be renamed"),
    ],
)
def test_what_cannot_be_filled_is_refused_in_a_line(tmp_path: Path, options: list[str], complaint: str) -> None:
    source = table(tmp_path / "in.csv", [ask("kettle", sku=1, sku_filled="")])
    done = aisle("clean", source, "-o", tmp_path / "out.csv", *options)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("aisle")]
    assert re.search(complaint, line)
    assert [path.name for path in tmp_path.iterdir()] == ["in.csv"]


def test_the_command_says_what_it_filled(tmp_path: Path) -> None:
    source = table(tmp_path / "in.csv", [*shop({"Bosch": 40, "<b>Sony": 40}), ask("drill by bosch"), ask("lamp")])
    done = aisle("clean", source, "-o", tmp_path / "out.csv", "--fill", "brand", "--near", "0", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["fill"]["brand"]
    assert found["filled"] == {"product": 0, "title": 1}
    line = "brand: 2 rows lack a value; filled: 0 from the product (no estimate), 1 from the title"
    assert f"{line} (held out: 80 of 80 right, 100.0%); left empty: 1" in done.stderr
    page = (tmp_path / "out.report.html").read_text()
    assert "Filled values of brand" in page
    assert "<b>Sony" not in page
    assert json.loads((tmp_path / "out.report.json").read_text())["fill"]["brand"] == found


def test_a_column_without_any_value_to_fill_from_is_told(tmp_path: Path) -> None:
    source = table(tmp_path / "in.csv", [ask("kettle", brand=""), ask("lamp", brand=" ")])
    done = aisle("clean", source, "-o", tmp_path / "out.csv", "--fill", "brand", "--near", "0")
    assert done.returncode == 0, done.stderr
    assert "--fill brand: no row has a text or a number there, so nothing is filled" in done.stderr
