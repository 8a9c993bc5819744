"""Learning: labelled texts to a checkpoint, and what helps it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from aisle.commands import Json, LabelColumn, TextColumn, report, show_metrics, show_rows
from aisle.console import say, stdout

app = typer.Typer()
Data = Annotated[Path, typer.Option(help="Labelled texts: CSV, TSV, JSONL (or .gz) or Parquet.")]
Model = Annotated[str, typer.Option(help="A Hugging Face BERT (folder or hub name), or 'scratch'.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Texts a step, on all devices together.")]
LearningRate = Annotated[
    float | None,
    typer.Option(min=0, help="At its highest; default: 5e-4 from scratch, 3e-5 for a BERT-base."),
]
Layers = Annotated[int, typer.Option(min=1, help="Of a model from scratch.")]
HiddenSize = Annotated[int, typer.Option(min=64, help="Of a model from scratch, a multiple of 64.")]
MaxTokens = Annotated[int, typer.Option(min=8, max=512, help="Tokens of a text; the rest is cut off.")]
Dropout = Annotated[float, typer.Option(min=0, max=0.9)]
ClassWeight = Annotated[
    float, typer.Option(min=0, max=1, help="0: all rows count alike, 1: all categories, 0.5: between.")
]
Augment = Annotated[list[str] | None, typer.Option(help="Vary the texts by a technique; give it once for each.")]
AugmentRate = Annotated[float, typer.Option(min=0, max=1, help="Share of a text that is varied.")]
ClassFloor = Annotated[int, typer.Option(min=0, help="Repeat rows of rarer categories up to so many.")]
Patience = Annotated[int, typer.Option(min=1, help="Stop after so many epochs that got no better.")]
Accumulate = Annotated[int, typer.Option(min=1, help="Compute a step's texts in so many parts, to save memory.")]
SaveEvery = Annotated[
    int | None, typer.Option(min=1, help="Steps that a kill can lose; default: as few as cost under 2 % of the time.")
]
LogDir = Annotated[Path | None, typer.Option(help="Log to TensorBoard here.")]


@app.command()
def train(
    data: Data,
    out: Annotated[Path, typer.Option("-o", "--output", help="The checkpoint folder to write.")],
    text_column: TextColumn = "text",
    label_column: LabelColumn = "category",
    model: Model = "scratch",
    layers: Layers = 4,
    hidden_size: HiddenSize = 256,
    epochs: Annotated[int, typer.Option(min=1)] = 2,
    batch_size: BatchSize = 64,
    learning_rate: LearningRate = None,
    max_tokens: MaxTokens = 128,
    dropout: Dropout = 0.1,
    weight_decay: Annotated[float, typer.Option(min=0)] = 0.01,
    layer_decay: Annotated[
        float | None,
        typer.Option(min=0.1, max=1, help="Rate of a layer to the next; default: 0.95, from scratch 1."),
    ] = None,
    class_weight: ClassWeight = 0.0,
    focal: Annotated[float, typer.Option(min=0, help="Gamma of the focal loss; 0 is plain cross-entropy.")] = 0.0,
    label_smoothing: Annotated[float, typer.Option(min=0, max=0.9)] = 0.0,
    level_weight: Annotated[
        float, typer.Option(min=0, help="Of the loss at each level above the leaves, in categories like 'A > B > C'.")
    ] = 0.0,
    augment: Augment = None,
    augment_rate: AugmentRate = 0.3,
    class_floor: ClassFloor = 0,
    mixup: Annotated[float, typer.Option(min=0, help="Mix the embeddings of two texts by beta(a, a).")] = 0.0,
    accumulate: Accumulate = 1,
    patience: Patience = 2,
    folds: Annotated[int, typer.Option(min=0, help="Cross-validate in so many folds first.")] = 0,
    seed: int = 0,
    save_every: SaveEvery = None,
    log_dir: LogDir = None,
    as_json: Json = False,
) -> None:
    """Train a classifier; a fifth of the texts is held out to measure it.

    Started again after a kill it goes on. `torchrun --nproc-per-node N -m aisle train …` uses N devices.
    """
    from aisle.train.settings import Settings
    from aisle.train.train import train as run

    settings = Settings(
        model=model,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        dropout=dropout,
        max_tokens=max_tokens,
        seed=seed,
        augment=tuple(augment or ()),
        augment_rate=augment_rate,
        class_floor=class_floor,
        mixup=mixup,
        layer_decay=layer_decay,
        class_weight=class_weight,
        focal=focal,
        label_smoothing=label_smoothing,
        level_weight=level_weight,
        accumulate=accumulate,
        patience=patience,
        folds=folds,
        layers=layers,
        hidden_size=hidden_size,
    )
    result = run(data, text_column, label_column, out, settings, save_every=save_every, log_dir=log_dir)
    report(result, as_json, _show_training)


@app.command()
def pretrain(
    data: Annotated[list[Path], typer.Argument(help="Tables of texts; labels are not needed.")],
    out: Annotated[Path, typer.Option("-o", "--output", help="The folder to write, for `aisle train --model`.")],
    text_column: TextColumn = "text",
    model: Model = "scratch",
    layers: Layers = 4,
    hidden_size: HiddenSize = 256,
    epochs: Annotated[int, typer.Option(min=1)] = 5,
    batch_size: BatchSize = 64,
    learning_rate: LearningRate = None,
    max_tokens: MaxTokens = 128,
    accumulate: Accumulate = 1,
    seed: int = 0,
    save_every: SaveEvery = None,
    log_dir: LogDir = None,
    as_json: Json = False,
) -> None:
    """Teach a BERT the language of texts without labels, by masked words; what `aisle train` holds out is left out."""
    from aisle.train.pretrain import pretrain as run
    from aisle.train.settings import Settings

    settings = Settings(
        model,
        epochs,
        batch_size,
        learning_rate,
        max_tokens=max_tokens,
        accumulate=accumulate,
        seed=seed,
        layers=layers,
        hidden_size=hidden_size,
    )
    result = run(data, text_column, out, settings, save_every=save_every, log_dir=log_dir)
    report(result, as_json, lambda r: say(f"{out}: {r['epochs'][-1]['accuracy']:.1%} of the masked words guessed"))


@app.command()
def search(
    data: Data,
    out: Annotated[Path, typer.Option("-o", "--output", help="The folder of the search; it goes on from there.")],
    text_column: TextColumn = "text",
    label_column: LabelColumn = "category",
    trials: Annotated[int, typer.Option(min=1, help="Settings to try, in all.")] = 20,
    model: Model = "scratch",
    epochs: Annotated[int, typer.Option(min=1, help="Of each trial.")] = 2,
    max_tokens: MaxTokens = 128,
    seed: int = 0,
    as_json: Json = False,
) -> None:
    """Search for the best settings of `aisle train`; the held-out fifth is not looked at."""
    from aisle.train.search import search as run
    from aisle.train.settings import Settings

    settings = Settings(model, epochs, max_tokens=max_tokens, seed=seed)
    result = run(data, text_column, label_column, out, settings, trials)
    report(result, as_json, _show_search)


@app.command()
def ablate(
    data: Annotated[Path, typer.Argument(help="Labelled texts: CSV, TSV, JSONL (or .gz) or Parquet.")],
    out: Annotated[Path, typer.Option("-o", "--output", help="The folder of the ablation; it goes on from there.")],
    text_column: TextColumn = "text",
    label_column: LabelColumn = "category",
    technique: Annotated[
        list[str] | None, typer.Option(help="Give it once for each.", show_default="all there are")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Texts that each training draws.")] = 4000,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings with each technique.")] = 3,
    model: Model = "scratch",
    epochs: Annotated[int, typer.Option(min=1)] = 4,
    max_tokens: MaxTokens = 64,
    augment_rate: Annotated[float, typer.Option(min=0, max=1, help="Probability that a text is varied.")] = 0.5,
    as_json: Json = False,
) -> None:
    """Measure what each augmentation adds to training; the held-out fifth is not looked at."""
    from aisle.train.ablate import COLUMNS, NAMES
    from aisle.train.ablate import ablate as run
    from aisle.train.settings import Settings

    settings = Settings(model, epochs, max_tokens=max_tokens, augment_rate=augment_rate)
    techniques = tuple(technique or NAMES)
    result = run(data, text_column, label_column, out, settings, rows=rows, seeds=seeds, techniques=techniques)
    report(result, as_json, lambda r: show_rows(COLUMNS, r["techniques"]))


@app.command()
def study(
    data: Data,
    out: Annotated[Path, typer.Option("-o", "--output", help="The folder of the study; it goes on from there.")],
    text_column: TextColumn = "text",
    label_column: LabelColumn = "category",
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each kind.")] = 3,
    epochs: Annotated[int, typer.Option(min=1)] = 4,
    pretraining_epochs: Annotated[int, typer.Option(min=1)] = 8,
    max_tokens: MaxTokens = 128,
    augment: Annotated[list[str] | None, typer.Option(help="The techniques of the step with augmentation.")] = None,
    class_floor: Annotated[int, typer.Option(min=0, help="Likewise: repeat rows of rarer categories.")] = 0,
    as_json: Json = False,
) -> None:
    """Measure what pretraining, augmentation, distillation and INT8 bring on a table, over several seeds."""
    from aisle.train.settings import Settings
    from aisle.train.study import COLUMNS
    from aisle.train.study import study as run

    settings = Settings(epochs=epochs, max_tokens=max_tokens, augment=tuple(augment or ()), class_floor=class_floor)
    result = run(data, text_column, label_column, out, settings, pretraining_epochs=pretraining_epochs, seeds=seeds)
    report(result, as_json, lambda r: show_rows(COLUMNS, r["steps"]))


@app.command()
def distil(
    teachers: Annotated[list[Path], typer.Argument(metavar="TEACHER…", help="Checkpoints; several teach together.")],
    data: Data,
    out: Annotated[Path, typer.Option("-o", "--output", help="The checkpoint folder to write.")],
    text_column: TextColumn = "text",
    label_column: LabelColumn = "category",
    unlabelled: Annotated[
        list[Path] | None, typer.Option(help="A table of further texts; give it once for each.")
    ] = None,
    layers: Annotated[
        int | None, typer.Option(min=1, help="Of the student.", show_default="half of the teacher's")
    ] = None,
    hidden_size: Annotated[
        int | None, typer.Option(min=1, help="Of the student.", show_default="the teacher's")
    ] = None,
    model: Annotated[
        str, typer.Option(help="A Hugging Face BERT to start from, or 'scratch': from the teacher's layers.")
    ] = "scratch",
    temperature: Annotated[float, typer.Option(min=0.1, help="Softens the teachers' probabilities.")] = 2.0,
    label_weight: Annotated[float, typer.Option(min=0, max=1, help="Of the labels beside the teachers.")] = 0.5,
    hidden_weight: Annotated[float, typer.Option(min=0, help="Of the hidden states' error; 0: not compared.")] = 1.0,
    linear_share: Annotated[
        float, typer.Option(min=0, max=1, help="Of a TF-IDF + linear SVM among the teachers; it helps on few texts.")
    ] = 0.0,
    prune: Annotated[bool, typer.Option(help="Drop the pieces of the vocabulary that no text holds.")] = True,
    epochs: Annotated[int, typer.Option(min=1)] = 6,
    batch_size: BatchSize = 64,
    learning_rate: LearningRate = None,
    dropout: Dropout = 0.1,
    class_weight: ClassWeight = 0.0,
    augment: Augment = None,
    augment_rate: AugmentRate = 0.3,
    class_floor: ClassFloor = 0,
    accumulate: Accumulate = 1,
    patience: Patience = 2,
    seed: int = 0,
    save_every: SaveEvery = None,
    log_dir: LogDir = None,
    as_json: Json = False,
) -> None:
    """Teach a smaller classifier to answer as large ones do; measured on the same held-out fifth."""
    from aisle.train.distil import Plan
    from aisle.train.distil import distil as run
    from aisle.train.settings import Settings

    settings = Settings(
        model=model,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        dropout=dropout,
        seed=seed,
        augment=tuple(augment or ()),
        augment_rate=augment_rate,
        class_floor=class_floor,
        class_weight=class_weight,
        accumulate=accumulate,
        patience=patience,
    )
    plan = Plan(layers, hidden_size, temperature, label_weight, hidden_weight, linear_share, prune)
    result = run(
        teachers,
        data,
        text_column,
        label_column,
        out,
        settings,
        plan,
        extra=unlabelled or (),
        save_every=save_every,
        log_dir=log_dir,
    )
    report(result, as_json, _show_distillation)


@app.command()
def prune(
    checkpoint: Annotated[Path, typer.Argument(help="A folder that `aisle train` or `aisle distil` made.")],
    data: Annotated[list[Path], typer.Option(help="A table of the texts to come; give it once for each.")],
    out: Annotated[Path, typer.Option("-o", "--output", help="The checkpoint folder to write.")],
    text_column: TextColumn = "text",
    least: Annotated[int, typer.Option(min=1, help="Keep a piece that occurs so often; characters always stay.")] = 1,
    as_json: Json = False,
) -> None:
    """Drop what the texts do not use from a checkpoint's vocabulary; with --least 1 they are answered as before."""
    from aisle.train.prune import prune as run

    report(run(checkpoint, data, text_column, out, least), as_json, _show_pruning)


