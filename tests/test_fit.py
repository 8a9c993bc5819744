import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import BertConfig, BertForSequenceClassification

from aisle.errors import InputError
from aisle.train.core.checkpoint import Checkpoint
from aisle.train.core.processes import processes
from aisle.train.core.resume import STATE, load_state, save_state, working_folder
from aisle.train.core.settings import TrainingSettings
from aisle.train.fit.loop import Hooks, Scalars, fit, parameter_groups
from aisle.train.fit.loss import Loss, ancestors, class_weights
from aisle.train.fit.train import train

from .conftest import wait_for
from .test_train import FRUIT, table

CPU = torch.device("cpu")


@pytest.fixture
def fruit(tmp_path: Path) -> Path:
    return table(tmp_path / "fruit.csv", FRUIT)


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = Checkpoint(checkpoint).model.state_dict()
    return state


@pytest.mark.long
def test_a_stopped_and_killed_run_resumes_and_ends_with_the_same_weights(
    fruit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, state = tmp_path / "killed", tmp_path / ".killed.partial" / STATE
    command = [sys.executable, "-m", "aisle", "train", str(fruit), "-o", str(out)]
    command += ["--epochs", "4", "--batch-size", "4", "--save-every", "4"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as stopped:
        wait_for(state.exists)
        stopped.send_signal(signal.SIGINT)  # Ctrl-C
        said = stopped.communicate()[1]
    assert stopped.returncode == 130
    assert said.splitlines()[-1] == "aisle: stopped; run the same command again to resume"

    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as killed:
        assert killed.stderr is not None
        assert any("resuming after step" in line for line in killed.stderr)
        killed.kill()
    left = load_state(state)
    assert left is not None
    step = left["step"]
    assert step % 4 == 0
    assert len(left["history"]) < 4
    assert not out.exists()

    settings = TrainingSettings(epochs=4, batch_size=4)
    capsys.readouterr()
    train(fruit, "text", "category", out, settings, save_every=4)
    assert f"resuming after step {step}" in capsys.readouterr().err
    assert not state.parent.exists()
    train(fruit, "text", "category", tmp_path / "unbroken", settings)
    resumed, unbroken = weights(out), weights(tmp_path / "unbroken")
    assert all(torch.equal(resumed[name], unbroken[name]) for name in unbroken)


def _interrupted(out: Path, identity: dict[str, Any]) -> None:
    with contextlib.suppress(KeyboardInterrupt), working_folder(out, identity) as folder:
        save_state(folder / STATE, {"step": 7})
        raise KeyboardInterrupt


def test_a_state_with_other_settings_is_not_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    _interrupted(out, {"epochs": 2, "augment": ()})
    with working_folder(out, {"epochs": 2, "augment": ()}) as folder:
        assert load_state(folder / STATE) == {"step": 7}
        save_state(folder / STATE, {"step": 8})
        with pytest.raises(InputError, match="another run"), working_folder(out, {"epochs": 2}):
            pass
        (tmp_path / "copy").write_bytes((folder / STATE).read_bytes()[:-9])
    assert not folder.exists()
    assert load_state(tmp_path / "copy") is None
    assert "cannot be read" in capsys.readouterr().err

    _interrupted(out, {"epochs": 2})
    with working_folder(out, {"epochs": 3}) as folder:
        assert load_state(folder / STATE) is None
    assert "differs in epochs" in capsys.readouterr().err


@pytest.mark.long
def test_two_processes_train_like_one(fruit: Path, tmp_path: Path) -> None:
    arguments = ["--data", str(fruit), "--epochs", "3", "--batch-size", "7", "--dropout", "0", "--json"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    done = subprocess.run(
        [*torchrun, "aisle", "train", *arguments, "-o", str(tmp_path / "two")],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"]["train"] > 40  # printed once
    assert done.stderr.count("epoch 3: ") == 1
    train(fruit, "text", "category", tmp_path / "one", TrainingSettings(epochs=3, batch_size=7, dropout=0.0))
    two, one = (json.loads((tmp_path / name / "training.json").read_text()) for name in ("two", "one"))
    assert (two["processes"], one["processes"]) == (2, 1)
    for ours, theirs in zip(two["epochs"], one["epochs"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.05, abs=0.01)


def test_accumulation_does_not_change_the_result(fruit: Path, tmp_path: Path) -> None:
    for parts in (1, 3):
        settings = TrainingSettings(epochs=2, batch_size=16, dropout=0.0, accumulate=parts)
        train(fruit, "text", "category", tmp_path / str(parts), settings)
    whole, split = (json.loads((tmp_path / name / "training.json").read_text())["epochs"] for name in "13")
    for ours, theirs in zip(split, whole, strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=0.02)


def tiny(labels: int = 2) -> Any:
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=16,
            num_labels=labels,
        )
    )


class Scripted:
    """A task whose validation scores are known beforehand."""

    def __init__(self, scores: Sequence[float]) -> None:
        self.scores: Iterator[float] = iter(scores)
        self.seen: list[torch.Tensor] = []

    def epoch(self, number: int) -> list[list[int]]:
        return [[1, 2, 3], [4, 5]]

    def loss(self, model: Any, rows: Sequence[int]) -> torch.Tensor:
        logits = model(input_ids=torch.tensor(rows)[:, None]).logits
        return F.cross_entropy(logits.float(), torch.tensor(rows) % 2, reduction="sum")

    def validate(self, model: Any) -> Scalars:
        self.seen.append(model.classifier.weight.detach().clone())
        return {"score": next(self.scores), "loss": 1.0}


def test_training_stops_early_and_keeps_its_best_epoch() -> None:
    model, task = tiny(), Scripted([0.5, 0.7, 0.6, 0.7, 0.9])
    with processes() as world:
        history = fit(model, task, TrainingSettings(epochs=5, patience=2), world, Hooks())
    assert [scalars["score"] for scalars in history] == [0.5, 0.7, 0.6, 0.7]
    assert torch.equal(model.classifier.weight, task.seen[1])
    assert not torch.equal(task.seen[1], task.seen[3])


def test_metrics_are_written_to_tensorboard(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with processes() as world:
        fit(tiny(), Scripted([0.5, 0.7]), TrainingSettings(epochs=2), world, Hooks(log_dir=tmp_path))
    events = event_accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4]
    assert [event.value for event in events.Scalars("epoch/score")] == pytest.approx([0.5, 0.7])


def test_lower_layers_learn_slower() -> None:
    model = tiny()
    rates: dict[int, tuple[float, float]] = {}
    for group in parameter_groups(model, TrainingSettings("some-bert", learning_rate=1.0, layer_decay=0.5)):
        rates |= {id(parameter): (group["lr"], group["weight_decay"]) for parameter in group["params"]}
    assert len(rates) == len(list(model.parameters()))
    assert rates[id(model.classifier.weight)] == (1.0, 0.01)
    assert rates[id(model.classifier.bias)] == (1.0, 0.0)
    assert rates[id(model.bert.pooler.dense.weight)] == (1.0, 0.01)
    assert rates[id(model.bert.encoder.layer[1].output.dense.weight)] == (0.5, 0.01)
    assert rates[id(model.bert.encoder.layer[0].output.dense.bias)] == (0.25, 0.0)
    assert rates[id(model.bert.embeddings.word_embeddings.weight)] == (0.125, 0.01)


LABELS = ["衣 > 裤", "衣 > 裙", "食 > 果 > 梨", "书"]
TARGETS = torch.tensor([0, 0, 0, 0, 1, 1, 2, 3])


def test_plain_and_smoothed_loss_are_torchs_own() -> None:
    logits = torch.randn(8, 4)
    plain = Loss(LABELS, TARGETS, TrainingSettings(), CPU)
    smoothed = Loss(LABELS, TARGETS, TrainingSettings(label_smoothing=0.2), CPU)
    assert torch.allclose(plain(logits, TARGETS).mean(), F.cross_entropy(logits, TARGETS))
    assert torch.allclose(smoothed(logits, TARGETS).mean(), F.cross_entropy(logits, TARGETS, label_smoothing=0.2))


def test_class_weights_even_out_the_categories() -> None:
    full = class_weights(TARGETS, 4, 1.0)
    assert full[TARGETS].mean() == pytest.approx(1)
    assert (full * TARGETS.bincount()).tolist() == pytest.approx([2, 2, 2, 2])
    assert class_weights(TARGETS, 4, 0.0).tolist() == [1, 1, 1, 1]
    assert torch.isfinite(class_weights(TARGETS, 5, 1.0)).all()  # one that occurs nowhere


def test_focal_loss_weights_easy_texts_less() -> None:
    logits = torch.tensor([[3.0, 0, 0, 0], [0, 0, 3, 0]], requires_grad=True)
    targets = torch.tensor([0, 0])
    plain = Loss(LABELS, TARGETS, TrainingSettings(), CPU)(logits, targets)
    focal = Loss(LABELS, TARGETS, TrainingSettings(focal=2.0), CPU)(logits, targets)
    right = logits.softmax(dim=1)[:, 0]
    assert torch.allclose(focal, plain * (1 - right) ** 2)
    torch.autograd.backward(Loss(LABELS, TARGETS, TrainingSettings(focal=0.5), CPU)(logits * 100, targets).sum())
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


def test_the_loss_at_a_level_is_that_of_the_parents() -> None:
    assert [level.tolist() for level in ancestors(LABELS)] == [[0, 0, 1, 2], [0, 1, 2, 3]]
    assert ancestors(["a", "b"]) == []
    logits, target = torch.randn(1, 4), torch.tensor([0])
    probabilities = logits.softmax(dim=1)[0]
    expected = -probabilities[0].log() - 0.5 * ((probabilities[0] + probabilities[1]).log() + probabilities[0].log())
    assert torch.allclose(Loss(LABELS, TARGETS, TrainingSettings(level_weight=0.5), CPU)(logits, target)[0], expected)


def test_mixup_learns(fruit: Path, tmp_path: Path) -> None:
    metrics = train(fruit, "text", "category", tmp_path / "out", TrainingSettings(epochs=6, batch_size=8, mixup=0.4))
    assert metrics["accuracy"] > 0.9
