"""The categories of multi-label versions, in the order of an answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from aisle.deploy.serving.answers import Indices, Labels, Logits, best_of
from aisle.deploy.serving.cache import PAIR
from aisle.train.core.multi_label import FILE, Thresholds

ALL_REACHED = 0  # the `top_k` of a request for the categories that reach their thresholds
NONE = -1  # the index that fills up the row of a text with fewer categories; its name is empty
_FILLING = np.array((NONE, 0.0), PAIR).tobytes()
Pairs = npt.NDArray[Any]  # of `PAIR`


class MultiLabelRanking:
    """Ranks the categories of a multi-label version."""

    def __init__(self, thresholds: Thresholds) -> None:
        self._thresholds = thresholds

    @staticmethod
    def load(folder: Path, labels: Labels) -> MultiLabelRanking | None:
        """Read the thresholds of a version folder; None if the version gives one category.

        Raises:
            InputError: they are damaged.
        """
        return MultiLabelRanking(Thresholds.load(folder, labels.names)) if (folder / FILE).is_file() else None

    def pairs(self, logits: Logits, k: int) -> Pairs:
        """Return the best `k` categories of logits [texts, labels], as [texts, k].

        With `ALL_REACHED`, return those that reach their thresholds, as [texts, most], filled up with `NONE`.
        """
        probabilities, reached = self._thresholds.apply(logits)
        if k != ALL_REACHED:
            best = best_of(logits, k)
            return _pairs(best, np.take_along_axis(probabilities, best, axis=1))
        width = max(1, int(reached.sum(axis=1).max(initial=0)))
        best = best_of(np.where(reached, logits, -np.inf).astype(np.float32), width)
        kept = np.take_along_axis(reached, best, axis=1)
        confidences = np.take_along_axis(probabilities, best, axis=1)
        return _pairs(np.where(kept, best, NONE), np.where(kept, confidences, 0.0))


def _pairs(indices: Indices, confidences: npt.NDArray[Any]) -> Pairs:
    pairs = np.empty(indices.shape, PAIR)
    pairs["index"], pairs["confidence"] = indices, confidences
    return pairs


def read_reached(keys: Sequence[bytes], rows: Mapping[bytes, bytes]) -> Pairs:
    """Return the categories of each text, [texts, most], from cache entries of different widths."""
    width = max(len(rows[key]) for key in keys)
    filled = [rows[key] + _FILLING * ((width - len(rows[key])) // PAIR.itemsize) for key in keys]
    pairs = np.frombuffer(b"".join(filled), PAIR).reshape(len(keys), -1)
    return pairs[:, : max(1, int((pairs["index"] != NONE).sum(axis=1).max()))]


def reached_pairs(pairs: Pairs) -> Pairs:
    """Return the pairs of all texts that are not filling, [pairs]."""
    found: Pairs = pairs[pairs["index"] != NONE]
    return found
