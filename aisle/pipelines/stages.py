"""Stages: measure what each stage of training adds on a table, over several seeds and beside a linear baseline.

The stages are: from scratch; with augmentation; pretrained on the texts without labels; distilled into a student of the
same size; the student in INT8. The teachers are the models from scratch, the pretrained models, and the baseline. All
are measured on the same held-out fifth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from aisle.build.build import build
from aisle.build.engine import load_engine
from aisle.build.gate import predict
from aisle.console import say
from aisle.files import write_json
from aisle.palette import BLUE, GREY
from aisle.plots import percent_axis
from aisle.preprocess.clean import LabelledTexts, clean_rows
from aisle.preprocess.tables.table import fingerprint, read_labelled
from aisle.report import Page
from aisle.train.core.checkpoint import Checkpoint
from aisle.train.core.linear import LinearSvm
from aisle.train.core.metrics import score
from aisle.train.core.settings import TrainingSettings
from aisle.train.core.split import Split, split
from aisle.train.experiments.experiment import FIGURES, begin, summarize
from aisle.train.fit.distil import distil
from aisle.train.fit.model import check_settings
from aisle.train.fit.pretrain import pretrain
from aisle.train.fit.recipe import for_student, plain, same_size
from aisle.train.fit.train import train

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


class _Stages:
    """The runs of all stages and seeds, kept in stages.json."""

    def __init__(self, data: Path, columns: tuple[str, str], out: Path, about: dict[str, Any]) -> None:
        """Read the runs of an earlier start.

        Raises:
            InputError: `out` holds runs with another configuration.
        """
        self.data, self.columns, self.out, self.about = data, columns, out, about
        self.runs = begin(out / "stages.json", about)

    def folder(self, step: str, seed: int) -> Path:
        return self.out / f"seed-{seed}" / step.replace(" ", "-")

    def measure(
        self, step: str, seed: int, measured: Callable[[], dict[str, Any]], teachers: Sequence[str] = ()
    ) -> None:
        """Measure a step with a seed, unless an earlier start did so with the same teachers."""
        key = {"step": step, "seed": seed} | ({"teachers": sorted(teachers)} if teachers else {})
        if any(key.items() <= run.items() for run in self.runs):
            return
        # A student of other teachers, from an earlier start with fewer seeds, is replaced.
        self.runs[:] = [run for run in self.runs if (run["step"], run["seed"]) != (step, seed)]
        say(f"seed {seed}: {step}")
        metrics = measured()
        self.runs.append({**key, **{name: metrics[name] for name in FIGURES}})
        say(f"seed {seed}: {step}: " + ", ".join(f"{name} {metrics[name]:.4f}" for name in FIGURES))
        write_json(self.out / "stages.json", self.result())

    def train(self, step: str, settings: TrainingSettings) -> None:
        out = self.folder(step, settings.seed)
        self.measure(step, settings.seed, partial(train, self.data, *self.columns, out, settings, overwrite=True))

    def result(self) -> dict[str, Any]:
        return {**self.about, "runs": self.runs, "steps": summarize(self.runs, "step", BASELINE)}


def measure_stages(
    data: Path,
    text_column: str,
    label_column: str,
    out: Path,
    settings: TrainingSettings,
    *,
    pretraining_epochs: int,
    seeds: int,
) -> dict[str, Any]:
    """Run every stage with each seed; write the checkpoints, stages.json and report.html to `out`.

    A stopped run resumes when it is started again. It may then use more seeds: the students are trained again by the
    teachers of all seeds, so that each mean covers students of the same teachers. Pretraining runs once, with seed 0.

    Args:
        settings: of each training. Its augmentation applies to the stage "with augmentation" only.

    Raises:
        InputError: the table cannot be trained on, or `out` holds a run with another configuration.
        GateError: an INT8 engine does not agree with its checkpoint.
    """
    check_settings(settings)
    table, _ = clean_rows(read_labelled(data, text_column, label_column))
    parts = split(table)
    about = {
        "data": {"file": data.name, "sha256": fingerprint(data), "columns": [text_column, label_column]},
        "rows": {name: len(getattr(parts, name).texts) for name in ("train", "validation", "held_out")},
        "settings": asdict(settings),
        "pretraining_epochs": pretraining_epochs,
    }
    stages = _Stages(data, (text_column, label_column), out, about)
    seeds = max([seeds, *(run["seed"] + 1 for run in stages.runs)])  # the seeds of earlier starts teach as well
    for seed in range(seeds):
        _train_teachers(stages, parts, replace(settings, seed=seed), pretraining_epochs)
    for seed in range(seeds):
        _train_student(stages, parts, replace(settings, seed=seed), seeds)
    result = stages.result()
    _page(result).write(out / "report.html")
    return result


def _train_teachers(stages: _Stages, parts: Split, settings: TrainingSettings, pretraining_epochs: int) -> None:
    """Measure the baseline and the stages from scratch, with augmentation and pretrained, with one seed."""
    unvaried, language = plain(settings), stages.out / "language-model"
    stages.measure(BASELINE, settings.seed, partial(_baseline, parts))
    stages.train("from scratch", unvaried)
    if settings != unvaried:
        stages.train("with augmentation", settings)
    if not (language / "pretraining.json").is_file():
        pretraining = replace(unvaried, seed=0, epochs=pretraining_epochs)
        pretrain([stages.data], stages.columns[0], language, pretraining, overwrite=True)
    stages.train("pretrained", replace(unvaried, model=str(language)))


def _train_student(stages: _Stages, parts: Split, settings: TrainingSettings, seeds: int) -> None:
    """Measure a student of the teachers of all seeds, and its INT8 engine; its first teacher has its own seed."""
    seed = settings.seed
    first = stages.folder("pretrained", seed)
    others = [stages.folder(step, each) for each in range(seeds) for step in ("pretrained", "from scratch")]
    teachers = [first, *(each for each in others if each != first)]
    names = [str(each.relative_to(stages.out)) for each in teachers]
    longer, spec = for_student(plain(settings)), same_size(settings.layers)
    student = stages.folder("distilled", seed)
    learn = partial(distil, teachers, stages.data, *stages.columns, student, longer, spec, overwrite=True)
    stages.measure("distilled", seed, learn, names)
    stages.measure("distilled, INT8", seed, partial(_int8, student, stages.folder("int8", seed), parts), names)


def _baseline(parts: Split) -> dict[str, Any]:
    known = LabelledTexts(parts.train.texts + parts.validation.texts, parts.train.labels + parts.validation.labels)
    return score(parts.held_out.labels, LinearSvm(known).predict(parts.held_out.texts))


def _int8(checkpoint: Path, repository: Path, parts: Split) -> dict[str, Any]:
    """Build the engine that would be served, and measure it on the held-out part."""
    version = build(checkpoint, repository, "openvino", "int8")["version"]
    engine = load_engine(repository / "encoder" / str(version))
    source = Checkpoint(checkpoint)
    logits = predict(engine, source.tokenizer.tokens(parts.held_out.texts))
    return score(parts.held_out.labels, [source.labels[i] for i in logits.argmax(axis=1)])


def _page(result: dict[str, Any]) -> Page:
    rows = result["steps"]
    counts = ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in result["rows"].items())
    page = Page(
        f"What each stage of learning adds on {result['data']['file']}",
        f"Texts: {counts}. {result['settings']['epochs']} epochs each, {result['pretraining_epochs']} of pretraining. "
        'Figures are means over the seeds. "added" is the difference to the baseline, "± error" its standard error.',
        result["settings"],
    )
    page.records(COLUMNS, rows)
    page.plot(_figure(rows), "Accuracy and macro-F1 of each stage")
    return page


def _figure(rows: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(9, 0.5 * len(rows) + 1.5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, name in zip(axes, FIGURES, strict=True):
        reference = next(row[name] for row in rows if row["step"] == BASELINE)
        axis.axvline(reference, color=GREY, label="baseline")
        values, errors = [row[name] for row in rows], [row[f"error_{name}"] or 0 for row in rows]
        names = [row["step"] for row in rows]
        axis.errorbar(values, names, xerr=errors, fmt="o", color=BLUE, label="mean ± standard error")
        axis.set_xlabel({"macro_f1": "macro-F1"}.get(name, name))
        percent_axis(axis, "x", whole=False)
        axis.grid(alpha=0.3, axis="x")
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return figure
