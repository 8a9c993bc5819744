"""The evaluation as one HTML page: the figures of `evaluate` in tables and plots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from aisle.palette import BLUE, GREY
from aisle.plots import legend, log_axis, percent_axis
from aisle.report import Page

MULTI_LABEL_FIGURES = {
    "micro_f1": "micro-F1: over all texts and categories at once",
    "macro_f1": "macro-F1: the mean over the categories",
    "weighted_f1": "weighted F1: the mean over the categories by their rows",
    "mean_average_precision": "mean average precision of the categories",
    "micro_average_precision": "average precision over all texts and categories at once",
    "exact_match": "share of the texts with all their categories and no other",
    "without_category": "share of the texts to which no category is given",
}
SHOWN_GROUPS = 40  # of errors, the most frequent


def write_report(result: dict[str, Any], path: Path) -> None:
    """Write the page, and its figures beside it as .json.

    Raises:
        InputError: the file cannot be written.
    """
    page = _page(result)
    _overview(page, result)
    if "attributes" in result:
        _attributes(page, result["attributes"])
    if result["unseen_labels"]:
        _unseen(page, result["unseen_labels"])
    if "membership" in result:
        _membership(page, result["membership"])
    if "baselines" in result:
        _baselines(page, result)
    _coverage(page, result["coverage"])
    _calibration(page, result["calibration"])
    if result.get("decisions"):
        _decisions(page, result["decisions"])
    _categories(page, result)
    _confusion(page, result)
    _errors(page, result["errors"])
    if "baselines" in result:
        _rules(page, result["baselines"][-1]["rules"])
    page.write(path, result)


def write_multi_label_report(result: dict[str, Any], path: Path) -> None:
    """Write the page of a multi-label model, and its figures beside it as .json.

    Raises:
        InputError: the file cannot be written.
    """
    page = _page(result, "Multi-label: a text has several categories. ")
    sizes = result["categories_per_text"]
    page.heading("Overview")
    page.table(["figure", "value"], [[title, result[name]] for name, title in MULTI_LABEL_FIGURES.items()])
    page.text(f"A text has {sizes['actual']:.2f} categories on average; the model gives it {sizes['given']:.2f}.")
    if result["unseen_labels"]:
        page.heading("Categories that the model never saw")
        page.table(["category", "rows"], [[each["label"], each["rows"]] for each in result["unseen_labels"]])
    page.heading("Categories, the weakest first")
    keys = ("precision", "recall", "f1", "average_precision", "support")
    rows = sorted(result["per_class"].items(), key=lambda item: item[1]["f1"])
    page.table(
        ["category", "precision", "recall", "F1", "average precision", "rows"],
        [[name, *(row[key] for key in keys)] for name, row in rows],
    )
    page.write(path, result)


def _page(result: dict[str, Any], kind: str = "") -> Page:
    """Return a page that says what was evaluated; `kind` begins its text."""
    part = "only rows that training held out" if result["held_out"] else "all rows"
    skipped = ", ".join(f"{n} {reason}" for reason, n in result["skipped"].items()) or "none"
    return Page(
        f"Evaluation of {result['evaluated']}",
        f"{kind}{result['rows']} rows of {result['data']} ({part}); skipped: {skipped}; refused by the server: "
        f"{result['refused']}. {result['texts_per_second']} texts per second.",
        {name: result[name] for name in ("evaluated", "data", "held_out")},
    )


def _overview(page: Page, result: dict[str, Any]) -> None:
    page.heading("Overview")
    rows = [["accuracy", result["accuracy"]]]
    rows += [[f"top-{k} accuracy", share] for k, share in result["top_k"].items() if k != "1"]
    rows += [
        ["macro-F1: the mean over the categories", result["macro_f1"]],
        ["micro-F1: over all rows at once", result["micro_f1"]],
        ["weighted F1: the mean over the categories by their rows", result["weighted_f1"]],
        ["expected calibration error", result["calibration"]["ece"]],
    ]
    page.table(["figure", "value"], rows)
    page.text(
        "Every row counts here, including copies of a text. aisle train drops copies first and measures each held-out "
        "text once, so the two accuracies differ if a table has copies."
    )
    if result["levels"]:
        page.heading("Levels of the category path")
        whole = {**result, "level": "whole path"}
        page.table(
            ["level", "categories", "accuracy", "macro-F1", "micro-F1", "weighted F1"],
            [[each["level"], len(each["per_class"]), *_scores(each)] for each in [*result["levels"], whole]],
        )


def _unseen(page: Page, labels: list[dict[str, Any]]) -> None:
    page.heading("Labels that the model never saw")
    page.text("The model cannot predict these labels. No other figure of this page counts these rows.")
    page.table(
        ["label", "rows", "mostly predicted as", "share", "mean confidence"],
        [[each[key] for key in ("label", "rows", "category", "share", "confidence")] for each in labels],
    )


def _membership(page: Page, found: dict[str, Any]) -> None:
    page.heading("Membership")
    page.text(
        "How well the loss of a text tells whether the model was trained on it. An AUC of 0.5 is a coin. The last "
        "column is the share of the training texts that are found if 1 % of the others are taken for training texts."
    )
    columns = {"members": "training texts", "others": "others", "loss_of_members": "loss of training texts"}
    page.records({**columns, "loss_of_others": "loss of others", "auc": "AUC", "found": "found"}, [found])


def _attributes(page: Page, attributes: dict[str, Any]) -> None:
    page.heading("Attributes: the further heads")
    page.table(
        ["attribute", "rows with a value", "accuracy", "macro-F1", "micro-F1", "weighted F1"],
        [[name, each["rows"], *_scores(each)] if each else [name, 0] + [None] * 4 for name, each in attributes.items()],
    )


def _scores(figures: dict[str, Any]) -> list[float]:
    return [figures[name] for name in ("accuracy", "macro_f1", "micro_f1", "weighted_f1")]


def _baselines(page: Page, result: dict[str, Any]) -> None:
    page.heading("Comparison with the baselines")
    page.text(
        "Both baselines were fitted on the training part of their table and classified the same rows. Two columns "
        "count the rows that only the model or only the baseline classified correctly. p is the p-value of McNemar's "
        "test: the probability of counts at least as uneven if both were equally good."
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
        + (f" and gives the correct category in {where:.1%} of these" if where is not None else "")
        + "; the other texts get the most frequent category."
    )


def _coverage(page: Page, coverage: dict[str, Any]) -> None:
    page.heading("Send to a human below this confidence")
    figure = Figure(figsize=(7, 4))
    axes = figure.add_subplot()
    curve = coverage["curve"]
    axes.plot([p["coverage"] for p in curve], [p["accuracy"] for p in curve], color=BLUE, label="accuracy")
    found = [p for p in coverage["wanted"] if 0 < p["coverage"] < 1]
    if found:
        axes.plot(
            [p["coverage"] for p in found], [p["accuracy"] for p in found], "o", color=BLUE, label="wanted accuracy"
        )
    for point in found:
        label = f"{point['wanted']:.0%}"
        axes.annotate(label, (point["coverage"], point["accuracy"]), (4, -12), textcoords="offset points")
    axes.set(xlabel="share of texts answered without a human", ylabel="accuracy on these")
    percent_axis(axes, "x")
    percent_axis(axes, "y", whole=False)
    axes.grid(alpha=0.3)
    legend(axes)
    page.plot(figure, "Accuracy on the texts answered without a human, by their share")
    columns = ["confidence at least", "answered", "accuracy on these"]
    page.table(
        ["accuracy wanted", *columns],
        [[f"{p['wanted']:.0%}", p["threshold"], p["coverage"], p["accuracy"]] for p in coverage["wanted"]],
    )
    page.text("The same for round thresholds:")
    page.table(columns, [[p["threshold"], p["coverage"], p["accuracy"]] for p in coverage["thresholds"]])
    page.text("A threshold chosen on these rows does slightly worse on others. Choose it on rows like the live ones.")


def _calibration(page: Page, calibration: dict[str, Any]) -> None:
    page.heading("Calibration: do confidences match the accuracy?")
    figure = Figure(figsize=(6, 5.5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    bins = calibration["bins"]
    confidence = [each["confidence"] for each in bins]
    above.plot([0, 1], [0, 1], "--", color=GREY, label="calibrated model")
    above.plot(confidence, [each["accuracy"] for each in bins], "o-", color=BLUE, label="this model")
    above.set(ylabel="accuracy")
    above.legend(loc="upper left", frameon=False, fontsize=9)
    below.bar(confidence, [each["rows"] for each in bins], width=0.04, color=BLUE)
    below.set(xlabel="confidence", ylabel="texts", yscale="log", ylim=(0.8, None))
    log_axis(below, "y")
    for direction in ("x", "y"):
        percent_axis(above, direction)
    above.grid(alpha=0.3)
    page.plot(figure, "Accuracy by confidence, and the number of texts")
    page.table(
        ["figure", "value"],
        [
            ["mean confidence", calibration["mean_confidence"]],
            ["expected calibration error, bins of equal width", calibration["ece"]],
            ["expected calibration error, bins of equal size", calibration["ece_mass"]],
            ["Brier score of the predicted category", calibration["brier"]],
            ["log loss: the mean negative log-probability of the correct category", calibration["nll"]],
            ["remaining temperature", calibration["temperature"]],
        ],
    )
    page.text(
        "Training fits a temperature and puts it into the weights. The remaining temperature is the one that would "
        "calibrate the model on these rows: above 1 the model is overconfident, below 1 underconfident."
    )


def _decisions(page: Page, decisions: dict[str, Any]) -> None:
    page.heading("Decisions: accept, review or unknown")
    shown = ("share", "precision", "low", "high")
    page.table(
        ["decision", "share of the texts", "precision", "from", "to"],
        [
            ["accept", *(decisions["accepted"][key] for key in shown)],
            ["review", decisions["review"], None, None, None],
            ["review, of which only the upper level is sure", *(decisions["parents"][key] for key in shown)],
            ["unknown", decisions["unknown"], None, None, None],
        ],
    )
    page.text("From and to: the 95 % confidence interval on these rows.")
    if unseen := decisions["unseen"]:
        page.text(
            f"Of the {unseen['rows']} texts with labels that the model never saw, {unseen['unknown']:.1%} are called "
            f"unknown and {unseen['accepted']:.1%} are accepted. AUROC of the energy: {unseen['auroc']:.3f}; 1 would "
            "separate them from the other texts, 0.5 is chance."
        )
    sets = decisions["sets"]
    page.text(
        f"Prediction sets: {sets['coverage']:.1%} hold the correct category ({sets['low']:.1%} to {sets['high']:.1%}). "
        f"They have {sets['mean_size']:.2f} categories on average, and at most {sets['largest_size']}."
    )
    page.table(
        ["category", "rows", "accepted", "precision", "from", "to", "sets that hold it", "mean set size"],
        [
            [
                name,
                each["rows"],
                *(each["accepted"][key] for key in ("rows", "precision", "low", "high")),
                *(each["sets"][key] for key in ("coverage", "mean_size")),
            ]
            for name, each in decisions["per_category"].items()
        ],
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
        ["actual", "predicted", "rows", "share of the actual category"],
        [
            [each["actual"], each["predicted"], each["rows"], each["share_of_actual"]]
            for each in result["errors"][:SHOWN_GROUPS]
        ],
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
        "The most frequent confusions, each with the texts of highest confidence. A confident error is often a wrong "
        "label: check these first."
    )
    page.table(
        ["actual", "predicted", "confidence", "text"],
        [
            [each["actual"], each["predicted"], example["confidence"], example["text"]]
            for each in errors[:SHOWN_GROUPS]
            for example in each["examples"]
        ],
    )


def _rules(page: Page, rules: dict[str, list[str]]) -> None:
    page.heading("The keyword rules")
    page.text("The words of each category with the highest chi-squared. The category with the most keywords wins.")
    page.table(["category", "keywords"], [[name, ", ".join(keywords)] for name, keywords in rules.items()])
