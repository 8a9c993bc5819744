"""Explanations and their deletion check as HTML pages: texts with their words coloured, figures and curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from aisle.errors import InputError
from aisle.report import Page
from aisle.train.evaluation_report import BLUE, GREY
from aisle.train.explain import GRADIENTS, OCCLUSION, marks

NAMES = {GRADIENTS: "integrated gradients", OCCLUSION: "occlusion", "random": "random words"}
COLORS = {GRADIENTS: BLUE, OCCLUSION: "#c85a00", "random": GREY}
UNITS = {GRADIENTS: "integrated gradients, nats", OCCLUSION: "occlusion, fall of the probability"}
LEGEND = "Blue words speak for the category, orange ones against it; the deeper, the more."


def write_explanations(result: dict[str, Any], path: Path) -> None:
    """Write what `explain` found.

    Raises:
        InputError: the file cannot be written.
    """
    source = " and ".join(str(each) for each in (result["checkpoint"], result["url"]) if each)
    page = Page("Which words decided", f"Categories given by {source}. {LEGEND}")
    for explanation in result["explanations"]:
        _explanation(page, explanation, result["methods"])
        page.table(
            ["word", *(UNITS[method] for method in result["methods"])],
            [[word["word"], *(word[method] for method in result["methods"])] for word in explanation["words"]],
        )
    _write(page, path)


def write_check(result: dict[str, Any], path: Path) -> None:
    """Write what the deletion check found.

    Raises:
        InputError: the file cannot be written.
    """
    skipped = ", ".join(f"{n} {reason}" for reason, n in result["skipped"].items()) or "none"
    page = Page(
        f"Deletion check of {result['checkpoint']}",
        f"{result['texts']} held-out texts of {result['data']} (passed over: {skipped}), seed {result['seed']}, "
        f"{result['draws']} random orders of each; judged by {result['judge']}. Mean probability of the category: "
        f"{result['confidence']:.4f}.",
    )
    page.heading(f"Without {result['removed']:.0%} of the words")
    page.table(
        ["words left out", "mean fall of the probability", "± error", "another category", "area under the curve"],
        [
            [NAMES[each["method"]], *(each[key] for key in ("fall", "error", "changed", "area"))]
            for each in result["methods"]
        ],
    )
    page.text(
        "If an explanation is right, the probability falls far more without its heaviest words than without as many "
        "random ones, and the area under its curve is smaller."
    )
    figure = Figure(figsize=(7, 4))
    axes = figure.add_subplot()
    for each in result["methods"]:
        axes.plot(result["shares"], each["curve"], "o-", color=COLORS[each["method"]], label=NAMES[each["method"]])
    axes.set(xlabel="share of the words left out", ylabel="mean probability of the category", ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    axes.legend()
    page.plot(figure, "Mean probability of the category over the share of words left out, by method")
    gaps = result["completeness"]
    page.text(
        f"Completeness of the integrated gradients: their sum misses the difference to the baseline by "
        f"{gaps['mean_gap']:.4g} nats in the mean, {gaps['largest_gap']:.4g} at most."
    )
    page.heading("Some of the texts")
    page.text(LEGEND)
    for explanation in result["examples"]:
        _explanation(page, explanation, [each["method"] for each in result["methods"] if each["method"] in UNITS])
    _write(page, path)


def _explanation(page: Page, explanation: dict[str, Any], methods: list[str]) -> None:
    page.heading(f"{explanation['category']}, {explanation['confidence']:.4f}")
    for method in methods:
        page.text(f"By {NAMES[method]}:")
        page.marked(marks(explanation, method))
    if explanation["unread_characters"]:
        page.text(
            f"The {explanation['unread_characters']} characters behind this are cut off: the model reads no more."
        )
    if "completeness" in explanation:
        each = explanation["completeness"]
        page.text(
            f"Integrated gradients add up to {each['sum']:+.4f} nats; the log-probability is "
            f"{each['log_probability']:.4f}, that of the baseline {each['baseline']:.4f}: a gap of {each['gap']:+.4f}."
        )


def _write(page: Page, path: Path) -> None:
    try:
        page.write(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from None
