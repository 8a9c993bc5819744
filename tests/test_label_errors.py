"""Label errors: `aisle clean --label-errors`, and the ways from its table to corrections."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from aisle.preprocess.labels import SEPARATOR
from aisle.preprocess.tables.table import Row, read_labelled, read_rows
from aisle.preprocess.tables.writing import write_rows
from aisle.train.adapt import label_errors
from aisle.train.adapt.label_errors import COLUMNS
from aisle.train.adapt.retrain import read_corrections
from aisle.train.core import linear

from .conftest import aisle
from .desk import desk_client

WORDS = {
    "食品 > 水果": ("苹果", "香蕉", "红富士", "脆甜"),
    "食品 > 蔬菜": ("白菜", "萝卜", "土豆", "新鲜"),
    "数码 > 配件": ("手机壳", "防摔", "耳机", "数据线"),
    "数码 > 电脑": ("笔记本", "键盘", "显示器", "内存"),
}
DEPARTMENT, LEAF = 8, 8  # planted errors of each kind


def shop(rows: int, seed: int = 0) -> list[Row]:
    """Titles with words of their category."""
    rng = random.Random(seed)
    made = []
    for _ in range(rows):
        label = rng.choice(list(WORDS))
        made.append(
            {"text": " ".join([*rng.choices(WORDS[label], k=4), f"{rng.getrandbits(64):x}"]), "category": label}
        )
    return made


def plant(rows: list[Row]) -> dict[int, str]:
    """Give some rows another department's label and others another leaf's. Return row number -> right label."""
    right = {}
    for number in range(10, 10 * (DEPARTMENT + LEAF) + 1, 10):
        row = rows[number - 1]
        label = right[number] = row["category"]
        department = label.split(SEPARATOR)[0]
        same = [other for other in WORDS if other.startswith(department)]
        far = [other for other in WORDS if not other.startswith(department)]
        row["category"] = far[number % 2] if number <= 10 * DEPARTMENT else next(o for o in same if o != label)
    return right


def write(path: Path, rows: list[Row]) -> Path:
    write_rows(path, lambda: iter(rows), list(rows[0]))
    return path


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A table with planted errors, cleaned with and without a search for them."""
    folder = tmp_path_factory.mktemp("planted")
    rows = [*shop(400), {"text": "独一无二 的 书", "category": "书"}, {"text": "<br>", "category": "书"}]
    right = plant(rows)
    data = write(folder / "data.csv", rows)
    plain = aisle("clean", data, "-o", folder / "plain.csv", "--json")
    done = aisle("clean", data, "-o", folder / "clean.csv", "--label-errors", folder / "suspects.csv", "--json")
    assert (plain.returncode, done.returncode) == (0, 0), done.stderr
    return {"folder": folder, "data": data, "right": right, "plain": json.loads(plain.stdout), "done": done}


def test_planted_errors_are_found_with_the_right_label_and_departments_come_first(planted: dict[str, Any]) -> None:
    suspects = list(read_rows(planted["folder"] / "suspects.csv"))
    assert list(suspects[0]) == COLUMNS
    right = planted["right"]
    found = {int(row["row"]): row for row in suspects}
    assert len(found.keys() & right.keys()) >= 15
    assert len(found.keys() - right.keys()) <= 3
    for number in found.keys() & right.keys():
        assert found[number]["category_2"] == right[number]
        assert found[number]["level"] == ("1" if number <= 10 * DEPARTMENT else "2")
        assert float(found[number]["confidence"]) < float(found[number]["confidence_2"])
    levels = [row["level"] for row in suspects]
    assert levels == sorted(levels)
    source = list(read_rows(planted["data"]))
    for row in suspects:
        there = source[int(row["row"]) - 1]
        assert (row["text"], row["category"], row["correct_category"]) == (there["text"], there["category"], "")


