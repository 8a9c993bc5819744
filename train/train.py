"""Train: labelled texts to a checkpoint. Reads top to bottom: data, model, loop, evaluation, files."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aisle.console import say
from aisle.preprocess.clean import CleaningReport, Table, clean_rows
from aisle.preprocess.encode import Encoder
from aisle.preprocess.table import fingerprint, read_labelled
from aisle.train.calibrate import fit_temperature
from aisle.train.checkpoint import write_checkpoint
from aisle.train.crossval import cross_validate
from aisle.train.data import Split, folds, split
from aisle.train.evaluate import logits_of, pad
from aisle.train.fit import Hooks, Scalars, fit, like_lengths
from aisle.train.loss import Loss
from aisle.train.metrics import score
from aisle.train.model import from_pretrained, from_scratch
from aisle.train.processes import Processes, processes
from aisle.train.resume import STATE, check_replaceable, identity, put_in_place, working_folder
from aisle.train.sample import draw
from aisle.train.settings import Settings as Settings


def train(
    data: Path,
    text_column: str,
    label_column: str,
    out: Path,
    settings: Settings,
    *,
    save_every: int | None = None,
    log_dir: Path | None = None,
) -> dict[str, Any]:
    """Train a classifier on a table and write the checkpoint folder `out`.

    A run that was killed goes on from its last state when it is started again. Under torchrun every process calls this;
    the first one writes.

    Returns metrics.json: the scores on the held-out fifth, and the seconds it took.

    Raises:
        InputError: the table cannot be learnt from, or the model cannot be loaded.
    """
    check_replaceable(out, "training.json")
    # Data: clean, split by content.
    table, cleaning = clean_rows(read_labelled(data, text_column, label_column))
    made_from = {"file": data.name, "sha256": fingerprint(data), "columns": [text_column, label_column]}
    return train_table(table, cleaning, made_from, out, settings, save_every=save_every, log_dir=log_dir)


def train_table(
    table: Table,
    cleaning: CleaningReport,
    made_from: dict[str, Any],
    out: Path,
    settings: Settings,
    *,
    save_every: int | None = None,
    log_dir: Path | None = None,
) -> dict[str, Any]:
    """Train on a cleaned table, as `train` does; `made_from` names where it is from, in training.json."""
    start = time.perf_counter()
    parts = split(table)
    with processes() as team, working_folder(out, identity(settings, made_from, team), first=team.first) as work:
        say(f"{cleaning.rows_in} rows, {cleaning.rows_kept} kept; dropped: {cleaning.dropped or 'none'}")
        spread = {}
        if settings.folds:
            once = replace(settings, folds=0)

            def measured(parts: Split, folder: Path) -> dict[str, Any]:
                learnt = learn(parts, once, folder, team, Hooks(folder / STATE, save_every))
                return team.agree(measure(learnt, parts) if team.first else {})

            spread = {"cross_validation": cross_validate(folds(table, settings.folds), work, team, measured)}

        learnt = learn(parts, settings, work, team, Hooks(work / STATE, save_every, log_dir))
        metrics: dict[str, Any] = {}
        if team.first:
            temperature = calibrate(learnt)
            metrics = {**measure(learnt, parts), **spread, "seconds": round(time.perf_counter() - start, 1)}
            told = {
                "settings": asdict(settings),
                "data": {**made_from, "cleaning": asdict(cleaning)},
                "epochs": learnt.history,
                "temperature": temperature,
                "processes": team.count,
            }
            write_checkpoint(work / "checkpoint", learnt.model, learnt.encoder, draw(parts), metrics, told)
            put_in_place(work / "checkpoint", out)
        return team.agree(metrics)


@dataclass
class Learnt:
    """What `learn` comes back with."""

    model: Any
    encoder: Encoder
    task: Classification
    history: list[Scalars]


def learn(parts: Split, settings: Settings, folder: Path, team: Processes, hooks: Hooks) -> Learnt:
    """Train on one split; the tokenizer is left in `folder`."""
    torch.manual_seed(settings.seed)
    folder.mkdir(exist_ok=True)
    if settings.from_scratch:
        model, tokenizer = from_scratch(parts.train.texts, parts.labels, settings)
    else:
        model, tokenizer = from_pretrained(settings.model, parts.labels, settings.max_tokens, settings.dropout)
    # The tokenizer's file goes through the serving code's own loader.
    tokenizer.save(str(folder / "tokenizer.json"))
    encoder = Encoder(folder / "tokenizer.json")
    task = Classification(parts, encoder, settings, team.device)
    history = fit(model, task, settings, team, hooks)
    return Learnt(model.eval(), encoder, task, history)


def calibrate(learnt: Learnt) -> float:
    """Make confidences true of texts that the model has not seen: divide its logits by a temperature (Guo et al. 2017).

    Returns the temperature.
    """
    task = learnt.task
    if not task.validation:
        return 1.0
    temperature = fit_temperature(logits_of(learnt.model, task.validation, "calibrating"), task.validation_targets)
    with torch.no_grad():
        learnt.model.classifier.weight /= temperature
        learnt.model.classifier.bias /= temperature
    return temperature


def measure(learnt: Learnt, parts: Split) -> dict[str, Any]:
    """Return the scores on what the split holds out, and the parts' rows."""
    logits = logits_of(learnt.model, learnt.encoder.tokens(parts.held_out.texts), "evaluating")
    metrics = score(parts.held_out.labels, [parts.labels[i] for i in logits.argmax(axis=1)])
    metrics["rows"] = {name: len(getattr(parts, name).texts) for name in ("train", "validation", "held_out")}
    return metrics


