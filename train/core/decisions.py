"""Decisions: accept a category, send the text to review, or call it unknown; and the prediction set.

`aisle.train.core.decision_fit` fits them. Evaluation and server apply them with the same code, so that what is measured
is what is served. This file needs NumPy only.
"""

from __future__ import annotations

import json
from collections.abc import Container, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from aisle.errors import InputError
from aisle.files import write_json
from aisle.preprocess.labels import SEPARATOR
from aisle.train.core.settings import DecisionTargets

FILE = "decisions.json"
OUTCOMES = ("accept", "review", "unknown")
ACCEPT, REVIEW, UNKNOWN = range(3)
NONE = -1  # stands for "no category"
Floats = npt.NDArray[np.floating[Any]]
Ints = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Category:
    """A category, or an upper level of category paths such as `A` of `A > B`, and the probability that is enough."""

    name: str
    threshold: float | None  # a text is decided from this probability on; None: never
    shared_by: int  # number of categories that share the threshold, because some of them have few texts
    rows: int  # validation texts with this as the most probable category, among those that no lower level decided
    share: float  # of these rows, the share that is decided: the expected coverage


class Decided(NamedTuple):
    """The decisions on some texts. The server's cache stores them in this order (`DECISION`)."""

    outcome: Ints  # [texts], index in OUTCOMES
    category: Ints  # [texts], index in `Decisions.names`, or NONE
    set_size: Ints  # [texts], how many of the most probable categories form the prediction set
    energy: Floats  # [texts], the higher, the less the text resembles the known ones


class Scores(NamedTuple):
    """What is computed from logits, before any threshold."""

    probabilities: Floats  # [texts, labels]
    energy: Floats  # [texts]: -log(sum(exp(logits))), as in Liu et al. 2020 (arXiv:2010.03759)


@dataclass(frozen=True)
class Decisions:
    """Thresholds of one checkpoint."""

    targets: DecisionTargets
    rows: int  # validation texts that they were fitted on
    largest_energy: float | None  # a text with a higher energy is unknown; None: no text is
    least_probability: float  # the prediction set holds the categories with this probability or more
    levels: tuple[tuple[Category, ...], ...]  # the labels, in the order of the logits; then upper levels, lowest first

    @cached_property
    def labels(self) -> list[str]:
        """The categories, in the order of the logits."""
        return [each.name for each in self.levels[0]]

    @cached_property
    def names(self) -> list[str]:
        """The names of all levels, and last the empty name of `NONE`."""
        return [*(each.name for level in self.levels for each in level), ""]

    def apply(self, logits: Floats) -> Decided:
        """Return the decisions on texts with these logits [texts, labels]."""
        probabilities, energy = scores(logits)
        limit = np.inf if self.largest_energy is None else self.largest_energy
        known = energy <= limit
        category = np.full(len(logits), NONE)
        undecided, first = known.copy(), 0
        for part, thresholds in zip(self._parts, self._thresholds, strict=True):
            best, mass = part.best(probabilities)
            sure = undecided & (mass >= thresholds[best])
            category[sure] = first + best[sure]
            undecided &= ~sure
            first += len(thresholds)
        accepted = (category != NONE) & (category < len(self.labels))
        outcome = np.where(known, np.where(accepted, ACCEPT, REVIEW), UNKNOWN)
        sizes = np.maximum(1, (probabilities >= self.least_probability).sum(axis=1))
        return Decided(outcome, category, sizes, energy)

    @cached_property
    def _parts(self) -> list[LevelMass]:
        return [LevelMass(self.labels, [each.name for each in level]) for level in self.levels]

    @cached_property
    def _thresholds(self) -> list[Floats]:
        return [limits(level) for level in self.levels]

    def summary(self) -> dict[str, Any]:
        """Return the decisions as plain values, with the shares of texts that they are expected to decide.

        `accepted` is the share of texts whose label is accepted, `parents` that of texts with a sure upper level only.
        """
        decided = [sum(each.rows * each.share for each in level) for level in self.levels]
        shares = {"accepted": decided[0] / self.rows, "parents": sum(decided[1:]) / self.rows}
        return {**asdict(self), **shares}

    def save(self, folder: Path) -> None:
        """Write decisions.json."""
        write_json(folder / FILE, asdict(self))

    @staticmethod
    def load(folder: Path, labels: Sequence[str]) -> Decisions | None:
        """Read decisions.json; None if there is none, as in checkpoints of Aisle 0.1.

        Args:
            labels: the categories of the checkpoint or version, in the order of its logits.

        Raises:
            InputError: the file is damaged, or is for other categories.
        """
        try:
            found = json.loads((folder / FILE).read_text("utf-8"))
            levels = tuple(tuple(Category(**each) for each in level) for level in found["levels"])
            made = Decisions(**{**found, "targets": DecisionTargets(**found["targets"]), "levels": levels})
            same = made.labels == list(labels)
            made.apply(np.zeros((1, len(made.labels))))  # fails if a value has another type
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, LookupError, StopIteration) as error:
            raise InputError(f"{folder}/{FILE} is damaged: {error}; fit it again: {FIT}") from None
        if not same:
            raise InputError(f"{folder}/{FILE} is for other categories; fit it again: {FIT}")
        return made


FIT = "aisle decide CHECKPOINT"


class LevelMass:
    """Sums the probabilities of the labels below each category of a level."""

    def __init__(self, labels: Sequence[str], names: Sequence[str]) -> None:
        number = {name: i for i, name in enumerate(names)}
        self.category_of = np.array([number[within(label, number)] for label in labels])  # [labels]
        self._order = np.argsort(self.category_of, kind="stable")
        self._starts = np.searchsorted(self.category_of[self._order], np.arange(len(names)))
        self._flat = len(names) == len(labels)

    def best(self, probabilities: Floats) -> tuple[Ints, Floats]:
        """Return each text's most probable category of this level and its probability, both [texts]."""
        mass = probabilities
        if not self._flat:
            mass = np.add.reduceat(probabilities[:, self._order], self._starts, axis=1)
        best = mass.argmax(axis=1)
        return best, mass[np.arange(len(mass)), best]


def limits(level: Sequence[Category]) -> Floats:
    """Return the thresholds of a level, [categories]; infinity where a category is never decided."""
    return np.array([np.inf if each.threshold is None else each.threshold for each in level], np.float64)


def within(label: str, names: Container[str]) -> str:
    """Return the one of `names` that is the label or a part of its path from the top; the longest if there are more."""
    parts = label.split(SEPARATOR)
    paths = (SEPARATOR.join(parts[:length]) for length in range(len(parts), 0, -1))
    return next(path for path in paths if path in names)


def levels_of(labels: Sequence[str]) -> list[list[str]]:
    """Return the labels, and the categories of each upper level, the lowest first."""
    depth = max(label.count(SEPARATOR) for label in labels)
    paths = [label.split(SEPARATOR) for label in labels]
    upper = [list(dict.fromkeys(SEPARATOR.join(path[:length]) for path in paths)) for length in range(depth, 0, -1)]
    return [list(labels), *upper]


def scores(logits: Floats) -> Scores:
    """Return the probabilities and the energy of texts with these logits [texts, labels]."""
    exact = logits.astype(np.float64)
    highest = exact.max(axis=1, keepdims=True)
    powers = np.exp(exact - highest)
    total = powers.sum(axis=1, keepdims=True)
    return Scores(powers / total, -(highest + np.log(total))[:, 0])
