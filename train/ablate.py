"""Ablation: what each way to vary or repeat training texts adds, on one's own data, beside training without any.

The held-out fifth is not looked at, as in a search: a technique that is chosen by these figures is not flattered there.
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
from aisle.preprocess.augment import TECHNIQUES
from aisle.preprocess.clean import Table, clean_rows
from aisle.preprocess.table import fingerprint, read_labelled
from aisle.report import Page
from aisle.train.data import Split, split
from aisle.train.evaluation_report import BLUE, GREY
from aisle.train.experiment import FIGURES, begin, summarize
from aisle.train.fit import Hooks
from aisle.train.processes import processes
from aisle.train.settings import Settings
from aisle.train.train import learn, measure

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
    settings: Settings,
    *,
    rows: int,
    seeds: int,
    techniques: tuple[str, ...] = NAMES,
) -> dict[str, Any]:
    """Train with each technique and with none, `seeds` times on `rows` texts, and measure on the validation part.

    A seed draws the texts, the same ones for all techniques, so differences are taken seed by seed. Writes
    ablation.json after each training, and report.html at the end, to `out`. An ablation goes on when it is started
    again, with more seeds or techniques if wanted.

    Raises:
        InputError: a technique is unknown, the table cannot be learnt from, or `out` holds another ablation.
    """
    unknown = sorted(set(techniques) - set(NAMES))
    if unknown:
        raise InputError(f"no technique is called {unknown[0]!r}; there are: {', '.join(NAMES)}")
    table, _ = clean_rows(read_labelled(data, text_column, label_column))
    whole = split(table)
    if not whole.validation.texts:
        raise InputError(f"{len(table.texts)} rows are too few to judge techniques by; add rows")
    about = {
        "data": {"file": data.name, "sha256": fingerprint(data), "columns": [text_column, label_column]},
        "rows": {"train": min(rows, len(whole.train.texts)), "measured": len(whole.validation.texts)},
        "settings": asdict(settings),
    }
    runs = begin(out / "ablation.json", about)
    done = {(run["technique"], run["seed"]) for run in runs}
    with processes() as team, tempfile.TemporaryDirectory() as scratch:
        if team.count > 1:
            raise InputError("an ablation takes no torchrun")
        for seed in range(seeds):
            parts = draw(whole, rows, seed)
            for technique in dict.fromkeys(("none", *techniques)):
                if (technique, seed) in done:
                    continue
                say(f"seed {seed}: {technique}")
                told = replace(with_technique(settings, technique, parts), seed=seed)
                metrics = measure(learn(parts, told, Path(scratch), team, Hooks()), parts)
                run = {"technique": technique, "seed": seed, **{name: metrics[name] for name in FIGURES}}
                say(", ".join(f"{name} {run[name]:.4f}" for name in FIGURES))
                runs.append(run)
                write_json(
                    out / "ablation.json", {**about, "runs": runs, "techniques": summarize(runs, "technique", "none")}
                )
    result = {**about, "runs": runs, "techniques": summarize(runs, "technique", "none")}
    _page(result).write(out / "report.html")
    return result


def draw(whole: Split, rows: int, seed: int) -> Split:
    """Return a split to train on `rows` texts of the training part and to measure on the whole validation part."""
    texts, labels = whole.train.texts, whole.train.labels
    chosen = sorted(random.Random(seed).sample(range(len(texts)), min(rows, len(texts))))
    train = Table([texts[i] for i in chosen], [labels[i] for i in chosen])
    return Split(train, Table([], []), whole.validation, whole.labels)


def with_technique(settings: Settings, technique: str, parts: Split) -> Settings:
    """Return the settings with a technique; the floor is half of what a category had if all had as many rows."""
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
        f"{result['data']['file']}, each varied with probability {settings['augment_rate']:g}; measured on "
        f"{result['rows']['measured']} others, none of them of the held-out fifth and none varied.",
    )
    page.text(
        "Added is the difference to training with none, taken seed by seed; beside it its standard error. A difference "
        "of less than two standard errors may be chance, and among so many techniques one or two of those will be too."
    )
    page.table(list(COLUMNS.values()), [[row[key] for key in COLUMNS] for row in rows])
    figure = Figure(figsize=(7, 0.35 * len(rows) + 1))
    axes = figure.add_subplot()
    axes.axvline(0, color=GREY)
    axes.errorbar(
        [100 * row["added_macro_f1"] for row in rows],
        [row["technique"] for row in rows],
        xerr=[100 * (row["error_macro_f1"] or 0) for row in rows],
        fmt="o",
        color=BLUE,
    )
    axes.invert_yaxis()
    axes.set(xlabel="points added to macro-F1, ± standard error")
    axes.grid(alpha=0.3, axis="x")
    page.plot(figure, "Points that each technique added to macro-F1, with their standard errors")
    return page
