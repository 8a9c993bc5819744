"""Calibration: temperature scaling, and measures of the calibration error.

Temperature scaling (Guo et al. 2017) divides the logits by one number. The number is fitted on texts that training did
not see. It changes the confidences and no prediction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from aisle.train.core.multi_label import sigmoid

Floats = npt.NDArray[np.floating[Any]]
BINS = 15  # as in Guo et al. 2017
LOWEST, HIGHEST = 0.05, 20.0  # temperatures


def fit_temperature(logits: npt.ArrayLike, targets: npt.ArrayLike) -> float:
    """Return the temperature that minimizes the cross-entropy of logits [texts, labels] against targets [texts].

    As in Platt (1999), a probability of 1 / (texts + 2) is spread over all labels. Otherwise the best temperature would
    be zero if every text is right. Without texts the temperature is 1.
    """
    scores, wanted = np.asarray(logits, np.float64), np.asarray(targets)
    if not len(scores):
        return 1.0
    smoothing = 1 / (len(scores) + 2)
    actual = (1 - smoothing) * scores[np.arange(len(scores)), wanted] + smoothing * scores.mean(axis=1)
    return _bisect(lambda sharpness: ((softmax(scores * sharpness) * scores).sum(axis=1) - actual).mean())


def fit_sigmoid_temperature(logits: npt.ArrayLike, targets: npt.ArrayLike) -> float:
    """Return the temperature that minimizes the binary cross-entropy of logits against targets, both [texts, labels].

    As in Platt (1999), 1 / (texts + 2) of each target's certainty is taken away. Without texts the temperature is 1.
    """
    scores, wanted = np.asarray(logits, np.float64), np.asarray(targets, np.float64)
    if not len(scores):
        return 1.0
    smoothing = 1 / (len(scores) + 2)
    actual = wanted * (1 - 2 * smoothing) + smoothing
    return _bisect(lambda sharpness: ((sigmoid(scores * sharpness) - actual) * scores).mean())


def _bisect(slope_at: Callable[[float], float]) -> float:
    """Return the temperature at which a loss is smallest.

    The loss is convex in 1 / temperature, so its slope crosses zero once.

    Args:
        slope_at: the slope of the loss at a value of 1 / temperature.
    """
    low, high = np.log(1 / HIGHEST), np.log(1 / LOWEST)
    for _ in range(24):
        middle = (low + high) / 2
        low, high = (low, middle) if slope_at(np.exp(middle)) > 0 else (middle, high)
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

    Only these categories are used, because a server sends no others. The rest of the probability counts as one more
    outcome, "none of them". `ece` is the expected calibration error over bins of equal width, and `ece_mass` over bins
    of equal size (Nguyen and O'Connor 2015). `brier` is the mean squared error of the first confidence, and `nll` the
    mean negative log-likelihood (natural logarithm). `temperature` is the remaining temperature, 1 if the model is
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
