"""Ablation: measure what each augmentation technique adds on your own data, compared with no augmentation.

The held-out fifth is not used, so it still gives an unbiased score of the technique that you choose.
"""

from __future__ import annotations

import random
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from aisle.console import say
from aisle.errors import InputError
from aisle.files import write_json
from aisle.palette import BLUE, GREY
from aisle.plots import legend
from aisle.preprocess.augment import TECHNIQUES
from aisle.preprocess.clean import LabelledTexts, clean_rows
from aisle.preprocess.tables.table import fingerprint, read_labelled
from aisle.report import Page
from aisle.train.core.processes import processes
from aisle.train.core.settings import TrainingSettings
from aisle.train.core.split import Split, split
from aisle.train.experiments.experiment import FIGURES, Runs, begin, summarize
from aisle.train.fit.loop import Hooks
from aisle.train.fit.model import check_settings
from aisle.train.fit.train import learn, measure

NAMES = ("none", *TECHNIQUES, "floor", "mixup", "all")
MIXUP = 0.2  # of the beta distribution (Zhang et al. 2018 advise 0.1 to 0.4)
COLUMNS = {
    "technique": "technique",
    "macro_f1": "macro-F1",
    "added_macro_f1": "added",
    "error_macro_f1": "± error",
    "accuracy": "accuracy",
    "added_accuracy": "added",
    "error_accuracy": "± error",
    "seeds": "seeds",
}


def ablate(
    data: Path,
    text_column: str,
    label_column: str,
    out: Path,
    settings: TrainingSettings,
    *,
    rows: int,
    seeds: int,
    techniques: tuple[str, ...] = NAMES,
) -> dict[str, Any]:
    """Train with each technique and with none, `seeds` times on `rows` texts, and measure on the validation part.

    Each seed draws one set of texts for all techniques, so differences are paired by seed. Writes ablation.json to
    `out` after each training, and report.html last. Started again, it resumes, also with more seeds or techniques.

    Raises:
        InputError: a technique is unknown, the table cannot be learnt from, or `out` holds another ablation.
    """
    unknown = sorted(set(techniques) - set(NAMES))
    if unknown:
        raise InputError(f"there is no {unknown[0]!r}; choose from {', '.join(NAMES)}")
    check_settings(settings)
    table, _ = clean_rows(read_labelled(data, text_column, label_column))
    whole = split(table)
    if not whole.validation.texts:
        raise InputError(f"{len(table.texts)} rows are too few to compare techniques; add rows")
    about = {
        "data": {"file": data.name, "sha256": fingerprint(data), "columns": [text_column, label_column]},
        "rows": {"train": min(rows, len(whole.train.texts)), "measured": len(whole.validation.texts)},
        "settings": asdict(settings),
    }
    runs = begin(out / "ablation.json", about)
    done = {(run["technique"], run["seed"]) for run in runs}
    with processes() as world, tempfile.TemporaryDirectory() as scratch:
        if world.count > 1:
            raise InputError("ablate does not support torchrun; start it as one process")
        for seed in range(seeds):
            parts = draw(whole, rows, seed)
            for technique in dict.fromkeys(("none", *techniques)):
                if (technique, seed) in done:
                    continue
                say(f"seed {seed}: {technique}")
                chosen = replace(with_technique(settings, technique, parts), seed=seed)
                metrics = measure(learn(parts, chosen, Path(scratch), world, Hooks()), parts)
                run = {"technique": technique, "seed": seed, **{name: metrics[name] for name in FIGURES}}
                say(", ".join(f"{name} {run[name]:.4f}" for name in FIGURES))
                runs.append(run)
                write_json(out / "ablation.json", _result(about, runs))
    result = _result(about, runs)
    _page(result).write(out / "report.html")
    return result


def _result(about: dict[str, Any], runs: Runs) -> dict[str, Any]:
    return {**about, "runs": runs, "techniques": summarize(runs, "technique", "none")}


def draw(whole: Split, rows: int, seed: int) -> Split:
    """Return a split to train on `rows` texts of the training part and to measure on the whole validation part."""
    texts, labels = whole.train.texts, whole.train.labels
    chosen = sorted(random.Random(seed).sample(range(len(texts)), min(rows, len(texts))))
    train = LabelledTexts([texts[i] for i in chosen], [labels[i] for i in chosen])
    return Split(train, LabelledTexts([], []), whole.validation, whole.labels)


def with_technique(settings: TrainingSettings, technique: str, parts: Split) -> TrainingSettings:
    """Return the settings with a technique; the floor is half the mean number of rows of a category."""
    if technique == "floor":
        return replace(settings, class_floor=len(parts.train.texts) // (2 * len(parts.labels)))
    if technique == "mixup":
        return replace(settings, mixup=MIXUP)
    augment = {"none": (), "all": tuple(TECHNIQUES)}.get(technique, (technique,))
    return replace(settings, augment=augment)


def _page(result: dict[str, Any]) -> Page:
    settings, rows = result["settings"], result["techniques"]
    page = Page(
        "What each augmentation adds",
        f"{settings['model']}, {settings['epochs']} epochs on {result['rows']['train']} texts of "
        f"{result['data']['file']}, each varied with probability {settings['augment_rate']:g}. Measured on "
        f"{result['rows']['measured']} other texts, which are not varied and not from the held-out fifth.",
        settings,
    )
    page.text(
        '"Added" is the mean difference to training without augmentation, paired by seed; "± error" is its standard '
        "error. A difference below two standard errors may be chance. Among so many techniques, one or two larger "
        "differences may be chance too."
    )
    page.records(COLUMNS, rows)
    figure = Figure(figsize=(7, 0.35 * len(rows) + 1))
    axes = figure.add_subplot()
    axes.axvline(0, color=GREY, label="no augmentation")
    axes.errorbar(
        [100 * row["added_macro_f1"] for row in rows],
        [row["technique"] for row in rows],
        xerr=[100 * (row["error_macro_f1"] or 0) for row in rows],
        fmt="o",
        color=BLUE,
        label="mean ± standard error",
    )
    axes.invert_yaxis()
    axes.set(xlabel="percentage points added to macro-F1")
    axes.grid(alpha=0.3, axis="x")
    legend(axes)
    page.plot(figure, "Percentage points that each technique added to macro-F1, with standard errors")
    return page
