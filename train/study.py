"""Study: what each step of learning brings on one's own data, over several seeds and beside the baseline.

From scratch, with augmentation, pretrained on the texts without their labels, distilled into one of the same size from
all of these but the augmented and from the baseline, and that one in INT8. All are measured on the same held-out fifth.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from aisle.build.build import build
from aisle.build.engine import load_engine
from aisle.build.gate import predict
from aisle.console import say
from aisle.files import write_json
from aisle.preprocess.clean import Table, clean_rows
from aisle.preprocess.encode import Encoder
from aisle.preprocess.table import fingerprint, read_labelled
from aisle.report import Page
from aisle.train.checkpoint import read_labels
from aisle.train.data import Split, split
from aisle.train.distil import Plan, distil
from aisle.train.evaluation_report import BLUE, GREY
from aisle.train.experiment import FIGURES, begin, summarize
from aisle.train.linear import LinearSvm
from aisle.train.metrics import score
from aisle.train.pretrain import pretrain
from aisle.train.settings import Settings
from aisle.train.train import train

BASELINE = "TF-IDF + linear SVM"
COLUMNS = {
    "step": "step",
    "accuracy": "accuracy",
    "added_accuracy": "added",
    "error_accuracy": "± error",
    "macro_f1": "macro-F1",
    "added_macro_f1": "added",
    "error_macro_f1": "± error",
    "seeds": "seeds",
}


def study(
    data: Path,
    text_column: str,
    label_column: str,
    out: Path,
    settings: Settings,
    *,
    pretraining_epochs: int,
    seeds: int,
) -> dict[str, Any]:
    """Take every step with each seed; leave the checkpoints, study.json and report.html in `out`.

    A study that was stopped goes on when it is started again, with more seeds if wanted. The pretraining itself is done
    once, with the first seed, and so is what the INT8 engine is calibrated with.

    Args:
        settings: of each training; what it says of augmentation is left to the step of that name.

    Raises:
        InputError: the table cannot be learnt from, or `out` holds another study.
        GateError: an INT8 engine does not agree with its checkpoint.
    """
    table, _ = clean_rows(read_labelled(data, text_column, label_column))
    parts = split(table)
    about = {
        "data": {"file": data.name, "sha256": fingerprint(data), "columns": [text_column, label_column]},
        "rows": {name: len(getattr(parts, name).texts) for name in ("train", "validation", "held_out")},
        "settings": asdict(settings),
        "pretraining_epochs": pretraining_epochs,
    }
    runs = begin(out / "study.json", about)
    plain = replace(settings, augment=(), class_floor=0, mixup=0.0)
    language = out / "language-model"

    def folder(step: str, seed: int) -> Path:
        return out / f"seed-{seed}" / step.replace(" ", "-")

    def take(step: str, seed: int, measured: Callable[..., dict[str, Any]], *arguments: Any) -> None:
        if any(run["step"] == step and run["seed"] == seed for run in runs):
            return
        say(f"seed {seed}: {step}")
        metrics = measured(*arguments)
        runs.append({"step": step, "seed": seed, **{name: metrics[name] for name in FIGURES}})
        say(f"seed {seed}: {step}: " + ", ".join(f"{name} {metrics[name]:.4f}" for name in FIGURES))
        write_json(out / "study.json", {**about, "runs": runs, "steps": summarize(runs, "step", BASELINE)})

    def learn(step: str, told: Settings) -> None:
        take(step, told.seed, train, data, text_column, label_column, folder(step, told.seed), told)

    for seed in range(seeds):
        take(BASELINE, seed, _baseline, parts)
        learn("from scratch", replace(plain, seed=seed))
        if settings.augment or settings.class_floor or settings.mixup:
            learn("with augmentation", replace(settings, seed=seed))
        if not (language / "pretraining.json").is_file():
            pretrain([data], text_column, language, replace(plain, epochs=pretraining_epochs))
        learn("pretrained", replace(plain, seed=seed, model=str(language)))
    teachers = [folder(step, seed) for seed in range(seeds) for step in ("pretrained", "from scratch")]
    # The teachers are no larger than the student: it learns from how they differ, not from what goes on inside one.
    plan = Plan(layers=settings.layers, hidden_weight=0.0, linear_share=0.5)
    for seed in range(seeds):
        student, first = folder("distilled", seed), folder("pretrained", seed)
        school = [first, *(each for each in teachers if each != first)]
        # Soft labels are learnt by heart later than labels (Beyer et al. 2022, arXiv:2106.05237).
        told = replace(plain, seed=seed, epochs=2 * plain.epochs)
        take("distilled", seed, distil, school, data, text_column, label_column, student, told, plan)
        take("distilled, INT8", seed, _int8, student, folder("int8", seed), parts)
    result = {**about, "runs": runs, "steps": summarize(runs, "step", BASELINE)}
    _page(result).write(out / "report.html")
    return result


def _baseline(parts: Split) -> dict[str, Any]:
    known = Table(parts.train.texts + parts.validation.texts, parts.train.labels + parts.validation.labels)
    return score(parts.held_out.labels, LinearSvm(known).predict(parts.held_out.texts))


def _int8(checkpoint: Path, repository: Path, parts: Split) -> dict[str, Any]:
    """Build the engine that is served, and measure it on all that is held out."""
    version = build(checkpoint, repository, "openvino", "int8")["version"]
    engine = load_engine(repository / "encoder" / str(version))
    labels = read_labels(checkpoint)
    logits = predict(engine, Encoder(checkpoint / "tokenizer.json").tokens(parts.held_out.texts))
    return score(parts.held_out.labels, [labels[i] for i in logits.argmax(axis=1)])


def _page(result: dict[str, Any]) -> Page:
    rows = result["steps"]
    counts = ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in result["rows"].items())
    page = Page(
        f"What each step of learning brings on {result['data']['file']}",
        f"Texts: {counts}. {result['settings']['epochs']} epochs each, {result['pretraining_epochs']} of pretraining. "
        "Means over the seeds; added is the difference to the baseline, beside it its standard error.",
    )
    page.table(list(COLUMNS.values()), [[row[key] for key in COLUMNS] for row in rows])
    figure = Figure(figsize=(8, 0.5 * len(rows) + 1), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, name in zip(axes, FIGURES, strict=True):
        axis.axvline(next(row[name] for row in rows if row["step"] == BASELINE), color=GREY)
        errors = [row[f"error_{name}"] or 0 for row in rows]
        axis.errorbar([row[name] for row in rows], [row["step"] for row in rows], xerr=errors, fmt="o", color=BLUE)
        axis.set_xlabel(name.replace("_", "-"))
        axis.grid(alpha=0.3, axis="x")
    axes[0].invert_yaxis()
    page.plot(figure, "Accuracy and macro-F1 of each step; the line is the baseline")
    return page
