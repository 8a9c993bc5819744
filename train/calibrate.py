"""Confidence that means what it says: temperature scaling, and how far from calibrated a model is.

Temperature scaling (Guo et al. 2017) divides the logits by one number, fitted on texts that training did not see. It
changes no prediction, only how sure the model is of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]
BINS = 15  # as in Guo et al. 2017
COOLEST, HOTTEST = 0.05, 20.0


def fit_temperature(logits: npt.ArrayLike, targets: npt.ArrayLike) -> float:
    """Return the temperature that minimizes the cross-entropy of logits [texts, labels] against targets [texts].

    As in Platt (1999), each target gives up 1 / (texts + 2) to the other labels: where every text is right, the best
    temperature would otherwise be zero. Without texts the temperature is 1.
    """
    scores, wanted = np.asarray(logits, np.float64), np.asarray(targets)
    if not len(scores):
        return 1.0
    doubt = 1 / (len(scores) + 2)
    actual = (1 - doubt) * scores[np.arange(len(scores)), wanted] + doubt * scores.mean(axis=1)
    # The loss is convex in 1 / temperature, so its slope crosses zero once: halve the interval around that.
    low, high = np.log(1 / HOTTEST), np.log(1 / COOLEST)
    for _ in range(24):
        middle = (low + high) / 2
        slope = ((softmax(scores * np.exp(middle)) * scores).sum(axis=1) - actual).mean()
        low, high = (low, middle) if slope > 0 else (middle, high)
    return float(np.exp(-(low + high) / 2))


def softmax(logits: Floats) -> Floats:
    """Return the probabilities of logits [texts, labels], computed as the server does."""
    probabilities: Floats = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    return probabilities


def calibration(
    actual: Sequence[str], ranked: Sequence[Sequence[str]], confidences: Sequence[Sequence[float]]
) -> dict[str, Any]:
    """Compare confidence with accuracy: `ranked[i]` are the most probable categories of text i, best first.

    All figures come from these categories alone, as a server sends them; what they leave over of the probability
    counts as one further outcome, "none of them". `ece` is the expected calibration error over bins of equal width,
    `ece_mass` over bins of equal size (Nguyen and O'Connor 2015), `brier` the mean squared error of the first
    confidence, `nll` the mean negative log-likelihood in nats, `temperature` what is left to fit: 1 if the model is
    calibrated.
    """
    first = np.array([each[0] for each in confidences])
    correct = np.array([names[0] == label for label, names in zip(actual, ranked, strict=True)])
    equal_width = np.minimum((first * BINS).astype(int), BINS - 1)
    equal_mass = np.empty(len(first), int)
    equal_mass[np.argsort(first, kind="stable")] = np.arange(len(first)) * BINS // len(first)

    named = np.array(confidences, np.float64)  # [texts, k]
    outcomes = np.log(np.maximum(np.column_stack([named, 1 - named.sum(axis=1)]), 1e-7))  # about fp32's resolution
    happened = [
        names.index(label) if label in names else len(names)
        for label, names in zip(actual, map(list, ranked), strict=True)
    ]
    bins = _bins(first, correct, equal_width)
    return {
        "mean_confidence": float(first.mean()),
        "ece": _expected_error(bins),
        "ece_mass": _expected_error(_bins(first, correct, equal_mass)),
        "brier": float(np.mean((first - correct) ** 2)),
        "nll": float(-outcomes[np.arange(len(outcomes)), happened].mean()),
        "temperature": fit_temperature(outcomes, happened),
        "bins": bins,
    }


def _bins(confidence: Floats, correct: npt.NDArray[np.bool_], bins: npt.NDArray[np.int_]) -> list[dict[str, float]]:
    """Return the bins that hold any text."""
    return [
        {
            "rows": int((bins == each).sum()),
            "confidence": float(confidence[bins == each].mean()),
            "accuracy": float(correct[bins == each].mean()),
        }
        for each in np.unique(bins)
    ]


def _expected_error(bins: list[dict[str, float]]) -> float:
    rows = sum(each["rows"] for each in bins)
    return sum(each["rows"] / rows * abs(each["accuracy"] - each["confidence"]) for each in bins)
