"""The best recipe: its steps, a run that is stopped between them, another model, and what it refuses."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from aisle.train.core.checkpoint import Checkpoint
from aisle.train.fit import recipe

from .conftest import aisle

WORDS = {"水果": ("苹果", "香蕉", "葡萄"), "电子": ("耳机", "充电器", "键盘"), "日化": ("洗发水", "牙膏", "香皂")}
SMALL = ("--layers", 1, "--hidden-size", 64, "--epochs", 2, "--learning-rate", 2e-3)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Titles of three categories."""
    rng = random.Random(0)
    rows = [
        f"{rng.choice(words)} {rng.choice(words)} {number},{name}"
        for number in range(120)
        for name, words in WORDS.items()
    ]
    path = tmp_path / "titles.csv"
    path.write_text("\n".join(["text,category", *rows]), "utf-8")
    return path


def read(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def test_a_recipe_stopped_between_steps_resumes_and_leaves_one_checkpoint(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "best"
    monkeypatch.setattr(recipe, "PRETRAINING_EPOCHS", 1)

    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(recipe, "distil", stopped)
        first = aisle("train", table, "-o", out, "--recipe", "best", *SMALL)
    assert first.returncode == 130
    assert "recipe best: 9 epochs in 4 steps (plain: 2); this takes" in first.stderr
    assert "run the same command again to resume" in first.stderr
    assert not out.exists()

    done = aisle("train", table, "-o", out, "--recipe", "best", *SMALL, "--json")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("finished by an earlier run") == 3
    result = json.loads(done.stdout)
    assert result == read(out / "metrics.json")
    assert list(result["steps"]) == ["student"]
    assert result["accuracy"] > 0.9  # the words settle the category
    assert result["parameters"]["student"] == result["parameters"]["teacher"]
    training = read(out / "training.json")
    assert training["recipe"] == "best"
    assert training["settings"]["epochs"] == 4
    assert [each["folder"] for each in training["data"]["teachers"]] == ["pretrained", "scratch"]
    assert Checkpoint(out).labels == sorted(WORDS)
    assert not list(tmp_path.glob(".*"))


def test_another_model_is_fine_tuned_and_distilled_into_itself(table: Path, tmp_path: Path, checkpoint: Path) -> None:
    command = ("train", table, "--recipe", "best", "--model", checkpoint, "--epochs", 1, "--learning-rate", 1e-3)
    done = aisle(*command, "-o", tmp_path / "best", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert list(result["steps"]) == ["pretrained", "student"]
    assert result["parameters"]["student"] == result["parameters"]["teacher"]  # its vocabulary is not pruned
    vocabularies = [set(Checkpoint(each).tokenizer.entries()) for each in (tmp_path / "best", checkpoint)]
    assert vocabularies[0] == vocabularies[1]


@pytest.mark.parametrize(
    "option", [("--multi-label",), ("--contrastive", "brand"), ("--mixup", "1"), ("--folds", "3"), ("--also", "a")]
)
def test_what_a_student_does_not_learn_is_refused(option: tuple[str, ...], table: Path, tmp_path: Path) -> None:
    done = aisle("train", table, "-o", tmp_path / "out", "--recipe", "best", *option)
    assert (done.returncode, done.stderr) == (2, f"aisle: {option[0]}: does not go with --recipe best\n")


def test_an_unknown_recipe_is_refused(table: Path, tmp_path: Path) -> None:
    done = aisle("train", table, "-o", tmp_path / "out", "--recipe", "quick")
    assert (done.returncode, done.stderr) == (2, "aisle: --recipe: there is no 'quick'; choose from plain, best\n")
