"""Train a checkpoint on labelled texts: data, model, loop, evaluation, files."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from aisle.console import say
from aisle.files import put_in_place
from aisle.preprocess.clean import CleaningReport, LabelledTexts, clean_rows
from aisle.preprocess.encode import TextTokenizer
from aisle.preprocess.labels import Labelling
from aisle.preprocess.tables.table import fingerprint, read_labelled
from aisle.train.core.calibration import fit_temperature
from aisle.train.core.checkpoint import write_checkpoint
from aisle.train.core.decision_fit import fit_decisions
from aisle.train.core.decisions import Decisions
from aisle.train.core.families import output_layer
from aisle.train.core.metrics import score
from aisle.train.core.predict import logits_of, pad
from aisle.train.core.processes import Processes, processes
from aisle.train.core.resume import STATE, check_replaceable, identity, working_folder
from aisle.train.core.sample import draw, warn_of_few
from aisle.train.core.settings import DecisionTargets
from aisle.train.core.settings import TrainingSettings as TrainingSettings
from aisle.train.core.split import Split, folds, is_learnt, split
from aisle.train.fit.crossval import cross_validate
from aisle.train.fit.loop import Hooks, Scalars, fit, like_lengths
from aisle.train.fit.loss import Loss, check_levels
from aisle.train.fit.model import check_settings, from_pretrained, from_scratch
from aisle.train.fit.unknown import Unknowns, isolates


def train(
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
    """Train a classifier on a table and write the checkpoint folder `out`.

    A run that was killed resumes from its last state when it is started again. Under torchrun every process calls this,
    and the main one writes.

    Returns metrics.json: the scores on the held-out fifth, and the seconds it took.

    Raises:
        InputError: the table cannot be learnt from, or the model cannot be loaded.
    """
    check_replaceable(out, "training.json", overwrite)
    check_settings(settings)
    # Data: clean, split by content.
    table, cleaning = clean_rows(read_labelled(data, text_column, label_column), labelling, learnable=is_learnt)
    made_from = {"file": data.name, "sha256": fingerprint(data), "columns": [text_column, label_column]}
    made_from |= labelling.metadata()
    return train_table(
        table, cleaning, made_from, out, settings, targets=targets, save_every=save_every, log_dir=log_dir
    )


def train_table(
    table: LabelledTexts,
    cleaning: CleaningReport,
    made_from: dict[str, Any],
    out: Path,
    settings: TrainingSettings,
    *,
    targets: DecisionTargets = DecisionTargets(),  # noqa: B008 - it is frozen
    save_every: int | None = None,
    log_dir: Path | None = None,
    examples: LabelledTexts | None = None,
) -> dict[str, Any]:
    """Train on a cleaned table, as `train` does; `made_from` names its source in training.json.

    `examples` are rows of the table that its source lacks; the checkpoint keeps them for the next training.
    """
    start = time.perf_counter()
    parts = split(table)
    if settings.level_weight:
        check_levels(parts.labels)
    warn_of_few(parts)
    with processes() as world, working_folder(out, identity(settings, made_from, world), is_main=world.is_main) as work:
        say(f"{cleaning.rows_in} rows, {cleaning.rows_kept} kept; dropped: {cleaning.dropped or 'none'}")
        for note in cleaning.notes():
            say(note)
        spread = _cross_validation(table, settings, work, world, save_every) if settings.folds else {}
        learnt = learn(parts, settings, work, world, Hooks(work / STATE, save_every, log_dir))
        metrics: dict[str, Any] = {}
        if world.is_main:
            calibrate(learnt, targets)
            metrics = {**measure(learnt, parts), **spread, "seconds": round(time.perf_counter() - start, 1)}
            origin = Origin(settings, made_from, cleaning, world.count, examples)
            write_result(learnt, parts, origin, metrics, work / "checkpoint", out)
        return world.broadcast(metrics)


def _cross_validation(
    table: LabelledTexts, settings: TrainingSettings, work: Path, world: Processes, save_every: int | None
) -> dict[str, Any]:
    once = replace(settings, folds=0)

    def measured(parts: Split, folder: Path) -> dict[str, Any]:
        learnt = learn(parts, once, folder, world, Hooks(folder / STATE, save_every))
        return world.broadcast(measure(learnt, parts) if world.is_main else {})

    return {"cross_validation": cross_validate(folds(table, settings.folds), work, world, measured)}


@dataclass
class Learnt:
    """The result of a training run."""

    model: Any
    tokenizer: TextTokenizer
    task: Classification
    history: list[Scalars]
    # `calibrate` sets both.
    temperature: float = 1.0
    decisions: Decisions | None = None


@dataclass(frozen=True)
class Origin:
    """What a checkpoint was made from, for training.json."""

    settings: TrainingSettings
    data: dict[str, Any]
    cleaning: CleaningReport
    processes: int  # that trained together
    examples: LabelledTexts | None = None  # of added categories, kept in the checkpoint


def write_result(
    learnt: Learnt, parts: Split, origin: Origin, metrics: dict[str, Any], folder: Path, out: Path, **more: Any
) -> None:
    """Write a checkpoint to `folder`, and then move it to `out`. `more` goes into training.json too."""
    training = {
        "settings": asdict(origin.settings),
        "data": {**origin.data, "cleaning": asdict(origin.cleaning)},
        **more,
        "epochs": learnt.history,
        "temperature": learnt.temperature,
        "processes": origin.processes,
    }
    write_checkpoint(
        folder,
        learnt.model,
        learnt.tokenizer,
        draw(parts),
        metrics,
        training,
        learnt.decisions,
        examples=origin.examples,
    )
    put_in_place(folder, out)


def learn(parts: Split, settings: TrainingSettings, folder: Path, world: Processes, hooks: Hooks) -> Learnt:
    """Train on one split, and write the tokenizer to `folder`."""
    torch.manual_seed(settings.seed)
    folder.mkdir(exist_ok=True)
    if settings.from_scratch:
        model, backend = from_scratch(parts.train.texts, parts.labels, settings)
    else:
        model, backend = from_pretrained(settings.model, parts.labels, settings.max_tokens, settings.dropout)
    # Load the file as the server does.
    backend.save(str(folder / "tokenizer.json"))
    tokenizer = TextTokenizer(folder / "tokenizer.json")
    task = Classification(parts, tokenizer, settings, world.device)
    history = fit(model, task, settings, world, hooks)
    return Learnt(model.eval(), tokenizer, task, history)


def calibrate(learnt: Learnt, targets: DecisionTargets) -> None:
    """Calibrate the model on the validation part: divide its logits by a temperature (Guo et al. 2017).

    Then fit the decisions on the same part.
    """
    task = learnt.task
    if not task.validation:
        return
    logits = logits_of(learnt.model, task.validation, "calibrating")
    temperature = fit_temperature(logits, task.validation_targets)
    labels = [learnt.model.config.id2label[i] for i in range(logits.shape[1])]
    learnt.decisions = fit_decisions(logits / temperature, task.validation_targets, labels, targets)
    say(_accepted(learnt.decisions))
    with torch.no_grad():
        output_layer(learnt.model).weight /= temperature
        output_layer(learnt.model).bias /= temperature
    learnt.temperature = temperature


def _accepted(decisions: Decisions) -> str:
    share, precision = decisions.summary()["accepted"], decisions.targets.accept_precision
    if share:
        return f"decisions: {share:.1%} of the validation texts are accepted at a precision of {precision}"
    return (
        f"decisions: no text is accepted, because the {decisions.rows} validation texts do not show a precision of "
        f"{precision}; aisle decide --accept-precision sets a lower one"
    )


def measure(learnt: Learnt, parts: Split) -> dict[str, Any]:
    """Return the scores on the split's held-out part, and the number of rows of each part."""
    logits = logits_of(learnt.model, learnt.tokenizer.tokens(parts.held_out.texts), "evaluating")
    metrics = score(parts.held_out.labels, [parts.labels[i] for i in logits.argmax(axis=1)])
    metrics["rows"] = {name: len(getattr(parts, name).texts) for name in ("train", "validation", "held_out")}
    return metrics


