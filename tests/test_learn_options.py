"""What `train`, `pretrain`, `distil`, `prune`, `retrain`, `search` and `stages` refuse before they begin."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from aisle.cli import run
from aisle.errors import InputError
from aisle.train.core.resume import check_replaceable

from .conftest import aisle
from .test_train import FRUIT, table


@pytest.mark.parametrize(
    "command",
    [
        ["train", "{data}"],
        ["pretrain", "{data}"],
        ["distil", "{checkpoint}", "--data", "{data}"],
        ["prune", "{checkpoint}", "--data", "{data}"],
        ["retrain", "{checkpoint}", "--data", "{data}", "--corrections", "{data}"],
    ],
)
def test_a_checkpoint_is_replaced_only_with_overwrite(
    command: list[str], checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for mark in ("training.json", "pretraining.json"):
        (out / mark).write_text("hours of work")
    names = {"data": table(tmp_path / "a.csv", FRUIT), "checkpoint": checkpoint}
    assert run([*(argument.format(**names) for argument in command), "-o", str(out)]) == 2
    assert "replace it with --overwrite" in capsys.readouterr().err
    assert (out / "training.json").read_text() == "hours of work"


def test_overwrite_replaces_a_checkpoint_and_nothing_else(tmp_path: Path) -> None:
    data, out = table(tmp_path / "a.csv", FRUIT), tmp_path / "out"
    arguments = ["train", str(data), "-o", str(out), "--layers", "1", "--hidden-size", "64", "--epochs", "1"]
    assert run(arguments) == 0
    before = (out / "training.json").stat().st_mtime_ns
    assert run(arguments) == 2
    assert (out / "training.json").stat().st_mtime_ns == before
    assert run([*arguments, "--overwrite"]) == 0
    assert (out / "training.json").stat().st_mtime_ns > before
    assert {path.name for path in tmp_path.iterdir()} == {"a.csv", "out"}
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="is not a checkpoint"):
        check_replaceable(tmp_path / "thesis", "training.json", overwrite=True)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["train", "{data}", "--augment", "nosuch"], "no 'nosuch'"),
        (["train", "{data}", "--folds", "1"], "two folds or more"),
        (["train", "{data}", "--hidden-size", "100"], "multiple of 64"),
        (["train", "{data}", "--model", "nowhere/at/all"], "there is no such folder"),
        (["pretrain", "{data}", "--model", "nowhere/at/all"], "there is no such folder"),
        (["search", "{data}", "--model", "nowhere/at/all"], "there is no such folder"),
        (["stages", "{data}", "--augment", "nosuch"], "no 'nosuch'"),
        (["distil", "{checkpoint}", "--data", "{data}", "--augment", "nosuch"], "no 'nosuch'"),
        (["distil", "{checkpoint}", "--data", "{data}", "--layers", "9"], "not smaller than its teacher"),
        (["distil", "{checkpoint}", "--data", "{data}", "--hidden-size", "100"], "multiple of 64"),
        (["distil", "{checkpoint}", "nowhere", "--data", "{data}"], "nowhere"),
    ],
)
def test_bad_options_are_refused_before_the_table_is_read(
    arguments: list[str], complaint: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The table lacks the columns, so a command that reads it first would report that instead."""
    names = {"data": table(tmp_path / "a.csv", FRUIT, "title,kind"), "checkpoint": checkpoint}
    assert run([*(each.format(**names) for each in arguments), "-o", str(tmp_path / "out")]) == 2
    assert complaint in capsys.readouterr().err.replace("\n", " ")


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of a hub that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@pytest.mark.long
def test_a_hub_that_does_not_answer_is_one_line(silent: str, tmp_path: Path) -> None:
    environment = {"HF_ENDPOINT": silent, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0"}
    data = table(tmp_path / "a.csv", FRUIT, "title,kind")
    done = aisle("train", data, "--model", "bert-base-chinese", "-o", tmp_path / "out", env=environment)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert silent in done.stderr
    assert "HF_HUB_OFFLINE=1" in done.stderr
    assert "local folder" in done.stderr


@pytest.mark.parametrize("labels", [("水果", "配件"), ("商品 > 水果", "商品 > 配件"), ("水果 > 苹果", "配件 > 手机壳")])
def test_a_level_weight_needs_levels(
    labels: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [(text, labels[label == "配件"]) for text, label in FRUIT]
    data, out = table(tmp_path / "a.csv", rows), tmp_path / "out"
    assert run(["train", str(data), "-o", str(out), "--level-weight", "0.5"]) == 2
    assert "--level-weight: no level groups these categories" in " ".join(capsys.readouterr().err.split())
    assert not out.exists()
