"""Experiments: trainings told differently, seed by seed, in a file that an interrupted one goes on from."""

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
    """Return the runs that an earlier start left in `file`; `about` says what they must be of.

    Raises:
        InputError: the file is damaged, holds another experiment, or its folder cannot be written.
    """
    about = json.loads(json.dumps(about))  # as it is read again: a tuple becomes a list
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        earlier = json.loads(file.read_text("utf-8")) if file.exists() else {**about, "runs": []}
    except OSError as error:
        raise InputError(f"cannot write to {file.parent}: {error.strerror}") from None
    except ValueError:
        raise InputError(f"{file} is damaged; remove it") from None
    if any(earlier.get(name) != value for name, value in about.items()):
        raise InputError(f"{file.parent} holds another one, on other data or settings; choose another folder")
    runs: Runs = earlier["runs"]
    return runs


def summarize(runs: Runs, kind: str, reference: str) -> Runs:
    """Return a row for each kind of run: mean figures, what it added to the reference's, and the error of that.

    Differences are taken seed by seed; `error` is their standard error, None where there is but one seed. The kind
    that added most comes first.
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