class Classification:
    """The task of classifying texts."""

    def __init__(
        self, parts: Split, tokenizer: TextTokenizer, settings: TrainingSettings, device: torch.device
    ) -> None:
        if settings.augment or settings.class_floor:
            from aisle.preprocess.augment import Augmenter, floor_rows
        number = {label: i for i, label in enumerate(parts.labels)}
        rows = range(len(parts.train.texts))
        chosen: Sequence[int] = floor_rows(parts.train.labels, settings.class_floor) if settings.class_floor else rows
        self.texts = [parts.train.texts[i] for i in chosen]
        self.targets = torch.tensor([number[parts.train.labels[i]] for i in chosen], device=device)
        self.validation = tokenizer.tokens(parts.validation.texts) if parts.validation.texts else []
        self.validation_targets = np.array([number[label] for label in parts.validation.labels], np.int64)
        self.tokenizer = tokenizer
        self.settings = settings
        self.device = device
        self.augmenter = Augmenter(settings.augment, settings.seed, settings.augment_rate) if settings.augment else None
        self.augmented: Sequence[str] = self.texts  # this epoch's texts, before unknown characters are put in
        self.plain_tokens = tokenizer.tokens(self.texts)  # the token ids of `augmented`
        backend = tokenizer.tokenizer
        self.unknowns = Unknowns(backend, self.texts, settings.seed) if isolates(backend) else None
        self.tokens = self.plain_tokens  # this epoch's token ids
        self.loss_of = Loss(parts.labels, self.targets, settings, device)

    def epoch(self, number: int) -> list[list[int]]:
        if self.augmenter:
            self.augmented = self.augmenter.texts(self.texts, number)
            self.plain_tokens = self.tokenizer.varied_tokens(self.augmented)
        self.tokens = list(self.plain_tokens)
        if self.unknowns:
            changed = self.unknowns.put(self.augmented, self.plain_tokens, number)
            for row, ids in zip(changed, self.tokenizer.tokens(list(changed.values())), strict=True):
                self.tokens[row] = ids
        shuffler = random.Random(f"{self.settings.seed} {number}")
        return list(like_lengths(self.tokens, self.settings.batch_size, shuffler))

    def loss(self, model: Any, rows: Sequence[int]) -> torch.Tensor:
        if not self.settings.mixup:
            return self._consistent_loss(model, rows)
        input_ids, attention_mask = (tensor.to(self.device) for tensor in pad([self.tokens[i] for i in rows]))
        targets = self.targets[rows]
        # Mixup: mix the embeddings and the losses of two texts (Guo et al. 2019, arXiv:1905.08941).
        embeddings = getattr(model, "module", model).get_input_embeddings()
        vectors = embeddings(input_ids) * attention_mask[:, :, None]
        other = torch.randperm(len(rows)).to(self.device)
        share = float(torch.distributions.Beta(self.settings.mixup, self.settings.mixup).sample())
        mixed = share * vectors + (1 - share) * vectors[other]
        logits = model(inputs_embeds=mixed, attention_mask=attention_mask | attention_mask[other]).logits
        return (share * self.loss_of(logits, targets) + (1 - share) * self.loss_of(logits, targets[other])).sum()

    def _consistent_loss(self, model: Any, rows: Sequence[int]) -> torch.Tensor:
        """Return the sum of the texts' losses and of the effect of unknown characters.

        The effect is the KL divergence between the predictions for a text without and with unknown characters. They
        must not change a prediction, even if a title says too little to decide on one category. The categories are
        learnt from the texts without them, so that unknown characters cost no accuracy.
        """
        changed = [place for place, row in enumerate(rows) if self.tokens[row] is not self.plain_tokens[row]]
        tokens = [self.plain_tokens[row] for row in rows] + [self.tokens[rows[place]] for place in changed]
        input_ids, attention_mask = (tensor.to(self.device) for tensor in pad(tokens))
        logits = model(input_ids=input_ids, attention_mask=attention_mask).logits.float()
        loss = self.loss_of(logits[: len(rows)], self.targets[rows]).sum()
        if changed:
            plain = logits[changed].detach().log_softmax(dim=1)
            loss = loss + F.kl_div(logits[len(rows) :].log_softmax(dim=1), plain, reduction="sum", log_target=True)
        return loss

    def validate(self, model: Any) -> Scalars | None:
        if not self.validation:
            return None
        logits = torch.from_numpy(logits_of(model, self.validation, "validating"))
        targets = torch.from_numpy(self.validation_targets)
        return {
            "score": float((logits.argmax(dim=1) == targets).float().mean()),
            "loss": float(torch.nn.functional.cross_entropy(logits, targets)),
        }
