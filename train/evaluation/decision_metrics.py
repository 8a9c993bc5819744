"""How well decisions hold: what is accepted and how precisely, and how often prediction sets hold the category."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from sklearn.metrics import roc_auc_score

from aisle.client import Failure, Prediction
from aisle.preprocess.binomial import interval
from aisle.preprocess.labels import SEPARATOR

Answers = Sequence[Prediction | Failure]
Rows = list[tuple[str, Prediction]]  # label and answer


def measure_decisions(labels: Sequence[str], answers: Answers, unseen: Answers) -> dict[str, Any] | None:
    """Measure the decisions on texts whose labels the model knows; None if it has no decisions.

    A refused text is left out. `low` and `high` are the ends of 95 % confidence intervals (Clopper and Pearson 1934).

    Args:
        unseen: the answers to texts whose labels the model does not know.

    Returns:
        accepted: the share of the texts, and how many of their categories are correct.
        parents: the same for the texts of which only the upper level is sure. They are part of `review`.
        review, unknown: shares of the texts.
        sets: the share of prediction sets that hold the correct category, and their mean and largest size.
        per_category: `accepted` as this category with its precision, and the sets of the texts that belong to it.
        unseen: for texts of unknown labels, the shares called unknown and accepted, and the AUROC of the energy
            against the other texts; None if there are none.
    """
    rows = _decided(zip(labels, answers, strict=True))
    if not rows:
        return None
    accepted = [row for row in rows if row[1].decision == "accept"]
    parents = [row for row in rows if row[1].decision == "review" and row[1].decided]
    return {
        "accepted": {"share": len(accepted) / len(rows), **_precision(accepted)},
        "parents": {"share": len(parents) / len(rows), **_precision(parents)},
        "review": _share(rows, "review"),
        "unknown": _share(rows, "unknown"),
        "sets": _sets(rows),
        "per_category": _per_category(rows, accepted),
        "unseen": _unseen(rows, _decided(("", answer) for answer in unseen)),
    }


def _decided(pairs: Iterable[tuple[str, Prediction | Failure]]) -> Rows:
    return [
        (label, answer) for label, answer in pairs if isinstance(answer, Prediction) and answer.decision is not None
    ]


def is_within(label: str, category: str) -> bool:
    """Return whether a label is a category or lies below it."""
    return f"{label}{SEPARATOR}".startswith(f"{category}{SEPARATOR}")


def _precision(rows: Rows) -> dict[str, Any]:
    right = sum(is_within(label, answer.decided or "") for label, answer in rows)
    low, high = interval(right, len(rows)) if rows else (None, None)
    return {"rows": len(rows), "precision": right / len(rows) if rows else None, "low": low, "high": high}


def _share(rows: Rows, decision: str) -> float:
    return sum(answer.decision == decision for _, answer in rows) / len(rows)


def _sets(rows: Rows) -> dict[str, Any]:
    held = sum(label in (answer.prediction_set or ()) for label, answer in rows)
    sizes = [len(answer.prediction_set or ()) for _, answer in rows]
    low, high = interval(held, len(rows))
    figures = {"mean_size": sum(sizes) / len(sizes), "largest_size": max(sizes)}
    return {"coverage": held / len(rows), "low": low, "high": high, **figures}


def _per_category(rows: Rows, accepted: Rows) -> dict[str, Any]:
    own: defaultdict[str, Rows] = defaultdict(list)
    claimed: defaultdict[str, Rows] = defaultdict(list)
    for row in rows:
        own[row[0]].append(row)
    for row in accepted:
        claimed[row[1].decided or ""].append(row)
    return {
        name: {"rows": len(own[name]), "accepted": _precision(claimed[name]), "sets": _sets(own[name])}
        for name in sorted(own)
    }


def _unseen(known: Rows, unseen: Rows) -> dict[str, Any] | None:
    if not unseen:
        return None
    energies = [answer.energy or 0.0 for _, answer in (*known, *unseen)]
    return {
        "rows": len(unseen),
        "unknown": _share(unseen, "unknown"),
        "accepted": _share(unseen, "accept"),
        "auroc": float(roc_auc_score([False] * len(known) + [True] * len(unseen), energies)),
    }
