"""Drift as one HTML page: the verdict, the measures and their course; nothing computed anew but histograms."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

from aisle.report import Page

if TYPE_CHECKING:
    from aisle.train.drift import Traffic

BLUE, GREY, RED = "#1f5fa8", "#999999", "#b3261e"
LARGEST_MIX = 40  # categories in the plot, those that changed most


def write_report(result: dict[str, Any], usual: Traffic, live: Traffic, path: Path) -> None:
    """Write the page.

    Raises:
        InputError: the file cannot be written.
    """
    page = Page(
        f"Drift of {Path(result['log']).name}",
        f"{'Retrain' if result['retrain'] else 'No need to retrain'} {result['checkpoint']}. {result['rows']} answers, "
        f"{result['from']} to {result['to']}, beside {result['reference_rows']} held-out texts like those of training.",
    )
    _verdict(page, result)
    _measures(page, result["measures"])
    _course(page, result["windows"])
    _mix(page, result["measures"]["label_mix"])
    _distributions(page, usual, live)
    page.write(path)


def _verdict(page: Page, result: dict[str, Any]) -> None:
    page.heading("Reasons to retrain")
    if result["reasons"]:
        page.table(["reason", "since"], [[each["reason"], each["since"]] for each in result["reasons"]])
        page.text("Label what the model is least sure of (aisle review), and train it further on that (aisle retrain).")
    else:
        page.text("None.")
    if result["watch"]:
        page.heading("To be watched")
        page.table(["reason", "since"], [[each["reason"], each["since"]] for each in result["watch"]])


def _measures(page: Page, measures: dict[str, Any]) -> None:
    from aisle.train.drift import ALPHA, RULES

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
        "PSI is the population stability index, less what chance alone makes of it; p is how probable so large a value "
        f"would be if nothing had changed, and counts below {ALPHA}. The accuracy is estimated from confidence, by ATC "
        "(Garg et al. 2022) and by DoC (Guillory et al. 2021), and the worse is taken. It misses errors that the model "
        "is sure of: only labels tell these."
    )


def _course(page: Page, windows: list[dict[str, Any]]) -> None:
    from aisle.train.drift import RULES

    page.heading("Course")
    names = [name for name in RULES if any(window[name] is not None for window in windows)]
    figure = Figure(figsize=(8, 1.7 * len(names)))
    places = range(len(windows))
    for axes, name in zip(np.atleast_1d(figure.subplots(len(names), 1, sharex=True)), names, strict=True):
        rule = RULES[name]
        known = [
            (place, window[name]) for place, window in zip(places, windows, strict=True) if window[name] is not None
        ]
        axes.plot(*zip(*known, strict=True), "o-", color=BLUE)
        axes.axhline(rule.watch, linestyle=":", color=GREY)
        if rule.retrain is not None:
            axes.axhline(rule.retrain, linestyle="--", color=RED)
        axes.set_title(f"{rule.title} ({rule.unit})", fontsize=9, loc="left")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    axes.set_xticks(places, [window["from"] for window in windows], rotation=30, ha="right", fontsize=7)
    figure.tight_layout()
    page.plot(figure, "Each measure over windows of equally many answers; dotted: watch, dashed: retrain")
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
        f"Jensen-Shannon divergence {measure['jensen_shannon']:.4f} bits. Rare categories are put together as '…'."
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
    axes.legend()
    page.plot(figure, "Share of each predicted category, those that changed most first")


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
    right.set(xlabel="characters", xscale="log")
    left.legend(loc="upper left")
    page.plot(figure, "Histograms of confidence and of length, of held-out texts and of traffic")
