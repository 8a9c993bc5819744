"""The outputs of decisions, for requests that ask for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from aisle.deploy.serving.answers import Labels, Logits, pairs_of
from aisle.deploy.serving.cache import DECISION, PAIR
from aisle.train.core.decisions import OUTCOMES, Decisions

OUTPUTS = ("decision", "decided", "prediction_set", "energy")
MISSING = (
    "this version has no decisions; fit them with aisle decide CHECKPOINT, then build and deploy it again; a "
    "multi-label model cannot have them"
)
Tensors = dict[str, Any]


class Decider:
    """Computes the decisions of a version."""

    def __init__(self, decisions: Decisions, labels: Labels) -> None:
        self._decisions, self._labels = decisions, labels
        self._names = np.array([name.encode() for name in decisions.names], np.object_)
        self._outcomes = np.array([name.encode() for name in OUTCOMES], np.object_)

    def entries(self, logits: Logits, k: int) -> list[bytes]:
        """Return the cache entry of each text, given its logits [texts, labels].

        It is a `DECISION`, and then the best `k` categories, or those of the prediction set if these are more, as
        `PAIR`s.
        """
        decided = self._decisions.apply(logits)
        heads = np.empty(len(logits), DECISION)
        for name, values in zip(DECISION.names or (), decided, strict=True):
            heads[name] = values
        widths = np.maximum(decided.set_size, k)
        pairs = pairs_of(logits, int(widths.max(initial=1)))
        return [head.tobytes() + row[:width].tobytes() for head, row, width in zip(heads, pairs, widths, strict=True)]

    def tensors(self, entries: Sequence[bytes]) -> Tensors:
        """Return the outputs for texts with these entries.

        `decision`, `decided` and `energy` are [texts, 1]; `prediction_set` is [texts, most], with empty strings after
        the last category of a smaller set.
        """
        heads = _heads(entries)
        members = np.full((len(entries), int(heads["set_size"].max(initial=1))), b"", np.object_)
        for row, (entry, size) in enumerate(zip(entries, heads["set_size"].tolist(), strict=True)):
            ranked = np.frombuffer(entry, PAIR, size, offset=DECISION.itemsize)
            members[row, :size] = self._labels.encoded(ranked["index"])
        return {
            "decision": self._outcomes[heads["outcome"]][:, None],
            "decided": self._names[heads["category"]][:, None],
            "prediction_set": members,
            "energy": heads["energy"][:, None],
        }


def no_decisions(texts: int) -> Tensors:
    """Return the outputs of a version without decisions: empty strings, and NaN."""
    empty = np.full((texts, 1), b"", np.object_)
    energy = np.full((texts, 1), np.nan, np.float32)
    return {"decision": empty, "decided": empty, "prediction_set": empty, "energy": energy}


def count_outcomes(entries: Sequence[bytes]) -> dict[str, int]:
    """Return how often each decision occurs."""
    counts = Counter(_heads(entries)["outcome"].tolist())
    return {OUTCOMES[outcome]: count for outcome, count in counts.items()}


def _heads(entries: Sequence[bytes]) -> Any:
    return np.frombuffer(b"".join([entry[: DECISION.itemsize] for entry in entries]), DECISION)
