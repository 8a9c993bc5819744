"""Labels and ranking: turn the logits of each text into its most probable categories."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from aisle.deploy.serving.cache import PAIR
from aisle.errors import InputError

Logits = npt.NDArray[np.float32]
Indices = npt.NDArray[np.intp]


class Labels:
    """The categories of a version, in the order of its logits."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        # UTF-8, encoded once; last the empty name of no category, which has the index -1.
        self._encoded = np.array([*(name.encode() for name in names), b""], np.object_)

    @staticmethod
    def load(folder: Path, expected: int) -> Labels:
        """Read labels.json of a version folder.

        Raises:
            InputError: the file is missing or damaged, or does not hold the `expected` number of labels.
        """
        try:
            names = json.loads((folder / "labels.json").read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{folder} holds no labels: {error}; build the version again") from None
        if len(names) != expected:
            raise InputError(f"{folder}: {len(names)} labels for {expected} logits; build the version again")
        return Labels(names)

    def top_k(self, requested: npt.NDArray[np.integer[Any]] | None) -> int:
        """Return the number of categories that a request wants; 1 by default.

        Args:
            requested: the request's `top_k` [texts, 1], if it has one.

        Raises:
            InputError: the rows differ, or the number is out of range.
        """
        if requested is None:
            return 1
        values = sorted(set(requested.ravel().tolist()))
        if len(values) != 1 or not 1 <= values[0] <= len(self.names):
            raise InputError(f"top_k must be one number from 1 to {len(self.names)} in every row; got {values}")
        return int(values[0])

    def encoded(self, indices: Indices) -> npt.NDArray[np.object_]:
        """Return the categories with these indices as UTF-8, in the same shape."""
        found: npt.NDArray[np.object_] = self._encoded[indices]
        return found

    def counts(self, indices: Indices) -> dict[str, int]:
        """Return how often each category occurs among the indices [texts]."""
        return {self.names[index]: count for index, count in Counter(indices.tolist()).items()}


def pairs_of(logits: Logits, k: int) -> npt.NDArray[Any]:
    """Return the best `k` categories of logits [texts, labels], as [texts, k] of `PAIR`."""
    indices, confidences = rank(logits, k)
    pairs = np.empty(indices.shape, PAIR)
    pairs["index"], pairs["confidence"] = indices, confidences
    return pairs


def rank(logits: Logits, k: int) -> tuple[Indices, Logits]:
    """Return indices and softmax probabilities of the k largest `logits` [texts, labels], each [texts, k]."""
    if k == 1:
        best = logits.argmax(axis=1)
        highest = logits[np.arange(len(logits)), best][:, None]
        return best[:, None], 1 / np.exp(logits - highest).sum(axis=1, keepdims=True)
    best = best_of(logits, k)
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return best, np.take_along_axis(powers, best, axis=1) / powers.sum(axis=1, keepdims=True)


def best_of(logits: Logits, k: int) -> Indices:
    """Return the indices of the k largest logits [texts, labels], largest first, [texts, k]."""
    # Sort only the k largest: there may be thousands of labels.
    best = np.argpartition(-logits, min(k, logits.shape[1] - 1), axis=1)[:, :k]
    best.sort(axis=1)  # ties keep the order of the labels
    order = np.argsort(-np.take_along_axis(logits, best, axis=1), axis=1, kind="stable")
    return np.take_along_axis(best, order, axis=1)
