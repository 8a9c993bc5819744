"""Several columns as one text: in tables, in training, through the server, and in the client."""

from __future__ import annotations

import asyncio
import csv
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aisle.build.build import build
from aisle.client import AsyncClassifier, Classifier, Failure, InvalidText, TrafficLog
from aisle.preprocess.clean import prepare
from aisle.preprocess.fields import columns_of, from_json, join, to_json
from aisle.preprocess.tables.table import read_labelled
from aisle.preprocess.values import TextError
from aisle.train.core.checkpoint import Checkpoint

from .conftest import Server, aisle, held_server

BRANDS = {"Kitchen": ("acme", "globex"), "Garden": ("initech", "umbrella"), "Office": ("hooli", "stark")}


def test_fields_become_one_text() -> None:
    fields = {"title": "红富士<b>苹果</b>  5斤", "品牌": "佳沃 | 佳", "产地": None, "weight": 5.0, "note": float("nan")}
    text = join(fields)
    assert text == "红富士 苹果 5斤 | 品牌: 佳沃 / 佳 | weight: 5"
    assert prepare(text) == text
    assert join({"title": None, "brand": "acme"}) == "| brand: acme"
    assert join({"title": " ", "brand": ""}) is None
    assert join({"title": "only a title", "brand": None}) == "only a title"


def test_a_server_reads_what_training_joins() -> None:
    fields = {"title": "red &amp; blue kettle", "brand": "acme\x1f", "code": 12, "colour": None}
    shuffled = dict(reversed(fields.items()))
    assert from_json(to_json(shuffled), list(fields)) == join(fields)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b'{"title": "a", "brnd": "b"}', "has the field 'brnd'; the model reads title, brand"),
        (b'{"title": ["a"]}', "the field 'title', which is a list"),
        (b'{"title"', "not a JSON object of fields"),
        (b"[" * 100_000, "not a JSON object of fields"),
    ],
)
def test_other_objects_are_refused(raw: bytes, message: str) -> None:
    with pytest.raises(TextError, match=message):
        from_json(raw, ["title", "brand"])


def test_names_of_columns() -> None:
    assert columns_of("title") == ["title"]
    assert columns_of("title+brand") == ["title", "brand"]
    assert columns_of("c++") == ["c++"]


def products(path: Path, rows: int = 260, seed: int = 0) -> Path:
    """Write products whose brand alone tells the category; a tenth of them lack the brand."""
    rng = random.Random(seed)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["title", "brand", "category"])
        for number in range(rows):
            category = rng.choice(list(BRANDS))
            brand = "" if number % 10 == 0 else rng.choice(BRANDS[category])
            writer.writerow([f"item {rng.choice(['red', 'blue', 'new'])} no {number}", brand, category])
    return path


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return products(tmp_path_factory.mktemp("fields") / "products.csv")


TRAINING = (
    *("--layers", "1", "--hidden-size", "64", "--max-tokens", "24"),
    *("--epochs", "12", "--patience", "12", "--learning-rate", "3e-3", "--batch-size", "16"),
)


