"""The evaluation as one HTML page: the figures of `evaluate` in tables and plots, nothing computed anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from aisle.report import Page

BLUE, GREY = "#1f5fa8", "#999999"


def write_report(result: dict[str, Any], path: Path) -> None:
    """Write the page.

    Raises:
        InputError: the file cannot be written.
    """
    part = "the rows held out from training" if result["held_out"] else "all rows"
    skipped = ", ".join(f"{n} {reason}" for reason, n in result["skipped"].items()) or "none"
    page = Page(
        f"Evaluation of {result['evaluated']}",
        f"{result['rows']} rows of {result['data']} ({part}); skipped: {skipped}; refused by the server: "
        f"{result['refused']}. {result['texts_per_second']} texts per second.",
    )
    _overview(page, result)
    if "baselines" in result:
        _baselines(page, result)
    _coverage(page, result["coverage"])
    _calibration(page, result["calibration"])
    _categories(page, result)
    _confusion(page, result)
    _errors(page, result["errors"])
    if "baselines" in result:
        _rules(page, result["baselines"][-1]["rules"])
    page.write(path)


def _overview(page: Page, result: dict[str, Any]) -> None:
    page.heading("Overview")
    rows = [["accuracy", result["accuracy"]]]
    rows += [[f"among the first {k}", share] for k, share in result["top_k"].items() if k != "1"]
    rows += [
        ["macro-F1: the mean over the categories", result["macro_f1"]],
        ["micro-F1: over all rows at once", result["micro_f1"]],
        ["weighted F1: the mean over the categories by their rows", result["weighted_f1"]],
        ["expected calibration error", result["calibration"]["ece"]],
    ]
    page.table(["figure", "value"], rows)
    if result["levels"]:
        page.heading("Levels of the path")
        whole = {**result, "level": "whole path"}
        page.table(
            ["level", "categories", "accuracy", "macro-F1", "micro-F1", "weighted F1"],
            [[each["level"], len(each["per_class"]), *_scores(each)] for each in [*result["levels"], whole]],
        )


def _scores(figures: dict[str, Any]) -> list[float]:
    return [figures[name] for name in ("accuracy", "macro_f1", "micro_f1", "weighted_f1")]


def _baselines(page: Page, result: dict[str, Any]) -> None:
    page.heading("Beside the baselines")
    page.text(
        "Both were fitted on the training part of the baselines' table and answered the same rows. The columns on the "
        "right count the rows that only one of the two has right; p is how probable so uneven a division would be "
        "between equals (McNemar's test)."
    )
    page.table(
        ["", "accuracy", "macro-F1", "micro-F1", "weighted F1", "only the model", "only the baseline", "p", "seconds"],
        [
            ["model", *_scores(result), None, None, None, result["seconds"]],
            *(
                [
                    each["name"],
                    *_scores(each),
                    *(each[key] for key in ("only_model_right", "only_baseline_right", "p_value", "seconds")),
                ]
                for each in result["baselines"]
            ),
        ],
    )
    rules = result["baselines"][-1]
    where = rules["accuracy_where_matched"]
    page.text(
        f"A keyword occurs in {rules['matched']:.1%} of the texts"
        + (f" and tells the right category in {where:.1%} of these" if where is not None else "")
        + "; the others count as the commonest category."
    )


def _coverage(page: Page, coverage: dict[str, Any]) -> None:
    page.heading("Send to a human below this confidence")
    figure = Figure(figsize=(7, 4))
    axes = figure.add_subplot()
    curve = coverage["curve"]
    axes.plot([p["coverage"] for p in curve], [p["accuracy"] for p in curve], color=BLUE)
    found = [p for p in coverage["wanted"] if 0 < p["coverage"] < 1]
    axes.plot([p["coverage"] for p in found], [p["accuracy"] for p in found], "o", color=BLUE)
    for point in found:
        label = f"{point['wanted']:.0%}"
        axes.annotate(label, (point["coverage"], point["accuracy"]), (0, 6), textcoords="offset points")
    axes.set(xlabel="share of texts answered without a human", ylabel="accuracy on these", xlim=(0, 1.02))
    axes.grid(alpha=0.3)
    page.plot(figure, "Accuracy on the texts answered without a human, over their share")
    columns = ["confidence at least", "answered", "accuracy on these"]
    page.table(
        ["accuracy wanted", *columns],
        [[f"{p['wanted']:.0%}", p["threshold"], p["coverage"], p["accuracy"]] for p in coverage["wanted"]],
    )
    page.text("The same the other way round, for round thresholds:")
    page.table(columns, [[p["threshold"], p["coverage"], p["accuracy"]] for p in coverage["thresholds"]])
    page.text("A threshold chosen on these rows does slightly worse on others; choose it on rows like those to come.")


def _calibration(page: Page, calibration: dict[str, Any]) -> None:
    page.heading("Does confidence mean what it says?")
    figure = Figure(figsize=(5.5, 5.5))
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    bins = calibration["bins"]
    confidence = [each["confidence"] for each in bins]
    above.plot([0, 1], [0, 1], "--", color=GREY)
    above.plot(confidence, [each["accuracy"] for each in bins], "o-", color=BLUE)
    above.set(ylabel="accuracy", xlim=(0, 1.02), ylim=(0, 1.02))
    below.bar(confidence, [each["rows"] for each in bins], width=0.04, color=BLUE)
    below.set(xlabel="confidence", ylabel="texts", yscale="log", ylim=(0.5, None))
    above.grid(alpha=0.3)
    page.plot(figure, "Accuracy over confidence; a calibrated model lies on the diagonal")
    page.table(
        ["figure", "value"],
        [
            ["mean confidence", calibration["mean_confidence"]],
            ["expected calibration error, bins of equal width", calibration["ece"]],
            ["expected calibration error, bins of equal size", calibration["ece_mass"]],
            ["Brier score of the first category", calibration["brier"]],
            ["negative log-likelihood, nats", calibration["nll"]],
            ["temperature still to be fitted", calibration["temperature"]],
        ],
    )
    page.text(
        "The temperature fitted in training is part of the weights. What is still to be fitted is 1 for a calibrated "
        "model; above 1 the model is too sure of itself, below 1 not sure enough."
    )


def _categories(page: Page, result: dict[str, Any]) -> None:
    for level in [*result["levels"], {**result, "level": None}]:
        page.heading("Categories, the weakest first" + (f": level {level['level']}" if level["level"] else ""))
        rows = sorted(level["per_class"].items(), key=lambda item: item[1]["f1"])
        page.table(
            ["category", "precision", "recall", "F1", "rows"],
            [[name, *(row[key] for key in ("precision", "recall", "f1", "support"))] for name, row in rows],
        )


def _confusion(page: Page, result: dict[str, Any]) -> None:
    if result["confusion"]:
        page.heading("Confusion")
        _heat_map(page, result["confusion"])
    page.heading("Most frequent confusions")
    page.table(
        ["actual", "taken for", "rows", "share of the actual"],
        [[each["actual"], each["predicted"], each["rows"], each["share_of_actual"]] for each in result["errors"]],
    )


def _heat_map(page: Page, confusion: dict[str, Any]) -> None:
    names, counts = confusion["categories"], confusion["counts"]
    shares = [[count / max(1, sum(row)) for count in row] for row in counts]
    size = 0.35 * len(names) + 1.5
    figure = Figure(figsize=(size, size))
    axes = figure.add_subplot()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    numbers = range(len(names))
    axes.set_xticks(numbers, [str(i + 1) for i in numbers])
    axes.set_yticks(numbers, [f"{name}  {i + 1}" for i, name in enumerate(names)])
    axes.set_xlabel("predicted")
    # Browsers draw Chinese characters 4 points wider than matplotlib expects of one that its font lacks.
    axes.set_ylabel("actual", labelpad=4 + 4 * max(sum(not c.isascii() for c in name) for name in names))
    for y, row in enumerate(counts):
        for x, count in enumerate(row):
            if count:
                color = "white" if shares[y][x] > 0.5 else "black"
                axes.text(x, y, str(count), ha="center", va="center", fontsize=7, color=color)
    page.plot(figure, "Rows by actual and predicted category; the darker, the larger the share of the actual category")


def _errors(page: Page, errors: list[dict[str, Any]]) -> None:
    page.heading("Errors and their texts")
    page.text(
        "The most frequent confusions, each with the texts that the model is surest of. An error of high confidence is "
        "often a wrong label: look at these first."
    )
    page.table(
        ["actual", "taken for", "confidence", "text"],
        [
            [each["actual"], each["predicted"], example["confidence"], example["text"]]
            for each in errors
            for example in each["examples"]
        ],
    )


def _rules(page: Page, rules: dict[str, list[str]]) -> None:
    page.heading("The keyword rules")
    page.text("The most telling words of each category by chi-squared; the category with the most of them wins.")
    page.table(["category", "keywords"], [[name, ", ".join(keywords)] for name, keywords in rules.items()])
