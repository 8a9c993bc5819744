"""k-fold cross-validation: how much the scores vary between different held-out parts."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from aisle.console import say
from aisle.files import write_json
from aisle.train.core.processes import Processes
from aisle.train.core.resume import STATE
from aisle.train.core.split import Split

FIGURES = ("accuracy", "macro_f1")


def cross_validate(
    splits: Iterable[Split], work: Path, world: Processes, measured: Callable[[Split, Path], dict[str, Any]]
) -> dict[str, Any]:
    """Return each fold's figures, their mean and their standard deviation.

    Folds that an earlier run measured are read from `work`.
    """
    done = []
    for number, parts in enumerate(splits, start=1):
        folder = work / f"fold-{number}"
        file = folder / "metrics.json"
        metrics = world.broadcast(json.loads(file.read_text("utf-8")) if file.is_file() else None)
        if metrics is None:
            say(f"fold {number}")
            metrics = measured(parts, folder)
            write_json(file, metrics)
            (folder / STATE).unlink(missing_ok=True)
        say(f"fold {number}: " + ", ".join(f"{name} {metrics[name]:.4f}" for name in FIGURES))
        done.append({name: metrics[name] for name in FIGURES})
    return {
        "folds": done,
        "mean": {name: statistics.fmean(fold[name] for fold in done) for name in FIGURES},
        "deviation": {name: statistics.stdev(fold[name] for fold in done) for name in FIGURES},
    }