@pytest.fixture(scope="module")
def trained(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("fields") / "checkpoint"
    columns = ("--text-column", "title", "--text-column", "brand")
    assert aisle("train", table, *columns, "-o", out, *TRAINING).returncode == 0
    return out


def test_training_reads_all_columns(table: Path, trained: Path) -> None:
    checkpoint = Checkpoint(trained)
    assert checkpoint.fields == ["title", "brand"]
    assert json.loads((trained / "metrics.json").read_text("utf-8"))["accuracy"] > 0.75
    rows = dict(read_labelled(table, "title+brand", "category"))
    assert {prepare(text) for text in rows} >= {*checkpoint.sample.held_out.texts}
    assert any(" | brand: " in text for text in rows)


@pytest.mark.parametrize("command", ["evaluate", "decide", "build"])
def test_a_checkpoint_is_used_with_its_own_columns(command: str, table: Path, trained: Path, tmp_path: Path) -> None:
    arguments = {
        "evaluate": [str(trained), str(table), "--text-column", "title"],
        "decide": [str(trained), str(table), "--text-column", "title+category", "--label-column", "brand"],
        "build": [str(trained), str(table), "--text-column", "brand", "--repository", str(tmp_path / "repository")],
    }
    done = aisle(command, *arguments[command])
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith(
        "was trained on other columns; give --text-column title --text-column brand"
    )


def test_a_checkpoint_of_one_column_takes_one(checkpoint: Path, table: Path) -> None:
    done = aisle("evaluate", checkpoint, table, "--text-column", "title+brand")
    assert done.returncode == 2
    assert "was trained on other columns; give one --text-column" in done.stderr


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (["--text-column", "title", "--text-column", "brnd"], "no column 'brnd'; it has: title, brand, category"),
        (["--text-column", "title", "--text-column", "title"], "title is given twice"),
        (["--text-column", "title+category"], "are both 'category'"),
        (["--text-column", "title++brand"], "a name is missing beside a '+'"),
    ],
)
def test_bad_columns_are_refused(columns: list[str], message: str, table: Path, tmp_path: Path) -> None:
    done = aisle("train", table, *columns, "-o", tmp_path / "ckpt")
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.fixture(scope="module")
def fields_server(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("fields-server")
    build(trained, folder / "repository", "openvino", "fp32")
    with held_server(folder / "repository", trained, folder) as each:
        yield each


def test_the_client_sends_fields(fields_server: Server, trained: Path, tmp_path: Path) -> None:
    rows = [{"brand": "acme", "title": "item red"}, {"title": "item red", "brand": "hooli"}, {"brand": "initech"}]
    with TrafficLog(tmp_path / "log.jsonl", keep_text=True) as log, Classifier(fields_server.url, log=log) as client:
        found = client.classify(rows)
        joined = client.classify([join({"title": row.get("title"), "brand": row["brand"]}) or "" for row in rows])
        assert [each.category for each in found] == ["Kitchen", "Office", "Garden"]
        assert [each.confidences for each in found] == [each.confidences for each in joined]
        assert client.embed(rows).shape == (3, 64)
        assert client.classify([{"title": "item red", "brand": None}, "item red"])[0].confidences == pytest.approx(
            client.classify(["item red"])[0].confidences, abs=1e-3
        )

    async def ask() -> str:
        async with AsyncClassifier(fields_server.url) as other:
            return (await other.classify(rows[:1]))[0].category

    assert asyncio.run(ask()) == "Kitchen"
    logged = [json.loads(line).get("text") for line in (tmp_path / "log.jsonl").open(encoding="utf-8")]
    assert logged[1] == "item red | brand: hooli"


def test_a_bad_product_is_named_and_spoils_no_other(fields_server: Server) -> None:
    rows: list[Any] = [{"title": "a"}, {"title": "b", "brnd": "acme"}, {}, {"title": ["b"]}, {"brand": "acme"}]
    with Classifier(fields_server.url) as client:
        with pytest.raises(InvalidText, match="row 1: text has the field 'brnd'; the model reads title, brand") as bad:
            client.classify(rows[:2])
        assert bad.value.row == 1
        answers = [*client.stream(rows)]
    assert [isinstance(each, Failure) for each in answers] == [False, True, True, True, False]
    assert "the field 'brnd'" in str(answers[1])
    assert "missing" in str(answers[2])
    assert "the field 'title', which is a list" in str(answers[3])
    with Classifier(fields_server.url) as client, pytest.raises(InvalidText, match="row 70: text has the field") as bad:
        client.classify([{"title": "a"}] * 70 + [{"title": {"n": 1}}])
    assert bad.value.row == 70


def test_a_model_of_one_text_refuses_products(server: Server) -> None:
    with Classifier(server.url, timeout=60) as client:
        good, bad = client.stream(["usb c cable", {"title": "usb c cable"}])
        assert not isinstance(good, Failure)
        assert isinstance(bad, Failure)
        assert "the model reads one text; send a string" in bad.message
        assert client.classify(['{"title": "is a text"}'])


def test_files_are_classified_and_embedded_by_their_columns(fields_server: Server, table: Path, tmp_path: Path) -> None:
    columns = ("--text-column", "title", "--text-column", "brand", "--url", fields_server.url)
    assert aisle("classify", table, "-o", tmp_path / "out.csv", *columns).returncode == 0
    with (tmp_path / "out.csv").open(encoding="utf-8") as file:
        rows = [*csv.DictReader(file)]
    assert {*rows[0]} >= {"title", "brand", "source_category", "category", "error"}
    branded = [row for row in rows if row["brand"]]
    assert sum(row["category"] == row["source_category"] for row in branded) > 0.95 * len(branded)
    done = aisle("embed", table, "-o", tmp_path / "out.npy", *columns, "--json")
    assert json.loads(done.stdout)["errors"] == 0
    for command in ("classify", "embed", "review"):
        for names in ("title", "brand", "title+category"):
            out = tmp_path / ("wrong.npy" if command == "embed" else "wrong.csv")
            wrong = aisle(command, table, "-o", out, "--text-column", names, *columns[4:])
            assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)
            assert "reads title, brand; give --text-column title --text-column brand" in wrong.stderr
            assert not out.exists()
    plain = tmp_path / "plain.csv"
    plain.write_text("text\nitem red | brand: acme\n", "utf-8")
    assert aisle("classify", plain, "-o", tmp_path / "plain-out.csv", *columns[4:]).returncode == 0
    measured = aisle("evaluate", table, *columns, "--json")
    assert json.loads(measured.stdout)["accuracy"] > 0.8
    listed = aisle("review", table, "-o", tmp_path / "label.csv", *columns, "--rows", "5")
    assert listed.returncode == 0
    assert " | brand: " in (tmp_path / "label.csv").read_text("utf-8")


def test_columns_without_names_are_numbered(trained: Path, table: Path, tmp_path: Path) -> None:
    body = table.read_text("utf-8").split("\n", 1)[1]
    (tmp_path / "bare.csv").write_text(body, "utf-8")
    out = tmp_path / "checkpoint"
    columns = ("--no-header", "--text-column", "1", "--text-column", "2", "--label-column", "3")
    done = aisle("train", tmp_path / "bare.csv", *columns, "-o", out, *TRAINING[:6], "--epochs", "1")
    assert done.returncode == 0, done.stderr
    assert Checkpoint(out).fields == ["text", "category"]
