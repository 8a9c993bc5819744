"""Train a checkpoint on labelled texts: data, model, loop, evaluation, files."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from aisle.console import say
from aisle.errors import InputError
from aisle.files import put_in_place
from aisle.preprocess.clean import CleaningReport, LabelledTexts, clean_rows
from aisle.preprocess.encode import TextTokenizer
from aisle.preprocess.fields import columns_of
from aisle.preprocess.label_sets import indicators, note_on_sets
from aisle.preprocess.labels import Labelling, sets_note
from aisle.preprocess.tables.table import fingerprint, read_labelled
from aisle.preprocess.windows import Windows
from aisle.train.core.calibration import fit_sigmoid_temperature, fit_temperature
from aisle.train.core.checkpoint import write_checkpoint
from aisle.train.core.decision_fit import fit_decisions
from aisle.train.core.decisions import Decisions
from aisle.train.core.families import output_layer
from aisle.train.core.groups import check_groups, read_groups
from aisle.train.core.head_data import OPTION, HeadData, check_names, notes_of, read_heads
from aisle.train.core.head_rows import cut_rows
from aisle.train.core.metrics import score, score_sets
from aisle.train.core.multi_label import Thresholds
from aisle.train.core.predict import logits_of
from aisle.train.core.processes import Processes, processes
from aisle.train.core.resume import STATE, check_replaceable, identity, working_folder
from aisle.train.core.sample import Sample, draw, warn_of_few
from aisle.train.core.settings import DecisionTargets, Privacy
from aisle.train.core.settings import TrainingSettings as TrainingSettings
from aisle.train.core.split import Split, folds, is_learnt, split
from aisle.train.core.threshold_fit import fit_thresholds
from aisle.train.fit.classification import Classification
from aisle.train.fit.contrast import ContrastiveClassification, measure_search
from aisle.train.fit.crossval import cross_validate
from aisle.train.fit.heads import add_heads, calibrate_heads, measure_heads, temperatures
from aisle.train.fit.loop import Hooks, Scalars, fit
from aisle.train.fit.loss import check_levels
from aisle.train.fit.model import check_settings, new_classifier
from aisle.train.fit.multi_label import MultiLabelClassification, check_multi_label, set_problem


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
    also: Sequence[str] = (),
    privacy: Privacy = Privacy(),  # noqa: B008 - it is frozen
) -> dict[str, Any]:
    """Train a classifier on a table and write the checkpoint folder `out`.

    A run that was killed resumes from its last state when it is started again. Under torchrun every process calls this,
    and the main one writes.

    Args:
        also: further columns, each of which gets a head of its own.

    Returns metrics.json: the scores on the held-out fifth, and the seconds it took.

    Raises:
        InputError: the table cannot be learnt from, or the model cannot be loaded.
    """
    check_replaceable(out, "training.json", overwrite)
    if privacy.on:
        from aisle.train.fit.private import check_private

        check_private(data, settings, labelling, also, log_dir)
    check_settings(settings)
    if labelling.multi_label:
        check_multi_label(settings)
        if also:
            raise InputError(f"{OPTION} is for one category per text; leave out {OPTION} or --multi-label")
    check_names(also, text_column, label_column)
    # Data: clean, split by content.
    table, cleaning = clean_rows(read_labelled(data, text_column, label_column), labelling, learnable=is_learnt)
    if not table.texts and "label not text" in cleaning.dropped:
        if labelling.multi_label:
            raise InputError(f"{data}: no label is a text or a list of texts")
        raise InputError(f"{data}: no label is a text; if they are lists of categories, give --multi-label")
    made_from = {"file": data.name, "sha256": fingerprint(data), "columns": [text_column, label_column]}
    made_from |= {**labelling.metadata(), **({"also": list(also)} if also else {})}
    groups = groups_in(data, text_column, label_column, settings)
    heads = read_heads(data, text_column, also, table, labelling)
    return train_table(
        *(table, cleaning, made_from, out, settings, groups, heads),
        targets=targets,
        save_every=save_every,
        log_dir=log_dir,
        privacy=privacy,
    )


def groups_in(data: Path, text_column: str, label_column: str, settings: TrainingSettings) -> dict[bytes, str]:
    """Return the group of each text of a table, if groups are to be learnt.

    Raises:
        InputError: the table lacks the column, or it is the label's.
    """
    if settings.contrastive is None:
        return {}
    if settings.contrastive == label_column:
        raise InputError(
            f"--contrastive {label_column}: this is the label's column; name a finer one, such as the product's"
        )
    return read_groups(data, text_column, settings.contrastive)


def train_table(
    table: LabelledTexts,
    cleaning: CleaningReport,
    made_from: dict[str, Any],
    out: Path,
    settings: TrainingSettings,
    groups: Mapping[bytes, str],
    heads: tuple[HeadData, ...] = (),
    *,
    targets: DecisionTargets = DecisionTargets(),  # noqa: B008 - it is frozen
    save_every: int | None = None,
    log_dir: Path | None = None,
    examples: LabelledTexts | None = None,
    privacy: Privacy = Privacy(),  # noqa: B008 - it is frozen
) -> dict[str, Any]:
    """Train on a cleaned table, as `train` does.

    Args:
        made_from: names the table's source in training.json.
        groups: of the texts, by content key, for `settings.contrastive`.
        examples: rows of the table that its source lacks; the checkpoint keeps them for the next training.
    """
    start = time.perf_counter()
    parts = split(table)._replace(groups=groups, heads=heads)
    if settings.contrastive:
        check_groups(groups, parts, settings.contrastive)
    if settings.level_weight:
        check_levels(parts.labels)
    warn_of_few(parts)
    note = note_on_sets(table.labels) if table.multi_label else sets_note(parts.labels)
    configured = {**made_from, **(asdict(privacy) if privacy.on else {})}
    with (
        processes() as world,
        working_folder(out, identity(settings, configured, world), is_main=world.is_main) as work,
    ):
        say(f"{cleaning.rows_in} rows, {cleaning.rows_kept} kept; dropped: {cleaning.dropped or 'none'}")
        for each in [*cleaning.notes(), *([note] if note else []), *notes_of(parts)]:
            say(each)
        spread = _cross_validation(table, parts, settings, work, world, save_every) if settings.folds else {}
        learnt = learn(parts, settings, work, world, Hooks(work / STATE, save_every, log_dir), privacy)
        metrics: dict[str, Any] = {}
        if world.is_main:
            calibrate(learnt, targets)
            metrics = {**measure(learnt, parts), **spread}
            if learnt.privacy:
                metrics["privacy"] = learnt.privacy
            if settings.contrastive:
                metrics |= measure_search(learnt.model, learnt.tokenizer, parts)
            metrics["seconds"] = round(time.perf_counter() - start, 1)
            origin = Origin(settings, made_from, cleaning, world.count, examples)
            write_result(learnt, parts, origin, metrics, work / "checkpoint", out)
        return world.broadcast(metrics)


def _cross_validation(
    table: LabelledTexts,
    whole: Split,
    settings: TrainingSettings,
    work: Path,
    world: Processes,
    save_every: int | None,
) -> dict[str, Any]:
    once = replace(settings, folds=0)

    def measured(parts: Split, folder: Path) -> dict[str, Any]:
        learnt = learn(parts, once, folder, world, Hooks(folder / STATE, save_every))
        return world.broadcast(measure(learnt, parts) if world.is_main else {})

    splits = (parts._replace(groups=whole.groups, heads=whole.heads) for parts in folds(table, settings.folds))
    return {"cross_validation": cross_validate(splits, work, world, measured)}


@dataclass
class Learnt:
    """The result of a training run."""

    model: Any
    tokenizer: TextTokenizer
    task: Classification
    history: list[Scalars]
    privacy: dict[str, Any] | None = None  # the figures of a training with differential privacy
    # `calibrate` sets these.
    temperature: float = 1.0
    attribute_temperatures: dict[str, float] = field(default_factory=dict)
    decisions: Decisions | None = None  # of a model that gives one category
    thresholds: Thresholds | None = None  # of a multi-label model

    @property
    def labels(self) -> list[str]:
        """The categories, in the order of the logits."""
        return [self.model.config.id2label[i] for i in range(self.model.config.num_labels)]


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
    heads = tuple(each.head for each in parts.heads)
    if heads:
        training["attribute_temperatures"] = learnt.attribute_temperatures
    names, config = columns_of(origin.data["columns"][0]), learnt.model.config
    if len(names) > 1 or getattr(config, "text_fields", None):
        config.text_fields = names if len(names) > 1 else []
    nothing = LabelledTexts([], [])
    write_checkpoint(
        folder,
        learnt.model,
        learnt.tokenizer,
        Sample(nothing, nothing, nothing) if learnt.privacy else draw(parts),
        metrics,
        training,
        learnt.decisions,
        learnt.thresholds,
        examples=origin.examples,
        heads=cut_rows(learnt.model, heads) if heads else None,
    )
    put_in_place(folder, out)


def learn(
    parts: Split,
    settings: TrainingSettings,
    folder: Path,
    world: Processes,
    hooks: Hooks,
    privacy: Privacy = Privacy(),  # noqa: B008 - it is frozen
) -> Learnt:
    """Train on one split, and write the tokenizer to `folder`."""
    torch.manual_seed(settings.seed)
    folder.mkdir(exist_ok=True)
    model, backend = new_classifier(parts.train.texts, parts.labels, settings)
    if settings.contrastive:
        model.config.embedding_pooling = "mean"  # it learns sooner than [CLS]
    set_problem(model, parts.train, parts.labels)
    model = add_heads(model, parts.heads, settings.model)
    # Load the file as the server does.
    backend.save(str(folder / "tokenizer.json"))
    tokenizer = TextTokenizer(folder / "tokenizer.json", windows=settings.windows)
    Windows(settings.windows, tokenizer.max_tokens).put_into(model.config)
    if privacy.on:
        return _learn_privately(parts, settings, privacy, model, tokenizer, world, hooks)
    task = task_for(parts, settings)(parts, tokenizer, settings, world.device)
    history = fit(model, task, settings, world, hooks)
    return Learnt(model.eval(), tokenizer, task, history)


def _learn_privately(
    parts: Split,
    settings: TrainingSettings,
    privacy: Privacy,
    model: Any,
    tokenizer: TextTokenizer,
    world: Processes,
    hooks: Hooks,
) -> Learnt:
    from aisle.train.fit.private import Mechanism, PrivateClassification, check_rows

    if world.count > 1:
        raise InputError("--dp-epsilon trains in one process; start it without torchrun")
    check_rows(parts, privacy)
    task = PrivateClassification(parts, tokenizer, settings, world.device)
    mechanism = Mechanism(task, privacy, settings)
    say(mechanism.note())
    history = fit(model, task, settings, world, hooks, mechanism)
    return Learnt(model.eval(), tokenizer, task, history, mechanism.figures())


def task_for(parts: Split, settings: TrainingSettings) -> type[Classification]:
    """Return what is learnt."""
    if parts.train.multi_label:
        return MultiLabelClassification
    return ContrastiveClassification if settings.contrastive else Classification


def calibrate(learnt: Learnt, targets: DecisionTargets) -> None:
    """Calibrate the model on the validation part: divide its logits by a temperature (Guo et al. 2017).

    Then fit the decisions on the same part; of a multi-label model, the thresholds.
    """
    task = learnt.task
    if isinstance(task, MultiLabelClassification):
        _calibrate_multi_label(learnt)
        return
    if not task.validation:
        return
    logits = logits_of(learnt.model, task.validation, "calibrating")
    own = slice(0, task.categories)
    temperature = fit_temperature(logits[:, own], task.validation_categories)
    learnt.decisions = fit_decisions(logits[:, own] / temperature, task.validation_categories, learnt.labels, targets)
    say(_accepted(learnt.decisions))
    _divide_logits(learnt, temperature)
    if task.heads:
        found = temperatures(task.heads, logits[:, task.categories :], task.validation_targets)
        learnt.attribute_temperatures = calibrate_heads(learnt.model, found)


def _calibrate_multi_label(learnt: Learnt) -> None:
    targets = learnt.task.validation_targets
    logits = logits_of(learnt.model, learnt.task.validation, "calibrating")
    temperature = fit_sigmoid_temperature(logits, targets)
    learnt.thresholds = fit_thresholds(logits / temperature, targets, learnt.labels)
    shared = max(each.shared_by for each in learnt.thresholds.categories)
    if shared > 1:
        say(f"{shared} of {len(learnt.labels)} categories have too few validation texts and share a threshold")
    _divide_logits(learnt, temperature)


def _divide_logits(learnt: Learnt, temperature: float) -> None:
    """Put a temperature into the weights."""
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
    if learnt.thresholds:
        actual = indicators(parts.held_out.labels, parts.labels)
        metrics = score_sets(actual, learnt.thresholds.apply(logits), parts.labels)
    else:
        own = logits[:, : len(parts.labels)]
        metrics = score(parts.held_out.labels, [parts.labels[i] for i in own.argmax(axis=1)])
    if parts.heads:
        metrics["attributes"] = measure_heads(parts.heads, logits, len(parts.labels), parts.held_out.texts)
    metrics["rows"] = {name: len(getattr(parts, name).texts) for name in ("train", "validation", "held_out")}
    return metrics
