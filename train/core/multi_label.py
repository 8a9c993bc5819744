"""Several categories for one text: their probabilities by a sigmoid, and the threshold of each category.

Training, the build's gate, evaluation and the server turn logits into categories with `Thresholds.apply`, so that what
is measured is what is served. `aisle.train.core.threshold_fit` fits the thresholds. This file needs NumPy only.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from aisle.errors import InputError
from aisle.files import write_json

FILE = "thresholds.json"  # in a checkpoint and in a version: it says that the model gives several categories
PROBLEM = "multi_label_classification"  # the `problem_type` of transformers
Floats = npt.NDArray[np.floating[Any]]
Flags = npt.NDArray[np.bool_]


def is_multi_label(config: Any) -> bool:
    """Return whether a configuration of transformers is that of a multi-label model."""
    return getattr(config, "problem_type", None) == PROBLEM


def sigmoid(logits: Floats) -> Floats:
    """Return the probability of each category, [texts, labels], in fp64. They do not sum to 1."""
    probabilities: Floats = 0.5 * (1 + np.tanh(0.5 * logits.astype(np.float64)))
    return probabilities


@dataclass(frozen=True)
class Threshold:
    """A category, and the probability from which on a text gets it."""

    name: str
    threshold: float
    shared_by: int  # number of categories that share the threshold, because they have few texts
    rows: int  # validation texts of this category


class Assigned(NamedTuple):
    """The categories of some texts."""

    probabilities: Floats  # [texts, labels]
    reached: Flags  # [texts, labels], whether the probability reaches the category's threshold


@dataclass(frozen=True)
class Thresholds:
    """The thresholds of one checkpoint."""

    rows: int  # validation texts that they were fitted on
    categories: tuple[Threshold, ...]  # in the order of the logits

    @cached_property
    def names(self) -> list[str]:
        """The categories, in the order of the logits."""
        return [each.name for each in self.categories]

    @cached_property
    def _limits(self) -> Floats:
        return np.array([each.threshold for each in self.categories], np.float64)

    def apply(self, logits: Floats) -> Assigned:
        """Return the categories of texts with these logits [texts, labels]."""
        probabilities = sigmoid(logits)
        return Assigned(probabilities, probabilities >= self._limits)

    def named(self, reached: Flags) -> list[list[str]]:
        """Return the names of the categories of each text."""
        return [[self.names[i] for i in np.flatnonzero(row)] for row in reached]

    def save(self, folder: Path) -> None:
        """Write thresholds.json."""
        write_json(folder / FILE, asdict(self))

    @staticmethod
    def load(folder: Path, labels: Sequence[str]) -> Thresholds:
        """Read thresholds.json.

        Args:
            labels: the categories of the checkpoint or version, in the order of its logits.

        Raises:
            InputError: the file is missing or damaged, or is for other categories.
        """
        try:
            found = json.loads((folder / FILE).read_text("utf-8"))
            made = Thresholds(found["rows"], tuple(Threshold(**each) for each in found["categories"]))
            valid = all(0 < each.threshold < 1 for each in made.categories)
        except (OSError, ValueError, TypeError, LookupError) as error:
            raise InputError(f"{folder}/{FILE} is missing or damaged: {error}; train again: {TRAIN}") from None
        if not valid or made.names != list(labels):
            raise InputError(f"{folder}/{FILE} is for other categories, or damaged; train again: {TRAIN}")
        return made


TRAIN = "aisle train --multi-label"
