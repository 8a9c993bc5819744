"""How good predictions are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sklearn.metrics import accuracy_score, f1_score, precision_recall_fscore_support


def score(actual: Sequence[str], predicted: Sequence[str]) -> dict[str, Any]:
    """Return accuracy, macro_f1 (the plain mean over the categories that occur) and a table per category."""
    names = sorted({*actual, *predicted})
    columns = precision_recall_fscore_support(actual, predicted, labels=names, zero_division=0)
    return {
        "accuracy": float(accuracy_score(actual, predicted)),
        "macro_f1": float(f1_score(actual, predicted, average="macro", zero_division=0)),
        "per_class": {
            name: {"precision": float(p), "recall": float(r), "f1": float(f), "support": int(n)}
            for name, p, r, f, n in zip(names, *columns, strict=True)
        },
    }
