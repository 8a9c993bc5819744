"""Summarize the slices of all systems: one row per system and load, and ratios to Aisle, paired by round."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import Any

from aisle.loadtest.bench.interleave import FILE_BATCH, LoadSpec, Slices
from aisle.loadtest.bench.paired import Paired, paired, ratios
from aisle.loadtest.bench.systems import OURS
from aisle.loadtest.generator import Load, percentile

ENGINE = "engine alone"
COLUMNS = {
    "system": "system",
    "load": "load",
    "texts_per_second": "texts/s",
    "p50_ms": "p50, ms",
    "p99_ms": "p99, ms",
    "ratio": "throughput / Aisle's",
    "p99_ratio": "p99 / Aisle's",
    "calls": "calls",
    "failures": "failed",
}


def rows_of(slices: Slices) -> list[dict[str, Any]]:
    """Return one row per system and load: the rounds' median throughput, pooled latencies, and ratios to Aisle's.

    `ratio` and `p99_ratio` are `Paired` as dicts. They are None if Aisle was not measured under the load, or answered
    no call in its slices.
    """
    rows = [_row(slices, system, spec) for system, spec in slices.loads]
    return sorted(rows, key=lambda row: (row["kind"], row["callers"] or row["rate"]))


def _row(slices: Slices, system: str, spec: LoadSpec) -> dict[str, Any]:
    loads, ours = slices.loads[system, spec], slices.loads.get((OURS, spec), [])
    latencies = [latency for load in loads for latency in load.latencies]
    return {
        "system": system,
        "kind": spec.kind,
        "callers": None if spec.kind == "open" else spec.size,
        "rate": spec.size if spec.kind == "open" else None,
        "load": str(spec),
        "texts_per_second": median(load.texts_per_second for load in loads),
        "p50_ms": 1e3 * percentile(latencies, 50) if latencies else None,
        "p99_ms": 1e3 * percentile(latencies, 99) if latencies else None,
        "ratio": _as_dict(ratios(_speeds(loads), _speeds(ours)) if ours else None),
        "p99_ratio": _as_dict(ratios(_milliseconds(loads, 99), _milliseconds(ours, 99)) if ours else None),
        "calls": len(latencies),
        "failures": sum(load.failures for load in loads),
    }


def verdict(slices: Slices, peers: Sequence[str]) -> dict[str, Any]:
    """Return each system's best closed throughput, and the conclusions from the paired figures of the rounds.

    `times_as_fast` is Aisle's best throughput divided by each peer's. `lower_p99_elsewhere` lists the peers' loads with
    a lower p99 than Aisle's, and `undecided_p99` those that may have one. Each `share_of_engine` is Aisle's throughput
    divided by that of the engine alone. `added_ms` is the median latency that the server adds for a single caller.
    Ratios and differences are `Paired` as dicts, or None if they were not measured.
    """
    ours, engine = slices.best(OURS), slices.best(ENGINE)
    systems = list(dict.fromkeys(system for system, _ in slices.loads))
    p99 = {
        f"{row['system']}, {row['load']}": Paired(**row["p99_ratio"]).below(1)
        for row in rows_of(slices)
        if row["system"] in peers and row["p99_ratio"]
    }
    return {
        "best": {name: median(slices.best(name)) for name in systems},
        "times_as_fast": {
            name: _as_dict(ratios(ours, slices.best(name))) for name in systems if name in peers and ours
        },
        "lower_p99_elsewhere": [name for name, lower in p99.items() if lower],
        "undecided_p99": [name for name, lower in p99.items() if lower is None],
        "share_of_engine": _as_dict(ratios(ours, engine) if ours and engine else None),
        "share_of_engine_files": _as_dict(_files_share(slices)),
        "added_ms": _as_dict(_added_ms(slices)),
    }


def _files_share(slices: Slices) -> Paired | None:
    for system, spec in slices.loads:
        if system == OURS and spec.kind == "files" and (ENGINE, spec) in slices.loads:
            return ratios(slices.texts_per_second(OURS, spec), slices.texts_per_second(ENGINE, spec))
    return None


def _added_ms(slices: Slices) -> Paired | None:
    """Return how many ms longer the median call takes through the server, with the fewest callers."""
    for system, spec in slices.loads:
        if system == OURS and spec.kind == "closed" and (ENGINE, spec) in slices.loads:
            served = _milliseconds(slices.loads[OURS, spec], 50)
            alone = _milliseconds(slices.loads[ENGINE, spec], 50)
            return paired([one - other for one, other in zip(served, alone, strict=True)])
    return None


def summary(found: dict[str, Any]) -> list[str]:
    """Return the conclusions as sentences, or sentences that say that the rounds allow none."""
    lines = [
        _sentence(each, f"Aisle's throughput is {{:.1f}} × that of {name}", f"Aisle's throughput against {name}")
        for name, each in found["times_as_fast"].items()
    ]
    for key, load in (("share_of_engine", "single texts"), ("share_of_engine_files", f"{FILE_BATCH} texts per call")):
        if found[key]:
            conclusion = f"With {load} it reaches {{:.0%}} of the engine alone"
            lines.append(_sentence(found[key], conclusion, f"Its share of the engine alone with {load}"))
    if found["added_ms"]:
        conclusion = "The server adds {:.1f} ms to the median latency of one text at a time"
        lines.append(_sentence(found["added_ms"], conclusion, "The ms that the server adds to one text at a time"))
    if found["times_as_fast"]:
        lines.append(_p99_sentence(found))
    return lines


def _sentence(figure: dict[str, Any], conclusion: str, subject: str) -> str:
    """Return a sentence with the conclusion and its figure, or that the figure allows no conclusion."""
    each = Paired(**figure)
    number = conclusion[conclusion.index("{") : conclusion.index("}") + 1]
    low, high = number.format(each.low), number.format(each.high)
    if each.conclusive:
        return f"{conclusion.format(each.median)} ({low} to {high}, {each.rounds} rounds)."
    return f"No conclusion. {subject}: {low} to {high} in {each.rounds} rounds."


def _p99_sentence(found: dict[str, Any]) -> str:
    lower, undecided = found["lower_p99_elsewhere"], found["undecided_p99"]
    text = f"A peer's p99 is lower at: {'; '.join(lower)}." if lower else "No peer's p99 is known to be lower."
    return f"{text} Undecided: {'; '.join(undecided)}." if undecided else text


def display_rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows for a table, with ratios and their intervals as text."""
    return [
        {**row, **{key: str(Paired(**row[key])) if row[key] else None for key in ("ratio", "p99_ratio")}}
        for row in found["rows"]
    ]


def _speeds(loads: Sequence[Load]) -> list[float]:
    return [load.texts_per_second for load in loads]


def _milliseconds(loads: Sequence[Load], percent: float) -> list[float]:
    """Return a percentile of each slice, in ms; NaN if no call was answered."""
    return [1e3 * percentile(load.latencies, percent) if load.latencies else math.nan for load in loads]


def _as_dict(each: Paired | None) -> dict[str, Any] | None:
    return each.as_dict() if each else None
