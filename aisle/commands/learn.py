"""Training: train a checkpoint on labelled texts, and pretrain on texts without labels."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from aisle.commands import (
    Checkpoint,
    Json,
    LabelColumn,
    LogDir,
    Output,
    Overwrite,
    SaveEvery,
    Table,
    TextColumn,
    TextTables,
    TextWindows,
    check_columns,
    checkpoint_in,
    data_argument,
    other_columns,
    report,
    show_attributes,
    show_metrics,
    show_rows,
)
from aisle.commands.command import Stage, choices, folder_to_write, refuse, resumable
from aisle.commands.options import takes
from aisle.commands.tables import FoldLabels, LabelMap, MinRows, labelling, reads_tables
from aisle.console import show
from aisle.errors import InputError
from aisle.train.core.settings import DecisionTargets, Privacy, TrainingSettings

app = Stage()
SCRATCH_ONLY = ("layers", "hidden_size")
RECIPES = ("plain", "best")
# What a student does not learn, and what a run of several steps does not have.
OF_PLAIN = ("multi_label", "contrastive", "mixup", "folds", "also", "dp_epsilon")
OF_DECISIONS = ("accept_precision", "set_error", "unknown_share")
OF_PRETRAINING = (
    *("model", "layers", "hidden_size", "epochs", "batch_size", "learning_rate", "max_tokens", "accumulate", "seed"),
)


@app.command()
@reads_tables
@takes(Privacy, into="privacy")
@takes(DecisionTargets, into="targets")
@takes(TrainingSettings)
def train(
    ctx: typer.Context,
    data: Table,
    out: Output,
    settings: TrainingSettings,
    targets: DecisionTargets,
    privacy: Privacy,
    recipe: Annotated[
        str,
        choices(
            lambda: RECIPES,
            "plain: one training. best: pretrain on the texts, then distil a model of the same size from two trainings "
            "and a linear SVM. It says first how long this takes.",
        ),
    ] = "plain",
    text_column: TextColumn = "text",
    label_column: LabelColumn = "category",
    save_every: SaveEvery = None,
    log_dir: LogDir = None,
    fold_labels: FoldLabels = False,
    label_map: LabelMap = None,
    min_rows: MinRows = 0,
    also: Annotated[
        list[str] | None, typer.Option(metavar="COLUMN", help="A further column to learn, such as a brand; repeatable.")
    ] = None,
    multi_label: Annotated[
        bool, typer.Option(help="A text has several categories: A|B in a cell, or a list in JSON and Parquet.")
    ] = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Train a classifier. A fifth of the texts is held out to measure it.

    The same command resumes a run that was stopped. `torchrun --nproc-per-node N -m aisle train …` uses N devices.
    """
    refuse_ignored(ctx, settings)
    if multi_label:
        refuse(ctx, *OF_DECISIONS, because="is for decisions, which a --multi-label model does not have")
    if privacy.on:
        refuse(ctx, *OF_DECISIONS, "patience", because="needs validation texts, which --dp-epsilon does not read")
    else:
        refuse(ctx, "dp_delta", because="needs --dp-epsilon")
    if recipe == "best":
        refuse(ctx, *OF_PLAIN, because="does not go with --recipe best")
        from aisle.train.fit.recipe import train_best as run
    else:
        from aisle.train.fit.train import train

        run = partial(train, also=also or (), privacy=privacy)

    with resumable():
        result = run(
            data,
            text_column,
            label_column,
            out,
            settings,
            targets=targets,
            save_every=save_every,
            log_dir=log_dir,
            overwrite=overwrite,
            labelling=replace(labelling(fold_labels, label_map, min_rows), multi_label=multi_label),
        )
    report(result, as_json, _show_training, checkpoint_in(out))