def _show_distillation(result: dict[str, Any]) -> None:
    show_metrics(result)
    taught, sizes = result["teachers"], result["parameters"]
    stdout.print(f"the teachers: accuracy {taught['accuracy']:.4f}, macro-F1 {taught['macro_f1']:.4f}")
    stdout.print(f"{sizes['student'] / 1e6:.1f} million parameters of the first teacher's {sizes['teacher'] / 1e6:.1f}")


def _show_pruning(result: dict[str, Any]) -> None:
    pieces, weights = result["vocabulary"], result["bytes"]
    stdout.print(f"{pieces['after']} pieces of {pieces['before']}")
    stdout.print(f"{weights['after'] / 1e6:.1f} MB of {weights['before'] / 1e6:.1f}")
    rows = result["rows"]["held_out"]
    stdout.print(f"agreement {result['agreement']:.2%}, accuracy {result['accuracy']:.4f} on {rows} held-out texts")


def _show_training(result: dict[str, Any]) -> None:
    show_metrics(result)
    if "cross_validation" in result:
        mean, deviation = result["cross_validation"]["mean"], result["cross_validation"]["deviation"]
        spread = ", ".join(f"{name} {mean[name]:.4f} ± {deviation[name]:.4f}" for name in mean)
        stdout.print(f"over {len(result['cross_validation']['folds'])} folds: {spread}")


def _show_search(result: dict[str, Any]) -> None:
    names = list(result["best"]["settings"])
    table = Table("score", *names)
    for trial in sorted(result["trials"], key=lambda trial: trial["score"] or 0.0, reverse=True):
        table.add_row(f"{trial['score']:.4f}", *(f"{trial['settings'][name]:.3g}" for name in names))
    stdout.print(table)
    stdout.print(Text(result["train_with"] + " --data … -o …"), soft_wrap=True)
