"""Numbers that are not finite: a diverged model is neither written, loaded, built nor served."""

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from aisle.build import build as build_module
from aisle.build.build import build
from aisle.build.gate import GATES, Gate, HeldOut, accuracy
from aisle.client import Classifier
from aisle.deploy.server.triton import ServerOptions, free_ports, running
from aisle.errors import InputError
from aisle.train.core import checkpoint as checkpoint_module
from aisle.train.core.checkpoint import Checkpoint, write_checkpoint
from aisle.train.core.settings import TrainingSettings
from aisle.train.fit.pretrain import pretrain
from aisle.train.fit.train import train

from .conftest import aisle, series
from .test_train import FRUIT, table


def test_training_that_diverges_stops_and_says_what_to_change(tmp_path: Path) -> None:
    data, out = table(tmp_path / "a.csv", FRUIT), tmp_path / "out"
    with pytest.raises(InputError, match=r"diverged.*lower --learning-rate"):
        train(data, "text", "category", out, TrainingSettings(learning_rate=1e30, epochs=3, batch_size=8))
    assert not out.exists()


def test_pretraining_that_diverges_stops(tmp_path: Path) -> None:
    data = table(tmp_path / "a.csv", FRUIT)
    with pytest.raises(InputError, match="lower --learning-rate"):
        pretrain(
            [data], "text", tmp_path / "out", TrainingSettings(learning_rate=1e30, epochs=3, layers=1, hidden_size=64)
        )
    assert not (tmp_path / "out").exists()


def damaged(checkpoint: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """Return a copy of a checkpoint with other weights."""
    shutil.copytree(checkpoint, folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def diverged(weights: dict[str, torch.Tensor]) -> None:
    weights["bert.encoder.layer.1.output.dense.weight"][3, 5] = torch.nan


def test_weights_that_are_not_finite_are_not_loaded(checkpoint: Path, tmp_path: Path) -> None:
    folder = damaged(checkpoint, tmp_path / "nan", diverged)
    with pytest.raises(InputError, match=r"layer\.1\.output\.dense\.weight is not finite"):
        _ = Checkpoint(folder).model
    data = table(tmp_path / "a.csv", FRUIT)
    for arguments in (
        ["build", folder, "--repository", tmp_path / "repository"],
        ["evaluate", folder, data],
        ["train", "--data", data, "--model", folder, "-o", tmp_path / "out"],
    ):
        done = aisle(*arguments)
        assert done.returncode == 2, done.stderr
        assert "is not finite" in done.stderr
        assert "Traceback" not in done.stderr


def test_weights_that_are_not_finite_are_not_written(checkpoint: Path, tmp_path: Path) -> None:
    model = Checkpoint(checkpoint).model
    model.classifier.bias.data[0] = torch.inf
    with pytest.raises(InputError, match=r"classifier\.bias is not finite"):
        write_checkpoint(tmp_path / "out", model, None, Checkpoint(checkpoint).sample, {}, {}, None)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("gate", [GATES["int8"], Gate(0.5, 0.5)])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_pass_no_gate(gate: Gate, bad: float) -> None:
    expected = np.eye(2, dtype=np.float32)[[0, 1] * 500]
    held_out = HeldOut([[1]] * 1000, ["a", "b"] * 500, ["a", "b"], expected)
    assert gate.passes(accuracy(expected, held_out))
    logits = expected.copy()
    logits[0, 0] = bad
    row = accuracy(logits, held_out)
    assert not gate.passes(row)
    assert row["not_finite"] == 1
    assert "NaN" not in json.dumps(row)
    assert "Infinity" not in json.dumps(row)


@pytest.mark.long
def test_only_the_text_without_finite_logits_is_refused(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The embedding of a word that no held-out text contains is infinite, so the gate cannot see it."""
    model, tokenizer = Checkpoint(checkpoint).model, Checkpoint(checkpoint).tokenizer
    seen = {
        each
        for ids in tokenizer.tokens(
            [*Checkpoint(checkpoint).sample.held_out.texts, *(f"红富士苹果 {number}" for number in range(16))]
        )
        for each in ids
    }
    word = next(
        word
        for word in sorted(tokenizer.entries())
        if len(word) == 1 and not seen & {*tokenizer.tokens([word])[0][1:-1]}
    )
    (bad,) = tokenizer.tokens([word])[0][1:-1]
    model.bert.embeddings.word_embeddings.weight.data[bad] = float("inf")
    spoilt = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, spoilt)
    model.save_pretrained(spoilt)
    for module in (checkpoint_module, build_module):
        monkeypatch.setattr(module, "check_finite", lambda *_: None)
    build(spoilt, tmp_path / "repository", "openvino", "fp32")
    texts = [text for number in range(16) for text in (f"红富士苹果 {number}", f"{word} {number}")]
    grpc, metrics = free_ports(2)
    options = ServerOptions(tmp_path / "repository", grpc_port=grpc, metrics_port=metrics)
    with (
        (tmp_path / "log").open("wb") as log,
        running(options, log),
        Classifier(f"localhost:{grpc}", retries=0) as classifier,
        ThreadPoolExecutor(8) as pool,
    ):
        calls = [pool.submit(classifier.classify, [text], 2) for text in texts]
        answers = [call.exception() or call.result() for call in calls]
        again = [pool.submit(classifier.classify, [text], 2).exception() for text in texts]  # no refusal is cached
        shown = series(f"localhost:{metrics}")
    assert {type(answer) for answer in answers[::2]} == {list}, answers
    assert [str(error) for error in again] == [
        str(answer) if isinstance(answer, Exception) else "None" for answer in answers
    ]
    for answer in answers[1::2]:
        assert isinstance(answer, Exception)
        assert "no finite logits" in str(answer)
    assert all(np.isfinite(value) for value in shown.values())
