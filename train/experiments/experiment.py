"""Experiments: training runs with different settings and seeds, kept in a file so that a later start resumes."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

from aisle.errors import InputError

FIGURES = ("macro_f1", "accuracy")
Runs = list[dict[str, Any]]


def begin(file: Path, about: dict[str, Any]) -> Runs:
    """Return the runs of an earlier start from `file`. They must have the same `about`.

    Raises:
        InputError: the file is damaged, holds another experiment, or its folder cannot be written.
    """
    about = json.loads(json.dumps(about))  # as in the file, where a tuple is a list
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        earlier = json.loads(file.read_text("utf-8")) if file.exists() else {**about, "runs": []}
    except OSError as error:
        raise InputError(f"cannot write to {file.parent}: {error.strerror}") from None
    except ValueError:
        raise InputError(f"{file} is damaged; remove it") from None
    if any(earlier.get(name) != value for name, value in about.items()):
        raise InputError(f"{file.parent} holds an experiment with other data or settings; choose another folder")
    runs: Runs = earlier["runs"]
    return runs


def summarize(runs: Runs, kind: str, reference: str) -> Runs:
    """Return a row for each kind of run: mean scores, mean differences to the reference, and their errors.

    Differences are paired by seed. `error` is their standard error, None with a single seed. Rows are sorted by the
    difference in macro-F1.
    """
    plain = {run["seed"]: run for run in runs if run[kind] == reference}
    rows = []
    for each in dict.fromkeys(run[kind] for run in runs):
        own = [run for run in runs if run[kind] == each]
        row = {kind: each, "seeds": len(own)}
        for name in FIGURES:
            added = [run[name] - plain[run["seed"]][name] for run in own]
            row[name] = statistics.fmean(run[name] for run in own)
            row[f"added_{name}"] = statistics.fmean(added)
            row[f"error_{name}"] = statistics.stdev(added) / math.sqrt(len(added)) if len(added) > 1 else None
        rows.append(row)
    return sorted(rows, key=lambda row: -row["added_macro_f1"])