@app.command()
@reads_tables
@takes(DecisionTargets, into="targets")
def decide(
    ctx: typer.Context,
    checkpoint: Checkpoint,
    targets: DecisionTargets,
    data: Annotated[
        Path | None, data_argument("The training table, for more texts than the checkpoint's sample has.")
    ] = None,
    untrained: Annotated[
        bool, typer.Option(help="The checkpoint was not trained on DATA; use all its texts but the held-out fifth.")
    ] = False,
    windows: TextWindows = 1,
    text_column: TextColumn = "text",
    label_column: LabelColumn = "category",
    as_json: Json = False,
) -> None:
    """Fit the decisions of a checkpoint again, to other targets or on other texts. It takes no training.

    `aisle train` fits them too. `aisle build` puts them into the next version.
    """
    if data is None:
        refuse(ctx, "untrained", "text_column", "label_column", because="needs DATA")
    from aisle.build.adopt import checkpoint_of
    from aisle.train.core.checkpoint import Checkpoint as Opened
    from aisle.train.core.sample import FILE as SAMPLE
    from aisle.train.fit.decide import decide as run

    if not checkpoint.is_dir():
        raise InputError(f"{checkpoint}: no such folder; decisions are written into the checkpoint's folder")
    if data is None and not (checkpoint / SAMPLE).is_file():
        raise InputError(f"{checkpoint} has no sample of its texts; name a table of labelled texts after it")
    with checkpoint_of(checkpoint, windows=windows) as folder:
        made = run(Opened(folder), data, text_column, label_column, targets, untrained=untrained)
        adopted = folder != checkpoint
    made.save(checkpoint)
    texts = ["--held-out", data, *other_columns(text_column)] if adopted else []
    texts += ["--windows", str(windows)] if windows > 1 else []
    following = f"decisions in {checkpoint}", "aisle", "build", checkpoint, *texts
    report({"checkpoint": str(checkpoint), **made.summary()}, as_json, _show_decisions, following)


@app.command()
@reads_tables
@takes(TrainingSettings, OF_PRETRAINING, epochs=5)
def pretrain(
    ctx: typer.Context,
    data: TextTables,
    out: Annotated[
        Path,
        typer.Option(
            "-o", "--output", callback=folder_to_write, help="The folder to write, for `aisle train --model`."
        ),
    ],
    settings: TrainingSettings,
    text_column: TextColumn = "text",
    save_every: SaveEvery = None,
    log_dir: LogDir = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Pretrain a BERT on texts without labels, by predicting masked words.

    Texts that `aisle train` holds out are not used.
    """
    refuse_ignored(ctx, settings)
    check_columns(data[1:], text_column)  # `run` starts with the first table
    from aisle.train.fit.pretrain import pretrain as run

    with resumable():
        result = run(data, text_column, out, settings, save_every=save_every, log_dir=log_dir, overwrite=overwrite)
    following = f"language model in {out}", "aisle", "train", "DATA", "--model", out, "-o", "checkpoint"
    guessed = result["epochs"][-1]["accuracy"]
    report(result, as_json, lambda _: show(f"{guessed:.1%} of the masked words predicted correctly"), following)


def refuse_ignored(ctx: typer.Context, settings: TrainingSettings) -> None:
    """Refuse options that have no effect with the chosen model or techniques.

    Raises:
        InputError: the command line gives one of them.
    """
    if not settings.from_scratch:
        refuse(ctx, *SCRATCH_ONLY, because=f"is for a model from scratch; --model {settings.model} has its own")
    if not settings.augment and "augment_rate" in ctx.params:
        refuse(ctx, "augment_rate", because="needs --augment TECHNIQUE")


def _show_training(result: dict[str, Any]) -> None:
    show_metrics(result)
    if "teachers" in result:
        taught = result["teachers"]
        show(f"its teachers and the SVM together: accuracy {taught['accuracy']:.4f}, macro-F1 {taught['macro_f1']:.4f}")
    if "cross_validation" in result:
        mean, deviation = result["cross_validation"]["mean"], result["cross_validation"]["deviation"]
        spread = ", ".join(f"{name} {mean[name]:.4f} ± {deviation[name]:.4f}" for name in mean)
        show(f"over {len(result['cross_validation']['folds'])} folds: {spread}")
    show_attributes(result.get("attributes", {}))
    if "privacy" in result:
        spent = result["privacy"]
        show(f"differential privacy: epsilon {spent['epsilon']:.2f} at delta {spent['delta']:g}")
    if "search" in result:
        found = result["search"]
        show(
            f"search: {found['recall_at_10']:.1%} of {found['queries']} texts of groups that were not learnt find "
            f"their group among the 10 nearest of {found['texts']} texts (TF-IDF: {found['tfidf_recall_at_10']:.1%})"
        )


def _show_decisions(result: dict[str, Any]) -> None:
    columns = {
        "name": "category",
        "threshold": "accepted from",
        "share": "expected share",
        "rows": "texts",
        "shared_by": "categories that share it",
    }
    for above, level in enumerate(result["levels"]):
        show_rows(columns, level, f"{above} level(s) above the categories" if above else "categories")
    show(
        f"expected, of {result['rows']} texts: {result['accepted']:.1%} accepted; of a further {result['parents']:.1%} "
        "the upper level is sure"
    )
