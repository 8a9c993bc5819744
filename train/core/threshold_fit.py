"""Fit the threshold of each category of a multi-label model on validation texts.

A category gets the threshold with the highest F1 on its own texts (Yang 2001, "A study of thresholding strategies for
text categorization", SCut; Lipton et al. 2014, "Optimal thresholding of classifiers to maximize F1 measure",
arXiv:1402.1892). With few texts, such a threshold follows chance (Fan and Lin 2007, "A study on threshold selection for
multi-label classification"). So categories with fewer than `LEAST` validation texts share one threshold, that with the
highest F1 over all their decisions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from aisle.train.core.multi_label import Flags, Floats, Threshold, Thresholds, sigmoid

LEAST = 10  # validation texts of a category for a threshold of its own
DEFAULT = 0.5  # without validation texts


def fit_thresholds(logits: Floats, actual: Flags, labels: Sequence[str]) -> Thresholds:
    """Fit the thresholds on texts with these logits and actual categories, both [texts, labels]."""
    probabilities, rows = sigmoid(logits), actual.sum(axis=0)
    rare = rows < LEAST
    shared = _shared(probabilities, actual, rare)
    found = []
    for number, name in enumerate(labels):
        limit = shared if rare[number] else best_threshold(probabilities[:, number], actual[:, number])
        found.append(Threshold(name, limit, int(rare.sum()) if rare[number] else 1, int(rows[number])))
    return Thresholds(len(logits), tuple(found))


def _shared(probabilities: Floats, actual: Flags, rare: Flags) -> float:
    """Return the threshold of the rare categories; that of all categories if even together they have few texts."""
    chosen = rare if actual[:, rare].sum() >= LEAST else np.ones_like(rare)
    return best_threshold(probabilities[:, chosen].ravel(), actual[:, chosen].ravel())


def best_threshold(probabilities: Floats, actual: Flags) -> float:
    """Return the threshold with the highest F1 of some decisions, both [decisions]; the higher of equally good ones."""
    if not actual.any():
        return DEFAULT
    order = np.argsort(-probabilities, kind="stable")
    ranked, hits = probabilities[order], np.cumsum(actual[order])
    last = np.append(ranked[1:] != ranked[:-1], True)  # equal probabilities are decided together
    f1 = np.where(last, 2 * hits / (np.arange(1, len(ranked) + 1) + actual.sum()), 0)
    end = int(f1.argmax())
    below = ranked[end + 1] if end + 1 < len(ranked) else 0.0
    # Halfway, so that rounding in an engine changes little.
    return float(np.clip((ranked[end] + below) / 2, 1e-6, 1 - 1e-6))
