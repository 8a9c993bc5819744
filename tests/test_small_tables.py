"""Small tables: a model trained on a few dozen rows can be built, served and checked for drift."""

import json
from pathlib import Path

import pytest

from aisle.build.build import build
from aisle.preprocess.clean import clean_rows
from aisle.train.adapt.drift import drift
from aisle.train.core.sample import LEAST, draw, topped_up, warn_of_few
from aisle.train.core.settings import TrainingSettings
from aisle.train.core.split import split
from aisle.train.fit.train import train

from .test_train import FRUIT, table


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    settings = TrainingSettings(epochs=8, batch_size=8, layers=1, hidden_size=64)
    train(table(folder / "a.csv", FRUIT), "text", "category", folder / "checkpoint", settings)
    return folder / "checkpoint"


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_small_table_is_built_with_a_note_on_its_measurements(
    small: Path, tmp_path: Path, precision: str, capsys: pytest.CaptureFixture[str]
) -> None:
    held_out = sum(json.loads(line)["part"] == "held_out" for line in (small / "sample.jsonl").open(encoding="utf-8"))
    assert held_out < LEAST
    row = build(small, tmp_path / "repository", "openvino", precision)
    assert row["version"] == 1
    assert row["held_out_texts"] == LEAST
    assert row["seen_in_training"] == LEAST - held_out
    assert f"on {LEAST - held_out} that training saw" in capsys.readouterr().err.replace("\n", " ")


def test_drift_with_a_small_table(small: Path, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    answers = [{"category": "配件" if i % 20 else "水果", "confidence": 0.6, "length": 9} for i in range(600)]
    log.write_text("".join(json.dumps(each) + "\n" for each in answers))
    result = drift(small, log)
    assert result["retrain"]
    assert result["reference_rows"] < LEAST


def test_training_warns_of_too_few_rows(capsys: pytest.CaptureFixture[str]) -> None:
    def parts(rows: int) -> str:
        found, _ = clean_rows(FRUIT[: rows // 2] + FRUIT[-rows // 2 :])
        warn_of_few(split(found))
        return " ".join(capsys.readouterr().err.split())

    assert "too few to build an engine" in parts(20)
    assert "texts that training saw" in parts(80)


def test_small_parts_are_filled_from_the_others() -> None:
    sample = draw(split(clean_rows(FRUIT)[0]))
    full = topped_up(sample)
    assert len(full.validation.texts) == len(full.held_out.texts) == LEAST
    assert full.held_out.texts[: len(sample.held_out.texts)] == sample.held_out.texts
    assert len(set(full.held_out.texts)) == LEAST
    assert full.train == sample.train
