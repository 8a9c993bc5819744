"""Metrics of predictions."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    confusion_matrix,
    f1_score,
    precision_recall_fscore_support,
)

from aisle.preprocess.labels import SEPARATOR, upto
from aisle.train.core.multi_label import Assigned, Flags

F1 = ("macro", "micro", "weighted")
THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
WANTED = (0.9, 0.95, 0.98, 0.99)  # wanted accuracies on the texts that are answered without a human
LARGEST_MATRIX = 40  # categories; a larger matrix is unreadable
GROUPS = 400  # the most frequent groups of errors
EXAMPLES = 5  # texts of each group


def score(actual: Sequence[str], predicted: Sequence[str]) -> dict[str, Any]:
    """Return accuracy, three kinds of F1 and a table per category.

    macro_f1 is the plain mean over the categories that occur, weighted_f1 the mean by their rows; micro_f1 pools all
    rows, and so equals the accuracy where each text has one category.
    """
    names = sorted({*actual, *predicted})
    columns = precision_recall_fscore_support(actual, predicted, labels=names, zero_division=0)
    return {
        "accuracy": float(accuracy_score(actual, predicted)),
        **{f"{kind}_f1": float(f1_score(actual, predicted, average=kind, zero_division=0)) for kind in F1},
        "per_class": {
            name: {"precision": float(p), "recall": float(r), "f1": float(f), "support": int(n)}
            for name, p, r, f, n in zip(names, *columns, strict=True)
        },
    }


def score_sets(actual: Flags, assigned: Assigned, names: Sequence[str]) -> dict[str, Any]:
    """Return the scores of a multi-label model, and a table per category.

    micro_f1 pools all texts and categories. macro_f1 is the plain mean over the categories that occur. The
    average_precision of a category is the area under its curve of precision by recall, which needs no threshold;
    mean_average_precision is its mean over the categories with texts. exact_match is the share of texts with all their
    categories and no other.

    Args:
        actual: which categories each text has, [texts, categories].
        names: of the categories, in the order of the logits.
    """
    predicted = assigned.reached
    occur = np.flatnonzero(actual.any(axis=0) | predicted.any(axis=0))
    columns = precision_recall_fscore_support(actual, predicted, labels=occur, zero_division=0)
    average = _average_precisions(actual, assigned.probabilities)
    return {
        **{
            f"{kind}_f1": float(f1_score(actual, predicted, labels=occur, average=kind, zero_division=0)) for kind in F1
        },
        "mean_average_precision": float(np.mean([*average.values()])),
        "micro_average_precision": float(average_precision_score(actual.ravel(), assigned.probabilities.ravel())),
        "exact_match": float((actual == predicted).all(axis=1).mean()),
        "categories_per_text": {
            "actual": float(actual.sum(axis=1).mean()),
            "given": float(predicted.sum(axis=1).mean()),
        },
        "without_category": float((~predicted.any(axis=1)).mean()),
        "per_class": {
            names[i]: {
                **{"precision": float(p), "recall": float(r), "f1": float(f), "support": int(n)},
                "average_precision": average.get(i),
            }
            for i, p, r, f, n in zip(occur, *columns, strict=True)
        },
    }


def _average_precisions(actual: Flags, probabilities: npt.NDArray[np.floating[Any]]) -> dict[int, float]:
    """Return the average precision of each category that has texts, by its number."""
    numbers = np.flatnonzero(actual.any(axis=0)).tolist()
    return {i: float(average_precision_score(actual[:, i], probabilities[:, i])) for i in numbers}


def upper_levels(actual: Sequence[str], predicted: Sequence[str]) -> list[dict[str, Any]]:
    """Return the scores of each level above the leaves, departments first; an empty list if categories are flat."""
    depth = max(label.count(SEPARATOR) for label in actual)
    return [
        {
            "level": level,
            **score([upto(label, level) for label in actual], [upto(label, level) for label in predicted]),
        }
        for level in range(1, depth + 1)
    ]


def top_k(actual: Sequence[str], ranked: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return the top-k accuracy for each k."""
    widest = max(map(len, ranked))
    return {
        str(k): sum(label in names[:k] for label, names in zip(actual, ranked, strict=True)) / len(actual)
        for k in range(1, widest + 1)
    }


def coverage(confidence: npt.NDArray[np.floating[Any]], correct: npt.NDArray[np.bool_]) -> dict[str, Any]:
    """Return the coverage and the accuracy when texts below a confidence threshold are sent to a human.

    `thresholds` has them at round confidences, `curve` at each hundredth of the rows, and `wanted` at the lowest
    threshold that reaches each wanted accuracy (None if no threshold does).
    """
    order = np.argsort(-confidence, kind="stable")
    ranked, right = confidence[order], np.cumsum(correct[order])

    def answering(rows: int, threshold: float | None) -> dict[str, float | None]:
        accuracy = float(right[rows - 1] / rows) if rows else None
        return {"threshold": threshold, "coverage": rows / len(ranked), "accuracy": accuracy}

    def at(threshold: float) -> dict[str, float | None]:
        return answering(int(np.searchsorted(-ranked, -threshold, side="right")), threshold)

    # Texts of equal confidence are answered together, so only the last of them can set the threshold.
    last = np.append(ranked[1:] != ranked[:-1], True)
    accuracies = right / np.arange(1, len(ranked) + 1)
    wanted = []
    for accuracy in WANTED:
        enough = np.flatnonzero(last & (accuracies >= accuracy))
        found = at(float(ranked[enough[-1]])) if len(enough) else answering(0, None)
        wanted.append({"wanted": accuracy, **found})
    hundredths = np.unique(np.ceil(np.linspace(0.01, 1, 100) * len(ranked)).astype(int)) - 1
    return {
        "wanted": wanted,
        "thresholds": [at(threshold) for threshold in THRESHOLDS],
        "curve": [at(float(ranked[row])) for row in hundredths],
    }


def confusion(actual: Sequence[str], predicted: Sequence[str]) -> dict[str, Any] | None:
    """Return the matrix of counts: rows are actual, columns predicted categories. None if it would be too large."""
    names = sorted({*actual, *predicted})
    if len(names) > LARGEST_MATRIX:
        return None
    return {"categories": names, "counts": confusion_matrix(actual, predicted, labels=names).tolist()}


def mean_confidence(predicted: Sequence[str], confidence: npt.NDArray[np.floating[Any]]) -> dict[str, float]:
    """Return the mean confidence of each predicted category. A calibrated model has about its precision here."""
    names, places = np.unique(np.array(predicted), return_inverse=True)
    means = np.bincount(places, confidence) / np.bincount(places)
    return dict(zip(names.tolist(), means.tolist(), strict=True))


def errors(
    texts: Sequence[str], actual: Sequence[str], predicted: Sequence[str], confidence: npt.NDArray[np.floating[Any]]
) -> list[dict[str, Any]]:
    """Return the largest groups of errors by actual and predicted category, each with its most confident texts."""
    rows = Counter(actual)
    groups: dict[tuple[str, str], list[tuple[float, str]]] = defaultdict(list)
    for text, label, guess, sure in zip(texts, actual, predicted, confidence.tolist(), strict=True):
        if label != guess:
            groups[label, guess].append((sure, text))
    return [
        {
            "actual": label,
            "predicted": guess,
            "rows": len(group),
            "share_of_actual": len(group) / rows[label],
            "examples": [{"text": text, "confidence": sure} for sure, text in sorted(group, reverse=True)[:EXAMPLES]],
        }
        for (label, guess), group in sorted(groups.items(), key=lambda item: -len(item[1]))[:GROUPS]
    ]
