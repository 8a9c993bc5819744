"""The best recipe of the benchmarks: pretrain on the table's texts, train teachers, distil a student of the same size.

The student costs as much as a plainly trained model. `aisle.pipelines.stages` measures what each step adds.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from transformers import AutoConfig

from aisle.console import say
from aisle.files import put_in_place, write_json
from aisle.preprocess.clean import LabelledTexts, clean_rows
from aisle.preprocess.encode import TextTokenizer
from aisle.preprocess.labels import Labelling
from aisle.preprocess.tables.table import fingerprint, read_labelled
from aisle.train.core.processes import Processes, processes
from aisle.train.core.resume import STATE, check_replaceable, folder_beside, identity, working_folder
from aisle.train.core.settings import PRETRAINING_EPOCHS, SCRATCH, DecisionTargets, StudentSpec, TrainingSettings
from aisle.train.core.split import Split, is_learnt, split
from aisle.train.fit.classification import Classification
from aisle.train.fit.distil import distil
from aisle.train.fit.model import check_settings, new_classifier
from aisle.train.fit.pretrain import pretrain
from aisle.train.fit.train import train

TIMED_TEXTS, TIMED_STEPS = 4000, 8  # from which the time is estimated
# The folders of the steps.
LANGUAGE, PRETRAINED, FROM_SCRATCH, STUDENT = "language", "pretrained", "scratch", "student"

# Trains with some settings into a folder, and returns the metrics.
Trains: TypeAlias = Callable[[Path, TrainingSettings], dict[str, Any]]


def plain(settings: TrainingSettings) -> TrainingSettings:
    """Return the settings without augmentation."""
    return replace(settings, augment=(), class_floor=0, mixup=0.0)


def for_student(settings: TrainingSettings) -> TrainingSettings:
    """Return a student's settings: soft labels take more epochs than labels (Beyer et al. 2022, arXiv:2106.05237)."""
    return replace(settings, epochs=2 * settings.epochs)


def same_size(layers: int) -> StudentSpec:
    """Return a student as large as its teachers. It learns from their differences, not from one's hidden states."""
    return StudentSpec(layers=layers, hidden_weight=0.0, linear_share=0.5, prune=False)


@dataclass(frozen=True)
class Step:
    name: str  # also of its folder
    settings: TrainingSettings
    run: Trains
    mark: str = "training.json"  # a file that only a finished folder has

    def is_done(self, folder: Path) -> bool:
        return (folder / self.name / self.mark).is_file()


@dataclass(frozen=True)
class Source:
    """The table, and what all steps do with it."""

    data: Path
    columns: tuple[str, str]  # of the text and of the label
    labelling: Labelling
    targets: DecisionTargets
    save_every: int | None
    log_dir: Path | None

    def pretrain(self, out: Path, settings: TrainingSettings) -> dict[str, Any]:
        return pretrain([self.data], self.columns[0], out, settings, **self._hooks(out))

    def train(self, out: Path, settings: TrainingSettings) -> dict[str, Any]:
        more = {"targets": self.targets, "labelling": self.labelling, **self._hooks(out)}
        return train(self.data, *self.columns, out, settings, **more)

    def distil(self, out: Path, settings: TrainingSettings) -> dict[str, Any]:
        """Distil the teachers beside `out` into a student that starts from the first."""
        teachers = [each for name in (PRETRAINED, FROM_SCRATCH) if (each := out.with_name(name)).is_dir()]
        layers = AutoConfig.from_pretrained(teachers[0], local_files_only=True).num_hidden_layers
        return distil(teachers, self.data, *self.columns, out, settings, same_size(layers), **self._hooks(out))

    def _hooks(self, out: Path) -> dict[str, Any]:
        return {"save_every": self.save_every, "log_dir": self.log_dir and self.log_dir / out.name}