def test_the_clean_table_and_its_figures_stay_the_same(planted: dict[str, Any]) -> None:
    folder, result, plain = planted["folder"], json.loads(planted["done"].stdout), planted["plain"]
    assert (folder / "clean.csv").read_bytes() == (folder / "plain.csv").read_bytes()
    figures = result.pop("label_errors")
    named = ("output", "report")
    assert {**result, **dict.fromkeys(named)} == {**plain, **dict.fromkeys(named)}
    suspects = list(read_rows(folder / "suspects.csv"))
    assert (figures["rows_judged"], figures["rows_alone"]) == (400, 1)
    assert figures["suspects"] == len(suspects)
    assert figures["by_level"] == {level: sum(row["level"] == level for row in suspects) for level in ("1", "2")}
    assert figures["wrong"] == pytest.approx(16 / 400, abs=0.02)
    assert figures["reachable"] == 1 - figures["wrong"]
    assert "1 labels cannot be judged" in planted["done"].stderr
    page = (folder / "clean.report.html").read_text("utf-8")
    assert "Suspected labels" in page
    assert suspects[0]["text"] in page
    assert "Suspected labels" not in (folder / "plain.report.html").read_text("utf-8")


def test_retraining_reads_the_table_that_people_filled_in(planted: dict[str, Any], tmp_path: Path) -> None:
    rows = list(read_rows(planted["folder"] / "suspects.csv"))
    for row in rows[:5]:
        row["correct_category"] = row["category_2"]
    filled = read_corrections([write(tmp_path / "filled.csv", rows)])
    assert (len(filled.by_content), filled.blank) == (5, len(rows) - 5)
    corrected = dict(filled.apply(read_labelled(planted["data"], "text", "category")))
    assert len(filled.used) == 5  # all are texts of the table, so none is added
    assert [corrected[row["text"]] for row in rows[:5]] == [row["category_2"] for row in rows[:5]]


def test_the_desk_reviews_the_table_in_its_order(planted: dict[str, Any], tmp_path: Path) -> None:
    suspects = list(read_rows(planted["folder"] / "suspects.csv"))
    with desk_client(tmp_path / "desk") as client:
        address = client.act("/files?name=suspects.csv", (planted["folder"] / "suspects.csv").read_bytes())
        address = address.headers["hx-redirect"]
        assert "Review these texts" in client.get(address).text
        assert client.act(f"{address}/review").headers["hx-redirect"] == "/review"
        client.act(f"{address}/review")  # a second press adds nothing
        with client.desk.store.read() as db:
            queued = [row["text"] for row in db.execute("SELECT text FROM items ORDER BY margin, id")]
        assert queued == [row["text"] for row in suspects]
        page = client.get("/review").text
        first = suspects[0]
        assert first["text"] in page
        assert f"Model: {first['category_2'].replace('>', '&gt;')}" in page
        for key, name in (("1", first["category"]), ("2", first["category_2"])):
            assert f'value="{name.replace(">", "&gt;")}" data-key="{key}"' in page


def test_the_desk_reviews_no_other_table(tmp_path: Path) -> None:
    with desk_client(tmp_path / "desk") as client:
        address = client.act("/files?name=a.csv", b"text,category\nx,y\n").headers["hx-redirect"]
        assert "Review these texts" not in client.get(address).text
        assert "no table to label" in client.act(f"{address}/review").text
        bad = b"text,category,confidence,correct_category\nx,y,high,\n"
        address = client.act("/files?name=b.csv", bad).headers["hx-redirect"]
        answer = client.act(f"{address}/review")
        assert (answer.status_code, "b.csv, row 1: a confidence is not a number" in answer.text) == (422, True)


def test_review_writes_the_suspects_for_a_labelling_tool(planted: dict[str, Any], tmp_path: Path) -> None:
    tasks = tmp_path / "tasks.json"
    done = aisle("review", planted["folder"] / "suspects.csv", "-o", tasks, "--tool", "label-studio", "--rows", "5")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(tasks.read_text("utf-8"))) == 5


