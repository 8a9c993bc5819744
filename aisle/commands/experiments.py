"""Experiments: search for settings, and measure what each technique and each stage of training adds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from aisle.commands import Json, LabelColumn, Table, TextColumn, other_columns, report, show_rows
from aisle.commands.command import Stage, choices, folder_to_write, resumable
from aisle.commands.options import takes
from aisle.commands.tables import reads_tables
from aisle.console import new_table, stdout
from aisle.errors import InputError
from aisle.train.core.settings import PRETRAINING_EPOCHS, TrainingSettings

app = Stage()


def folder_of_experiment(ctx: typer.Context, path: Path) -> Path:
    """As `folder_to_write`, of a folder that holds no checkpoint.

    Raises:
        InputError: naming what stands in the way.
    """
    if (path / "labels.json").exists():
        raise InputError(f"{path} holds a checkpoint; choose another folder")
    folder_to_write(ctx, path)
    return path


ExperimentFolder = Annotated[
    Path,
    typer.Option(
        "-o", "--output", callback=folder_of_experiment, help="The folder of the results. A later run resumes there."
    ),
]


def techniques_of_ablation() -> tuple[str, ...]:
    from aisle.train.experiments.ablate import NAMES

    return NAMES


@app.command()
@reads_tables
@takes(TrainingSettings, ("model", "epochs", "max_tokens", "seed"))
def search(
    data: Table,
    out: ExperimentFolder,
    settings: TrainingSettings,
    text_column: TextColumn = "text",
    label_column: LabelColumn = "category",
    trials: Annotated[
        int, typer.Option(min=1, help="Number of trials, including those of earlier runs in the folder.")
    ] = 20,
    as_json: Json = False,
) -> None:
    """Search for the best settings of `aisle train`. The held-out fifth is not used."""
    from aisle.train.experiments.search import search as run

    with resumable():
        result = run(data, text_column, label_column, out, settings, trials)
    columns = other_columns(text_column, label_column)
    best = result["train_with"].split()
    report(result, as_json, _show_search, (f"search in {out}", *best, data, *columns, "-o", "checkpoint"))


@app.command()
@reads_tables
@takes(TrainingSettings, ("model", "epochs", "max_tokens", "augment_rate"), epochs=4, max_tokens=64, augment_rate=0.5)
def ablate(
    data: Table,
    out: ExperimentFolder,
    settings: TrainingSettings,
    text_column: TextColumn = "text",
    label_column: LabelColumn = "category",
    techniques: Annotated[
        list[str] | None, choices(techniques_of_ablation, "A technique to measure; repeatable.", "all")
    ] = None,
    rows: Annotated[int, typer.Option(min=32, help="Texts of each training, drawn at random.")] = 4000,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings with each technique, each with another seed.")] = 3,
    as_json: Json = False,
) -> None:
    """Measure what each augmentation technique adds. The held-out fifth is not used."""
    from aisle.train.experiments.ablate import COLUMNS, NAMES
    from aisle.train.experiments.ablate import ablate as run

    chosen = tuple(techniques or NAMES)
    with resumable():
        result = run(data, text_column, label_column, out, settings, rows=rows, seeds=seeds, techniques=chosen)
    report(result, as_json, lambda r: show_rows(COLUMNS, r["techniques"]), (f"page in {out / 'report.html'}",))


@app.command()
@reads_tables
@takes(TrainingSettings, ("epochs", "max_tokens", "augment", "class_floor"), epochs=4)
def stages(
    data: Table,
    out: ExperimentFolder,
    settings: TrainingSettings,
    text_column: TextColumn = "text",
    label_column: LabelColumn = "category",
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each stage, each with another seed.")] = 3,
    pretraining_epochs: Annotated[int, typer.Option(min=1, help="Epochs of the pretraining.")] = PRETRAINING_EPOCHS,
    as_json: Json = False,
) -> None:
    """Measure what augmentation, pretraining, distillation and INT8 change, over several seeds.

    --augment and --class-floor apply only to the stage with augmentation.
    """
    from aisle.pipelines.stages import COLUMNS
    from aisle.pipelines.stages import measure_stages as run

    with resumable():
        result = run(data, text_column, label_column, out, settings, pretraining_epochs=pretraining_epochs, seeds=seeds)
    report(result, as_json, lambda r: show_rows(COLUMNS, r["steps"]), (f"page in {out / 'report.html'}",))


def _show_search(result: dict[str, Any]) -> None:
    names = list(result["best"]["settings"])
    table = new_table("score", *names)
    for trial in sorted(result["trials"], key=lambda trial: trial["score"] or 0.0, reverse=True):
        table.add_row(f"{trial['score']:.4f}", *(f"{trial['settings'][name]:.3g}" for name in names))
    stdout.print(table)