def train_best(
    data: Path,
    text_column: str,
    label_column: str,
    out: Path,
    settings: TrainingSettings,
    *,
    targets: DecisionTargets = DecisionTargets(),  # noqa: B008 - it is frozen
    save_every: int | None = None,
    log_dir: Path | None = None,
    overwrite: bool = False,
    labelling: Labelling = Labelling(),  # noqa: B008 - it is frozen
) -> dict[str, Any]:
    """Train a classifier on a table by the best recipe, and write the checkpoint folder `out`.

    From scratch: pretrain a BERT on the texts, fine-tune it, train another from scratch, and distil both and a linear
    SVM into a student that starts from the first. From another model: fine-tune it, and distil it and the SVM into
    itself. Finished steps are kept until the end, so a run that was stopped resumes. Runs under torchrun, as `train`.

    Args:
        settings: of each training; a student of models from scratch takes twice the epochs.

    Returns metrics.json: the scores of the student and of its teachers on the held-out fifth, and the seconds of each
    step.

    Raises:
        InputError: the table cannot be learnt from, or the model cannot be loaded.
    """
    start = time.perf_counter()
    check_replaceable(out, "training.json", overwrite)
    check_settings(settings)
    table, _ = clean_rows(read_labelled(data, text_column, label_column), labelling, learnable=is_learnt)
    parts = split(table)
    made_from = {"file": data.name, "sha256": fingerprint(data), "columns": [text_column, label_column]}
    made_from |= {"recipe": "best", **labelling.metadata()}
    source = Source(data, (text_column, label_column), labelling, targets, save_every, log_dir)
    named = out.with_name(f"{out.name}.recipe")
    folder = folder_beside(named)
    steps = _steps(source, settings, folder)
    with processes() as world:  # the steps use the same ones
        config = {**identity(settings, made_from, world), "pretraining epochs": PRETRAINING_EPOCHS}
        with working_folder(named, config, is_main=world.is_main, kept=(STATE, "config.json")):
            _announce(steps, folder, parts, settings, world)
            took = {"steps": _run(steps, folder, world), "seconds": round(time.perf_counter() - start, 1)}
            return world.broadcast(_finish(folder / STUDENT, out, took) if world.is_main else {})


def _steps(source: Source, settings: TrainingSettings, folder: Path) -> list[Step]:
    if not settings.from_scratch:
        again = replace(settings, model=SCRATCH)  # starts from the teacher
        return [Step(PRETRAINED, settings, source.train), Step(STUDENT, again, source.distil)]
    language = replace(plain(settings), epochs=PRETRAINING_EPOCHS)
    return [
        Step(LANGUAGE, language, source.pretrain, "pretraining.json"),
        Step(PRETRAINED, replace(settings, model=str(folder / LANGUAGE)), source.train),
        Step(FROM_SCRATCH, settings, source.train),
        Step(STUDENT, for_student(settings), source.distil),
    ]


def _run(steps: Sequence[Step], folder: Path, world: Processes) -> dict[str, float]:
    """Run the steps that are not finished; return the seconds of each."""
    seconds: dict[str, float] = {}
    for number, step in enumerate(steps, 1):
        title = f"step {number} of {len(steps)}, {step.name}"
        if step.is_done(folder):
            say(f"{title}: finished by an earlier run")
            continue
        say(title)
        start = time.perf_counter()
        step.run(folder / step.name, step.settings)
        seconds[step.name] = round(time.perf_counter() - start, 1)
        world.broadcast(None)  # the others wait until the main process has written the folder
    return seconds


def _finish(student: Path, out: Path, took: dict[str, Any]) -> dict[str, Any]:
    """Write how long the recipe took into the student's checkpoint, move it to `out`, and return its metrics."""
    training, metrics = (json.loads((student / name).read_text("utf-8")) for name in ("training.json", "metrics.json"))
    metrics = {**metrics, **took}
    write_json(student / "training.json", {**training, "recipe": "best"})
    write_json(student / "metrics.json", metrics)
    put_in_place(student, out)
    return metrics


def _announce(steps: Sequence[Step], folder: Path, parts: Split, settings: TrainingSettings, world: Processes) -> None:
    """Say how long the steps that are left will take, by the time of a few training steps on this machine."""
    epochs = sum(step.settings.epochs for step in steps if not step.is_done(folder))
    if epochs and world.is_main:
        minutes = epochs * _seconds_of_epoch(parts, settings, world.device) / world.count / 60
        wait = f"about {minutes:.0f} minutes" if minutes >= 1 else "less than a minute"
        say(f"recipe best: {epochs} epochs in {len(steps)} steps (plain: {settings.epochs}); this takes {wait}")


def _seconds_of_epoch(parts: Split, settings: TrainingSettings, device: torch.device) -> float:
    """Estimate the seconds of an epoch of one process from a few training steps."""
    few = LabelledTexts(parts.train.texts[:TIMED_TEXTS], parts.train.labels[:TIMED_TEXTS])
    settings = plain(settings)
    model, backend = new_classifier(few.texts, parts.labels, settings)
    with tempfile.TemporaryDirectory() as folder:
        backend.save(f"{folder}/tokenizer.json")
        tokenizer = TextTokenizer(Path(folder, "tokenizer.json"))
    task = Classification(parts._replace(train=few, validation=LabelledTexts([], [])), tokenizer, settings, device)
    model.to(device).train()
    batches = task.epoch(0)
    sizes = [len(batch) * max(len(task.tokens[row]) for row in batch) for batch in batches]  # padded tokens
    seconds, timed = 0.0, 0
    for number, (batch, size) in enumerate(zip(batches[: TIMED_STEPS + 1], sizes, strict=False)):
        start = time.perf_counter()
        torch.autograd.backward(task.loss(model, batch))
        if number:  # the first step is slower
            seconds += time.perf_counter() - start
            timed += size
    return seconds / max(1, timed) * sum(sizes) * len(parts.train.texts) / len(few.texts)
