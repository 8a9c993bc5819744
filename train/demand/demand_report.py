"""Demand as one HTML page: break-outs, forecasts, accuracy, festivals and models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from aisle.palette import BLUE, GREY, RED
from aisle.report import Page
from aisle.train.demand import ACCURACY
from aisle.train.demand.models import Forecast

if TYPE_CHECKING:
    from aisle.train.demand.demand import Demand

LARGEST = 8  # categories in the plots, those with the most counts
BEFORE = 84  # days before the forecast in the plots
TICK = 14  # days between two dates on the axis
ROWS = 100  # of the table of series without validation


def write_report(result: dict[str, Any], plan: Demand, ahead: Forecast, path: Path) -> None:
    """Write the page, and its figures beside it as .json.

    Raises:
        InputError: a file cannot be written.
    """
    page = Page(
        f"Demand of {Path(result['source']).name}",
        f"{len(result['break_outs'])} break-outs in the last {result['recent']} days. {result['rows']} rows, "
        f"{result['from']} to {result['to']}; {result['series']} series are forecast for {result['horizon']} days, in "
        f"{result['output']}.",
        {name: result[name] for name in ("source", "output", "horizon", "recent")},
    )
    _break_outs(page, result, plan, ahead)
    _forecasts(page, plan, ahead)
    _accuracy(page, result)
    _festivals(page, result)
    _models(page, result)
    page.write(path, result)


def _break_outs(page: Page, result: dict[str, Any], plan: Demand, ahead: Forecast) -> None:
    page.heading("Break-outs")
    found = result["break_outs"]
    if not result["break_outs_tested"]:
        page.text("The input is too short to look for break-outs.")
        return
    page.text(
        f"Categories with several of the last {result['recent']} days on one side of the 95 % interval of a forecast "
        "made before these days." + ("" if found else " There is none.")
    )
    if not found:
        return
    columns = {
        "category": "category",
        "level": "level",
        "side": "side",
        "days_outside": "days outside",
        "since": "since",
        "actual": "counted",
        "forecast": "forecast",
        "festival": "festival",
    }
    page.records(columns, found)
    nodes = [
        node
        for each in found[:LARGEST]
        for node, name in enumerate(plan.tree.names)
        if (name, plan.tree.levels[node]) == (each["category"], each["level"])
    ]
    page.plot(_panels(plan, ahead, nodes), "The categories that broke out, with their new forecasts")


def _forecasts(page: Page, plan: Demand, ahead: Forecast) -> None:
    page.heading("Forecasts")
    largest = np.argsort(-plan.values.sum(axis=1), kind="stable")[:LARGEST].tolist()
    page.plot(
        _panels(plan, ahead, largest),
        f"The {len(largest)} largest series: daily counts, forecast, and intervals of 80 % and 95 %",
    )


def _panels(plan: Demand, ahead: Forecast, nodes: list[int]) -> Figure:
    figure = Figure(figsize=(9, 1.9 * len(nodes) + 0.6))
    panels = np.atleast_1d(figure.subplots(len(nodes), 1, sharex=True, gridspec_kw={"hspace": 0.3}))
    for axes, node in zip(panels, nodes, strict=True):
        _panel(axes, plan, ahead, node)
    days = plan.counts.days
    ticks = range(days - days % TICK - BEFORE, days + plan.horizon, TICK)
    shown = [day for day in ticks if day >= max(0, days - BEFORE)]
    axes.set_xticks(shown, [str(plan.counts.day(day)) for day in shown], rotation=30, ha="right", fontsize=8)
    handles, labels = axes.get_legend_handles_labels()
    panels[0].legend(handles, labels, loc="lower right", bbox_to_anchor=(1, 1), ncols=4, frameon=False, fontsize=9)
    return figure


def _panel(axes: Axes, plan: Demand, ahead: Forecast, node: int) -> None:
    days = plan.counts.days
    start = max(0, days - BEFORE)
    coming = range(days, days + plan.horizon)
    axes.plot(range(start, days), plan.values[node, start:], color=GREY, label="counted")
    axes.plot(coming, ahead.mean[node], color=BLUE, label="forecast")
    for share, alpha in ((80, 0.3), (95, 0.15)):
        low, high = getattr(ahead, f"low_{share}")[node], getattr(ahead, f"high_{share}")[node]
        axes.fill_between(coming, low, high, color=BLUE, alpha=alpha, linewidth=0, label=f"{share} %")
    for window in plan.calendar.shown(start):
        axes.axvspan(window.start - 0.5, window.stop - 0.5, color=RED, alpha=0.06, linewidth=0)
    axes.set_title(plan.tree.names[node], fontsize=9, loc="left")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)


def _accuracy(page: Page, result: dict[str, Any]) -> None:
    page.heading("Accuracy")
    if not result["accuracy"]:
        page.text("The input is too short to measure the forecasts.")
        return
    page.records(ACCURACY, result["accuracy"])
    page.text(
        f"The last {result['horizon']} days, forecast without them; level 0 is the sum of all. MASE is the mean "
        "absolute error over that of repeating the week before, within the earlier days (Hyndman and Koehler 2006). "
        "Below 1 is better. The seasonal naive repeats the last week known. The last columns are the shares of days "
        "inside the intervals, which are rounded outwards to whole counts."
    )


def _festivals(page: Page, result: dict[str, Any]) -> None:
    page.heading("Festivals")
    rows = [(name, each["tested"], each["used"], each["error_change"]) for name, each in result["festivals"].items()]
    page.table(("festival", "series tested", "series that use it", "change of the error"), rows)
    page.text(
        "A festival is tested in a series that has two of it or more: each is forecast from the days before it, with "
        "what earlier ones multiplied demand by. It is used if that lowers the error by 5 % or more. The change is "
        "that of the mean absolute error on the festival's days, over all tested series. Its days are shaded red."
    )


def _models(page: Page, result: dict[str, Any]) -> None:
    page.heading("Models")
    page.table(("model", "series"), list(result["models"].items()))
    if simple := result["not_validated"]:
        page.text(f"{len(simple)} series have a simple forecast that is not validated; {ROWS} at most are listed.")
        page.records({"category": "category", "level": "level", "model": "model", "reason": "reason"}, simple[:ROWS])
