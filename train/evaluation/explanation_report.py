"""Explanations and their deletion check as HTML pages: texts with coloured words, tables and curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from aisle.palette import BLUE, GREY, ORANGE
from aisle.plots import legend, percent_axis
from aisle.report import Page
from aisle.train.evaluation.attribution import GRADIENTS, OCCLUSION, accounted, evidence, marks

NAMES = {GRADIENTS: "integrated gradients", OCCLUSION: "occlusion", "random": "random words"}
COLORS = {GRADIENTS: BLUE, OCCLUSION: ORANGE, "random": GREY}
LEGEND = "Blue words support the category, orange words oppose it; deeper colours mean more."
SHARES = (
    "A word's share of the evidence is its weight divided by the sum of the absolute weights. Positive shares support "
    "the category, negative shares oppose it."
)


def write_explanations(result: dict[str, Any], path: Path) -> None:
    """Write the explanations of `explain`.

    Raises:
        InputError: the file cannot be written.
    """
    source = " and ".join(str(each) for each in (result["checkpoint"], result["url"]) if each)
    page = Page("Which words decided", f"Categories given by {source}. {LEGEND} {SHARES}")
    methods = result["methods"]
    for explanation in result["explanations"]:
        _explanation(page, explanation, methods)
        words = [word["word"] for word in explanation["words"]]
        shares = [evidence(explanation, method) for method in methods]
        page.table(
            ["word", *(f"evidence by {NAMES[method]}" for method in methods)],
            list(zip(words, *shares, strict=True)),
        )
    page.write(path, result)


def write_check(result: dict[str, Any], path: Path) -> None:
    """Write the result of the deletion check.

    Raises:
        InputError: the file cannot be written.
    """
    skipped = ", ".join(f"{n} {reason}" for reason, n in result["skipped"].items()) or "none"
    page = Page(
        f"Deletion check of {result['checkpoint']}",
        f"{result['texts']} held-out texts of {result['data']} (skipped: {skipped}), seed {result['seed']}, "
        f"{result['draws']} random orders of each; classified by {result['judge']}. Mean probability of the category: "
        f"{result['confidence']:.4f}.",
    )
    page.heading(f"Without {result['removed']:.0%} of the words")
    page.table(
        ["deleted words", "mean drop of the probability", "± error", "another category", "area under the curve"],
        [
            [NAMES[each["method"]], *(each[key] for key in ("fall", "error", "changed", "area"))]
            for each in result["methods"]
        ],
    )
    page.text(
        "If an explanation is correct, removing its heaviest words lowers the probability far more than removing as "
        "many random words. The area under its curve is then smaller."
    )
    page.plot(_curves(result), "Mean probability of the category by the share of deleted words")
    gaps = result["completeness"]
    page.text(
        f"Completeness of the integrated gradients: their sum differs from the change in log-probability by "
        f"{gaps['mean_gap']:.4f} on average and {gaps['largest_gap']:.4f} at most."
    )
    page.heading("Some of the texts")
    page.text(LEGEND)
    methods = [each["method"] for each in result["methods"] if each["method"] in (GRADIENTS, OCCLUSION)]
    for explanation in result["examples"]:
        _explanation(page, explanation, methods)
    page.write(path, result)


def _curves(result: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(7, 4))
    axes = figure.add_subplot()
    for each in result["methods"]:
        axes.plot(result["shares"], each["curve"], "o-", color=COLORS[each["method"]], label=NAMES[each["method"]])
    axes.set(xlabel="share of the words deleted", ylabel="mean probability of the category")
    percent_axis(axes, "x")
    percent_axis(axes, "y")
    axes.grid(alpha=0.3)
    legend(axes)
    return figure


def _explanation(page: Page, explanation: dict[str, Any], methods: list[str]) -> None:
    page.heading(f"{explanation['category']}, {explanation['confidence']:.4f}")
    for method in methods:
        page.text(f"By {NAMES[method]}:")
        page.marked(marks(explanation, method))
    if explanation["unread_characters"]:
        page.text(
            f"The model does not read the last {explanation['unread_characters']} characters: the text is too long."
        )
    if sentence := accounted(explanation):
        page.text(sentence)
