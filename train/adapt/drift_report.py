"""Drift as one HTML page: the verdict, the measures and how they change over time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from aisle.palette import BLUE, GREY, RED
from aisle.plots import log_axis, percent_axis
from aisle.report import Page
from aisle.train.adapt.drift_log import Traffic
from aisle.train.adapt.drift_statistics import ALPHA, RULES

LARGEST_MIX = 40  # categories in the plot, those that changed most
TICKS = 8  # dates on the time axis


def write_report(result: dict[str, Any], usual: Traffic, live: Traffic, path: Path) -> None:
    """Write the page, and its figures beside it as .json.

    Raises:
        InputError: the file cannot be written.
    """
    page = Page(
        f"Drift of {Path(result['log']).name}",
        f"{'Retrain' if result['retrain'] else 'No need to retrain'} {result['checkpoint']}. {result['rows']} answers, "
        f"{result['from']} to {result['to']}, compared with {result['reference_rows']} held-out texts.",
        {name: result[name] for name in ("checkpoint", "log")},
    )
    _verdict(page, result)
    _measures(page, result["measures"])
    _course(page, result["windows"])
    _mix(page, result["measures"]["label_mix"])
    _distributions(page, usual, live)
    page.write(path, result)


def _verdict(page: Page, result: dict[str, Any]) -> None:
    page.heading("Reasons to retrain")
    if result["reasons"]:
        page.table(["reason", "since"], [[each["reason"], each["since"]] for each in result["reasons"]])
        page.text("Label the texts with the lowest confidence (aisle review), then train on them (aisle retrain).")
    else:
        page.text("None.")
    if result["watch"]:
        page.heading("Watch")
        page.table(["reason", "since"], [[each["reason"], each["since"]] for each in result["watch"]])


def _measures(page: Page, measures: dict[str, Any]) -> None:
    page.heading("Measures")
    page.table(
        ["measure", "unit", "value", "watch above", "retrain above", "p", "held-out texts", "traffic"],
        [
            [
                RULES[name].title,
                RULES[name].unit,
                each["value"],
                RULES[name].watch,
                RULES[name].retrain,
                each["p_value"],
                each.get("reference"),
                each.get("live"),
            ]
            for name, each in measures.items()
        ],
    )
    page.text(
        "PSI is the population stability index, minus its value under pure chance. p is the p-value: the probability "
        f"of such a value if nothing had changed. A measure counts only if p is below {ALPHA}. The accuracy is "
        "estimated from the confidences by ATC (Garg et al. 2022) and DoC (Guillory et al. 2021); the lower counts. "
        "Confident errors cannot be seen from confidence scores. Finding them needs labels."
    )


def _course(page: Page, windows: list[dict[str, Any]]) -> None:
    page.heading("Over time")
    names = [name for name in RULES if any(window[name] is not None for window in windows)]
    figure = Figure(figsize=(8, 1.7 * len(names)), layout="constrained")
    places = range(len(windows))
    for axes, name in zip(np.atleast_1d(figure.subplots(len(names), 1, sharex=True)), names, strict=True):
        rule = RULES[name]
        known = [
            (place, window[name]) for place, window in zip(places, windows, strict=True) if window[name] is not None
        ]
        axes.plot(*zip(*known, strict=True), "o-", color=BLUE, label="traffic")
        axes.axhline(rule.watch, linestyle=":", color=GREY, label="watch above")
        if rule.retrain is not None:
            axes.axhline(rule.retrain, linestyle="--", color=RED, label="retrain above")
        axes.set_title(f"{rule.title} ({rule.unit})", fontsize=9, loc="left")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    dated = places[:: -(-len(windows) // TICKS)]
    axes.set_xticks(dated, [windows[place]["from"] for place in dated], rotation=30, ha="right", fontsize=8)
    handles = {
        label: line for panel in figure.axes for line, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside upper right", ncols=3, frameon=False, fontsize=9)
    page.plot(figure, "Each measure over windows with equal numbers of answers")
    page.table(
        ["from", "to", "answers", "mean confidence", *(RULES[name].title for name in names)],
        [
            [window["from"], window["to"], window["rows"], window["mean_confidence"], *(window[n] for n in names)]
            for window in windows
        ],
    )


def _mix(page: Page, measure: dict[str, Any]) -> None:
    page.heading("Predicted categories")
    page.text(
        f"Jensen-Shannon divergence {measure['jensen_shannon']:.4f}, from 0 (equal shares) to 1 (no common category). "
        "Rare categories are grouped as '…'."
    )
    shown = sorted(measure["categories"], key=lambda each: -abs(each["live"] - each["reference"]))[:LARGEST_MIX]
    figure = Figure(figsize=(8, 0.8 + 0.3 * len(shown)))
    axes = figure.add_subplot()
    places = np.arange(len(shown))
    axes.barh(places - 0.2, [each["reference"] for each in shown], 0.4, color=GREY, label="held-out texts")
    axes.barh(places + 0.2, [each["live"] for each in shown], 0.4, color=BLUE, label="traffic")
    # Browsers draw Chinese characters wider than matplotlib expects of one that its font lacks.
    axes.set_yticks(places, [each["category"] for each in shown], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("share of answers")
    percent_axis(axes, "x", whole=False)
    axes.set_xlim(left=0)
    axes.legend(frameon=False)
    page.plot(figure, "Share of each predicted category; those that changed most come first")


def _distributions(page: Page, usual: Traffic, live: Traffic) -> None:
    page.heading("Confidence and length")
    figure = Figure(figsize=(9, 3.5))
    left, right = figure.subplots(1, 2)
    for traffic, color, name in ((usual, GREY, "held-out texts"), (live, BLUE, "traffic")):
        weights = np.full(len(traffic.confidence), 1 / len(traffic.confidence))
        left.hist(traffic.confidence, np.linspace(0, 1, 21), weights=weights, histtype="step", color=color, label=name)
        lengths = traffic.lengths[~np.isnan(traffic.lengths)]
        if len(lengths):
            weights = np.full(len(lengths), 1 / len(lengths))
            edges = np.geomspace(1, 2**15, 31)
            right.hist(lengths, edges, weights=weights, histtype="step", color=color, label=name)
    left.set(xlabel="confidence", ylabel="share of texts")
    right.set(xlabel="characters of a text", ylabel="share of texts", xscale="log")
    log_axis(right, "x")
    percent_axis(left, "x")
    for axes in (left, right):
        percent_axis(axes, "y", whole=False)
        axes.set_ylim(bottom=0)
        axes.legend(loc="upper left", frameon=False, fontsize=9)
    page.plot(figure, "Histograms of confidence and of length")
