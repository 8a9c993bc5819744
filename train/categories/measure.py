"""What a change of categories costs, on texts that nothing was fitted on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from aisle.errors import InputError
from aisle.train.core.decisions import ACCEPT, Decisions, Floats, Ints
from aisle.train.core.metrics import score

LARGEST_LOSS = 0.002  # of accuracy


def check_loss(
    name: str, labels: Sequence[str], actual: Ints, before: Floats, after: Floats, advice: str
) -> dict[str, Any]:
    """Return the accuracy before and after a change, from logits whose columns begin with `labels`.

    Raises:
        InputError: more than 0.2 points are lost.
    """
    right = [logits.argmax(axis=1) == actual for logits in (before, after)]
    shares = [float(each.mean()) for each in right]
    if shares[0] - shares[1] > LARGEST_LOSS:
        most, rows = Counter(labels[i] for i in actual[right[0] & ~right[1]]).most_common(1)[0]
        raise InputError(
            f"{name!r} would cost {100 * (shares[0] - shares[1]):.2f} points of accuracy on {len(actual)} held-out "
            f"texts, most of them of {most!r} ({rows}); at most {100 * LARGEST_LOSS} may be lost: {advice}"
        )
    return {"rows": len(actual), "before": shares[0], "after": shares[1]}


def metrics_of(labels: Sequence[str], actual: Sequence[str], logits: Floats) -> dict[str, Any]:
    """Return metrics.json of a checkpoint with these logits on held-out texts."""
    return {**score(actual, [labels[i] for i in logits.argmax(axis=1)]), "rows": {"held_out": len(actual)}}


def accepted(decisions: Decisions, logits: Floats, actual: Ints) -> dict[str, float | None]:
    """Return which share of texts is accepted, and how many of these correctly (None if none is)."""
    decided = decisions.apply(logits)
    chosen = decided.outcome == ACCEPT
    precision = float((decided.category == actual)[chosen].mean()) if chosen.any() else None
    return {"share": float(chosen.mean()), "precision": precision}
