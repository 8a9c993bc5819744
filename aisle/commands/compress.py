"""Compression: distil a smaller classifier, and prune the vocabulary."""

from __future__ import annotations

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
    check_columns,
    checkpoint_in,
    report,
    show_metrics,
)
from aisle.commands.command import Stage, file_to_read, resumable
from aisle.commands.learn import refuse_ignored
from aisle.commands.options import takes
from aisle.commands.tables import reads_tables
from aisle.console import show
from aisle.train.core.settings import StudentSpec, TrainingSettings

app = Stage()
OF_STUDENT = (
    *("model", "epochs", "batch_size", "learning_rate", "dropout", "class_weight", "augment", "augment_rate"),
    *("class_floor", "accumulate", "patience", "seed"),
)


@app.command()
@reads_tables
@takes(StudentSpec, into="student")
@takes(TrainingSettings, OF_STUDENT, epochs=6)
def distil(
    ctx: typer.Context,
    teachers: Annotated[list[Path], typer.Argument(metavar="TEACHER", help="One or more checkpoints to learn from.")],
    data: Table,
    out: Output,
    student: StudentSpec,
    settings: TrainingSettings,
    text_column: TextColumn = "text",
    label_column: LabelColumn = "category",
    unlabelled: Annotated[
        list[Path] | None,
        typer.Option(callback=file_to_read, help="A table of further texts without labels; repeatable."),
    ] = None,
    save_every: SaveEvery = None,
    log_dir: LogDir = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Train a smaller classifier, the student, to predict like larger ones, the teachers.

    Both are measured on the held-out fifth. With --model scratch the student starts from the first teacher's layers.
    """
    refuse_ignored(ctx, settings)
    check_columns(unlabelled or (), text_column)
    from aisle.train.fit.distil import distil as run

    with resumable():
        result = run(
            teachers,
            data,
            text_column,
            label_column,
            out,
            settings,
            student,
            extra=unlabelled or (),
            save_every=save_every,
            log_dir=log_dir,
            overwrite=overwrite,
        )
    report(result, as_json, _show_distillation, checkpoint_in(out))


@app.command()
@reads_tables
def prune(
    checkpoint: Checkpoint,
    data: TextTables,
    out: Output,
    text_column: TextColumn = "text",
    least: Annotated[
        int, typer.Option(min=1, help="Keep pieces that occur at least this often. Single characters always stay.")
    ] = 1,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Remove the vocabulary pieces that the texts do not use. With --least 1, their predictions stay the same."""
    check_columns(data, text_column)
    from aisle.train.fit.prune import prune as run

    result = run(checkpoint, data, text_column, out, least, overwrite=overwrite)
    report(result, as_json, _show_pruning, checkpoint_in(out))


def _show_distillation(result: dict[str, Any]) -> None:
    show_metrics(result)
    taught, sizes = result["teachers"], result["parameters"]
    show(f"the teachers: accuracy {taught['accuracy']:.4f}, macro-F1 {taught['macro_f1']:.4f}")
    show(f"{sizes['student'] / 1e6:.1f} million parameters of the first teacher's {sizes['teacher'] / 1e6:.1f}")


def _show_pruning(result: dict[str, Any]) -> None:
    pieces, weights = result["vocabulary"], result["bytes"]
    show(f"{pieces['after']} pieces of {pieces['before']}")
    show(f"{weights['after'] / 1e6:.1f} MB of {weights['before'] / 1e6:.1f}")
    rows = result["rows"]["held_out"]
    show(f"agreement {result['agreement']:.2%}, accuracy {result['accuracy']:.4f} on {rows} held-out texts")