class Classification:
    """The task of telling texts' categories."""

    def __init__(self, parts: Split, encoder: Encoder, settings: Settings, device: torch.device) -> None:
        if settings.augment or settings.class_floor:
            from aisle.preprocess.augment import Augmenter, floor_rows
        number = {label: i for i, label in enumerate(parts.labels)}
        rows = range(len(parts.train.texts))
        chosen: Sequence[int] = floor_rows(parts.train.labels, settings.class_floor) if settings.class_floor else rows
        self.texts = [parts.train.texts[i] for i in chosen]
        self.targets = torch.tensor([number[parts.train.labels[i]] for i in chosen], device=device)
        self.validation = encoder.tokens(parts.validation.texts) if parts.validation.texts else []
        self.validation_targets = np.array([number[label] for label in parts.validation.labels], np.int64)
        self.encoder = encoder
        self.settings = settings
        self.device = device
        self.augmenter = Augmenter(settings.augment, settings.seed, settings.augment_rate) if settings.augment else None
        self.shown: Sequence[str] = self.texts  # as they are in this epoch
        self.tokens = [] if self.augmenter else encoder.tokens(self.texts)
        self.loss_of = Loss(parts.labels, self.targets, settings, device)

    def epoch(self, number: int) -> list[list[int]]:
        if self.augmenter:
            self.shown = self.augmenter.texts(self.texts, number)
            self.tokens = self.encoder.varied_tokens(self.shown)
        shuffler = random.Random(f"{self.settings.seed} {number}")
        return list(like_lengths(self.tokens, self.settings.batch_size, shuffler))

    def loss(self, model: Any, rows: Sequence[int]) -> torch.Tensor:
        input_ids, attention_mask = (tensor.to(self.device) for tensor in pad([self.tokens[i] for i in rows]))
        targets = self.targets[rows]
        if not self.settings.mixup:
            logits = model(input_ids=input_ids, attention_mask=attention_mask).logits
            return self.loss_of(logits, targets).sum()
        # Mix the embeddings of two texts, and their losses likewise (Guo et al. 2019, arXiv:1905.08941).
        embeddings = getattr(model, "module", model).get_input_embeddings()
        vectors = embeddings(input_ids) * attention_mask[:, :, None]
        other = torch.randperm(len(rows)).to(self.device)
        share = float(torch.distributions.Beta(self.settings.mixup, self.settings.mixup).sample())
        mixed = share * vectors + (1 - share) * vectors[other]
        logits = model(inputs_embeds=mixed, attention_mask=attention_mask | attention_mask[other]).logits
        return (share * self.loss_of(logits, targets) + (1 - share) * self.loss_of(logits, targets[other])).sum()

    def validate(self, model: Any) -> Scalars | None:
        if not self.validation:
            return None
        logits = torch.from_numpy(logits_of(model, self.validation, "validating"))
        targets = torch.from_numpy(self.validation_targets)
        return {
            "score": float((logits.argmax(dim=1) == targets).float().mean()),
            "loss": float(torch.nn.functional.cross_entropy(logits, targets)),
        }
