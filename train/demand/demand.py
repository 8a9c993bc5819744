"""Demand: count categories by day, forecast them at every level, and find those that broke out of their forecast."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from datetime import date, timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import binom

from aisle.console import say, track
from aisle.errors import InputError
from aisle.preprocess.labels import BAR
from aisle.preprocess.tables.table import Row
from aisle.preprocess.tables.writing import output_kind, refuse_same, replacing, write_rows
from aisle.train.demand.counts import Columns, Counts, read_counts
from aisle.train.demand.festivals import FESTIVALS, Calendar, Effect, Test, effect_of
from aisle.train.demand.hierarchy import Tree, tree_of
from aisle.train.demand.models import MEAN, SEASON, Choice, Forecast, choose, forecast

LEAST = 2 * SEASON  # days; the seasonal naive needs two weeks
CHANCE = 0.05  # of any false break-out, if days were independent
COLUMNS = ["date", "category", "level", "forecast", "low_80", "high_80", "low_95", "high_95", "model"]


class Planned(NamedTuple):
    """The choices for all nodes, and when they were made."""

    choices: list[Choice]  # for forecasts after the input
    tested: list[Choice]  # made without the last `horizon` days
    tests: dict[str, list[Test]]  # of each festival, by node


class Demand:
    """The counts of all categories and levels, with their choices of models."""

    def __init__(self, counts: Counts, horizon: int) -> None:
        self.counts = counts
        self.horizon = horizon
        self.tree, self.values = tree_of(counts.by_category)
        self.calendar = Calendar(counts.first, counts.days + horizon)
        self.begins = [int(np.argmax(row > 0)) for row in self.values]
        self.planned = self._plan()

    def _plan(self) -> Planned:
        choices, tested = [], []
        tests: dict[str, list[Test]] = {festival.name: [] for festival in FESTIVALS}
        for node in track(range(len(self.values)), "choosing models", len(self.values)):
            before = self._choose(node, self.counts.days - self.horizon)
            again = before.why.startswith("too")
            choices.append(self._choose(node, self.counts.days) if again else before)
            tested.append(before)
            for name, test in self._effect(node, self.counts.days).tests.items():
                tests[name].append(test)
        return Planned(choices, tested, tests)

    def _effect(self, node: int, end: int) -> Effect:
        return effect_of(self.calendar, self.values[node], self.begins[node], end)

    def _choose(self, node: int, end: int) -> Choice:
        begin = self.begins[node]
        if end <= begin:
            return Choice(MEAN, "too short: 0 days", {}, 0.0)
        return choose(self.values[node, begin:end], self._effect(node, end).factors[begin:], self.horizon)

    def forecast(self, end: int, horizon: int, choices: list[Choice], what: str = "forecasting") -> Forecast:
        """Return the reconciled forecasts of all nodes for the days from `end` on, each [nodes, days]."""
        each = [
            self._forecast(node, end, horizon, choice.model)
            for node, choice in enumerate(track(choices, what, len(choices)))
        ]
        mean, *bounds = (np.stack(parts) for parts in zip(*each, strict=True))
        variances = np.array([choice.variance for choice in choices])
        adding_up = self.tree.reconcile(mean, np.maximum(variances, 1e-6 * variances.max() + 1e-9))
        return Forecast(adding_up, *(np.maximum(0, bound + adding_up - mean) for bound in bounds))

    def _forecast(self, node: int, end: int, horizon: int, model: str) -> Forecast:
        begin = self.begins[node]
        if end <= begin:  # the category is newer
            return Forecast(*(np.zeros(horizon) for _ in Forecast._fields))
        factors, errors, _ = self._effect(node, end)
        coming = slice(end, end + horizon)
        known = self.values[node, begin:end] / factors[begin:end]
        return forecast(model, known, horizon).lifted(factors[coming], errors[coming])


def demand(
    source: Path,
    out: Path,
    *,
    columns: Columns | None = None,
    horizon: int = 28,
    recent: int = 7,
    report: Path | None = None,
) -> dict[str, Any]:
    """Write forecasts of the daily counts of categories, at every level of their paths.

    Each series is forecast by the model with the lowest mean absolute error in a rolling-origin validation: AutoETS
    (Hyndman and Khandakar 2008), AutoTheta (Fiorucci et al. 2016) or the seasonal naive. The forecasts are reconciled:
    children add up to their parents.

    Args:
        source: a table with a date or time and a category, or a traffic log.
        out: the table of forecasts, a row for each category and day.
        horizon: days to forecast.
        recent: the last days, which are compared with a forecast made before them.
        report: the HTML page to write.

    Returns:
        The `accuracy` of each level on the last `horizon` days, the `break_outs`, the `festivals` and the `models`.

    Raises:
        InputError: the table cannot be read or counted, or is too short; or a file cannot be written.
    """
    kind = output_kind(source, out)
    refuse_same(source, out)
    counts = read_counts(source, columns or Columns())
    if counts.days < LEAST:
        raise InputError(f"{source}: {counts.days} days, {counts.first} to {counts.last}; give {LEAST} or more")
    if (example := next((name for name in counts.by_category if BAR in name), None)) is not None:
        say(f"categories with {BAR!r}, such as {example!r}, are counted as one each; give a row for each to count them")
    plan = Demand(counts, horizon)
    ahead = plan.forecast(counts.days, horizon, plan.planned.choices)
    result = {**_about(source, out, plan, recent), **_findings(plan, recent)}
    try:
        with replacing(out) as writing:
            write_rows(writing, partial(_rows, plan, ahead), COLUMNS, kind)
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror}") from None
    if report:
        from aisle.train.demand.demand_report import write_report

        write_report(result, plan, ahead, report)
    return result


def _about(source: Path, out: Path, plan: Demand, recent: int) -> dict[str, Any]:
    counts, choices = plan.counts, plan.planned.choices
    return {
        "source": str(source),
        "output": str(out),
        "rows": counts.rows,
        "skipped": counts.skipped,
        "from": str(counts.first),
        "to": str(counts.last),
        "days": counts.days,
        "last_row": counts.ends_early or None,
        "in_future": counts.last > date.today() + timedelta(days=1),
        "longest_gap": {"from": str(gap[0]), "days": gap[1]} if (gap := counts.longest_gap())[1] else None,
        "without_time_zone": counts.unzoned,
        "series": len(choices),
        "horizon": plan.horizon,
        "recent": recent,
        "models": dict(Counter(choice.model for choice in choices).most_common()),
        "not_validated": [
            {"category": name, "level": level, "model": choice.model, "reason": choice.why}
            for name, level, choice in zip(plan.tree.names, plan.tree.levels, choices, strict=True)
            if choice.why
        ],
        "festivals": {name: _summary(tests) for name, tests in plan.planned.tests.items()},
    }


def _summary(tests: list[Test]) -> dict[str, Any]:
    """Return how a festival did, over the series that saw it twice."""
    tested = [test for test in tests if test.windows]
    without = sum(test.error_without for test in tested)
    return {
        "tested": len(tested),
        "used": sum(test.used for test in tested),
        "error_change": sum(test.error_with for test in tested) / without - 1 if without else None,
    }


def _findings(plan: Demand, recent: int) -> dict[str, Any]:
    """Return the accuracy and the break-outs; neither where the days before are too few."""
    days, horizon = plan.counts.days, plan.horizon
    accuracy: list[dict[str, Any]] = []
    break_outs: list[dict[str, Any]] = []
    if days - horizon >= LEAST:
        end = days - horizon
        accuracy = _accuracy(plan, plan.forecast(end, horizon, plan.planned.tested, "measuring"), end)
    if days - recent >= LEAST:
        end = days - recent
        choices = plan.planned.tested if days - horizon >= LEAST else plan.planned.choices
        break_outs = _break_outs(plan, plan.forecast(end, recent, choices, "looking for break-outs"), end)
    return {"accuracy": accuracy, "break_outs": break_outs, "break_outs_tested": days - recent >= LEAST}


def _accuracy(plan: Demand, told: Forecast, end: int) -> list[dict[str, Any]]:
    """Compare forecasts with the days after `end`, by level.

    MASE is the mean absolute error over that of the one-week-ago forecast before `end` (Hyndman and Koehler 2006). Only
    series of which `choose` validated the model count.
    """
    rows = []
    for level in range(max(plan.tree.levels) + 1):
        chosen = [
            node
            for node, choice in enumerate(plan.planned.tested)
            if plan.tree.levels[node] == level and not choice.why and _scale(plan, node, end)
        ]
        if chosen:
            rows.append({"level": level, "series": len(chosen), **_errors(plan, told, end, chosen)})
    return rows


def _errors(plan: Demand, told: Forecast, end: int, chosen: list[int]) -> dict[str, float]:
    """Return the mean errors of some nodes, and the shares of days inside the intervals, rounded outwards."""
    actual = plan.values[chosen, end:]
    scales = np.array([_scale(plan, node, end) for node in chosen])
    naive = plan.values[chosen][:, end - SEASON + np.arange(plan.horizon) % SEASON]
    mase, mase_naive = (
        float((np.abs(each - actual).mean(axis=1) / scales).mean()) for each in (told.mean[chosen], naive)
    )
    inside = [
        float(((actual >= np.floor(low[chosen])) & (actual <= np.ceil(high[chosen]))).mean())
        for low, high in ((told.low_80, told.high_80), (told.low_95, told.high_95))
    ]
    return {"mase": mase, "mase_seasonal_naive": mase_naive, "inside_80": inside[0], "inside_95": inside[1]}


def _scale(plan: Demand, node: int, end: int) -> float:
    known = plan.values[node, plan.begins[node] : end]
    return float(np.abs(known[SEASON:] - known[:-SEASON]).mean()) if len(known) > SEASON else 0.0


def needed(recent: int, series: int) -> int:
    """Return how many of the recent days must lie on one side of the 95 % interval for a break-out.

    If days were independent, fewer than `CHANCE` of all runs would then have a false one (Bonferroni).
    """
    tails = binom.sf(np.arange(recent) - 0.5, recent, 0.025)  # of 0, 1, … days or more
    rare = np.flatnonzero(tails < CHANCE / (2 * series))
    return int(rare[0]) if len(rare) else recent


def _break_outs(plan: Demand, told: Forecast, end: int) -> list[dict[str, Any]]:
    """List the nodes that left their interval after `end`, the largest difference first."""
    actual = plan.values[:, end:]
    recent = actual.shape[1]
    least = needed(recent, len(actual))
    festivals = ", ".join(sorted({str(name) for name in plan.calendar.name[end : end + recent] if name}))
    found = []
    for side, outside in (("above", actual > np.ceil(told.high_95)), ("below", actual < np.floor(told.low_95))):
        for node in np.flatnonzero(outside.sum(axis=1) >= least).tolist():
            found.append(
                {
                    "category": plan.tree.names[node],
                    "level": plan.tree.levels[node],
                    "side": side,
                    "days_outside": int(outside[node].sum()),
                    "since": str(plan.counts.day(end + int(np.argmax(outside[node])))),
                    "actual": float(actual[node].sum()),
                    "forecast": float(told.mean[node].sum()),
                    "festival": festivals or None,
                }
            )
    return sorted(found, key=lambda each: -abs(each["actual"] - each["forecast"]))


def _rows(plan: Demand, ahead: Forecast) -> Iterator[Row]:
    tree: Tree = plan.tree
    for node, name in enumerate(tree.names):
        for step in range(plan.horizon):
            numbers = {COLUMNS[3 + i]: round(float(part[node, step]), 3) for i, part in enumerate(ahead)}
            yield {
                "date": str(plan.counts.last + timedelta(days=step + 1)),
                "category": name,
                "level": tree.levels[node],
                **numbers,
                "model": plan.planned.choices[node].model,
            }