def test_small_parts_give_the_same_suspects(
    planted: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a large table, probabilities are computed in parts, and the first part sets the temperature."""
    monkeypatch.setattr(linear, "CELLS", 4 * 50)
    monkeypatch.setattr(label_errors, "CELLS", 4 * 50)
    out = tmp_path / "suspects.jsonl"
    done = aisle("clean", planted["data"], "-o", tmp_path / "clean.csv", "--label-errors", out)
    assert done.returncode == 0, done.stderr
    whole = {row["text"] for row in read_rows(planted["folder"] / "suspects.csv")}
    assert len(whole ^ {row["text"] for row in read_rows(out)}) <= 2


def test_a_table_without_suspects(tmp_path: Path) -> None:
    data = write(tmp_path / "data.csv", shop(200))
    done = aisle("clean", data, "-o", tmp_path / "clean.csv", "--label-errors", tmp_path / "suspects.csv")
    assert (done.returncode, "none of 200 labels is suspected" in done.stderr) == (0, True)
    assert (tmp_path / "suspects.csv").read_text("utf-8").strip() == ",".join(COLUMNS)
    assert "Suspected labels" in (tmp_path / "clean.report.html").read_text("utf-8")


def test_flat_labels_and_standard_output(tmp_path: Path) -> None:
    rows = shop(200)
    right = plant(rows)
    rows = [{**row, "category": row["category"].split(SEPARATOR)[1]} for row in rows]
    data = write(tmp_path / "data.csv", rows)
    done = aisle("clean", data, "-o", tmp_path / "clean.csv", "--label-errors", "-")
    assert done.returncode == 0, done.stderr
    header, *found = done.stdout.splitlines()
    assert header == ",".join(COLUMNS)
    assert len({int(line.partition(",")[0]) for line in found} & right.keys()) >= 14
    assert all(line.endswith(",1,") for line in found)


def pairs(texts: list[str], labels: Sequence[str]) -> list[Row]:
    return [{"text": text, "category": label} for text, label in zip(texts, labels, strict=True)]


CABLES = [f"usb cable number {n}" for n in range(4)]


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        (pairs(CABLES, "aaaa"), "and the table has 1; add rows"),
        (pairs(CABLES, "abcd"), "and the table has 0; add rows"),
        (pairs(CABLES, "aabc"), "and the table has 1; add rows"),
        (pairs(list("ßöüäéè"), "aaabbb"), "6 texts are too few to judge"),
        (pairs(CABLES, ["a", "b", "a|b", "a"]), "judges one category per text, but 'a|b' is several"),
    ],
)
def test_tables_that_cannot_be_judged_are_refused_in_one_line(tmp_path: Path, rows: list[Row], told: str) -> None:
    data = write(tmp_path / "data.csv", rows)
    done = aisle("clean", data, "-o", tmp_path / "clean.csv", "--near", 0, "--label-errors", tmp_path / "suspects.csv")
    assert done.returncode == 2
    assert told in done.stderr.splitlines()[-1]
    assert {path.name for path in tmp_path.iterdir()} == {"data.csv"}


def test_a_table_of_four_rows_can_be_judged(tmp_path: Path) -> None:
    data = write(tmp_path / "data.csv", pairs(CABLES, ["home | garden", "b"] * 2))  # a category may contain a |
    done = aisle("clean", data, "-o", tmp_path / "clean.csv", "--near", 0, "--label-errors", tmp_path / "suspects.csv")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("out", "suspects", "options", "told"),
    [
        ("clean.csv", "data.csv", [], "is the input"),
        ("clean.csv", "clean.csv", [], "would both write"),
        ("-", "-", [], "would both write"),
        ("clean.csv", "-", ["--json"], "standard output"),
        ("clean.csv", "suspects.exe", [], "unknown file format"),
        ("clean.csv", ".", [], "it is a folder"),
    ],
)
def test_bad_outputs_are_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str, suspects: str, options: list[str], told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("data.csv"), shop(20))
    done = aisle("clean", "data.csv", "-o", out, "--label-errors", suspects, *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert told in done.stderr.splitlines()[-1]
    assert {path.name for path in tmp_path.iterdir()} == {"data.csv"}


def test_a_missing_extra_is_named_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write(tmp_path / "data.csv", shop(20))
    monkeypatch.delitem(sys.modules, "aisle.train.adapt.label_errors")
    for name in [each for each in sys.modules if each.partition(".")[0] == "cleanlab"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cleanlab", None)
    done = aisle("clean", data, "-o", tmp_path / "clean.csv", "--label-errors", tmp_path / "suspects.csv")
    assert done.returncode == 2
    assert "[labels]" in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"data.csv"}
