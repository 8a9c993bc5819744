"""Fit the decisions of a checkpoint on texts that training did not learn from.

- **Thresholds** (selective classification, Geifman and El-Yaniv 2017, arXiv:1705.08500). A text is accepted from the
  lowest confidence at which the lower 95 % confidence bound of the precision reaches the target (Clopper and Pearson
  1934). Each category has its own threshold; categories with few texts share one.
- **Upper levels.** The texts that are left get the same treatment one level up: the probability of `A` is the sum over
  `A > …`.
- **Unknown.** The energy of a text (Liu et al. 2020, arXiv:2010.03759) above which few texts of known categories lie.
- **Prediction sets.** Split conformal prediction with the score 1 - p(correct category), which gives the smallest sets
  (Sadinle, Lei and Wasserman 2019, arXiv:1609.00451): a set holds the correct category with probability 1 - set_error.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from functools import cache

import numpy as np
import numpy.typing as npt

from aisle.preprocess.binomial import lowest_share
from aisle.train.core.decisions import Category, Decisions, Floats, Ints, LevelMass, levels_of, limits, scores
from aisle.train.core.settings import DecisionTargets

ERROR = 0.05  # the probability that a tried threshold passes although its precision is too low
STEPS = 20  # thresholds that are tried, at equal steps of coverage
Flags = npt.NDArray[np.bool_]


def fit_decisions(
    logits: Floats,
    actual: Ints,
    labels: Sequence[str],
    targets: DecisionTargets,
    *,
    alone: Collection[str] = (),
) -> Decisions:
    """Fit the decisions on texts with these logits [texts, labels] and correct categories, by number, [texts].

    With few texts the guarantees stay: no text is accepted or unknown, and a set holds every category.

    Args:
        alone: labels that share no threshold, such as new ones, of which other labels say nothing. None of their texts
            is accepted until they have enough for a threshold of their own.
    """
    probabilities, energy = scores(logits)
    own = probabilities[np.arange(len(actual)), actual]
    largest = _quantile(energy, 1 - targets.unknown_share)
    smallest = _quantile(-own, 1 - targets.set_error)
    undecided = energy <= (np.inf if largest is None else largest)
    levels: list[tuple[Category, ...]] = []
    for names in levels_of(labels):
        mass = LevelMass(labels, names)
        best, confidence = mass.best(probabilities)
        rows = np.flatnonzero(undecided)
        correct = mass.category_of[actual] == best
        # On an upper level, a category of one label is no surer than this label was.
        allowed = np.bincount(mass.category_of) > (1 if levels else 0)
        rows = rows[allowed[best[rows]]]
        singles = np.array([not levels and name in alone for name in names])
        level = _fit_level(names, allowed, singles, best[rows], confidence[rows], correct[rows], targets)
        levels.append(level)
        undecided &= confidence < limits(level)[best]
    return Decisions(targets, len(actual), largest, 0.0 if smallest is None else -smallest, tuple(levels))


def _quantile(values: Floats, share: float) -> float | None:
    """Return the value that a further text does not exceed with probability `share`; None if there are too few."""
    rank = math.ceil(round((len(values) + 1) * share, 6))  # 10 * 0.9 is not exactly 9
    return float(np.sort(values)[rank - 1]) if rank <= len(values) else None


def _fit_level(
    names: Sequence[str],
    allowed: Flags,
    singles: Flags,
    best: Ints,
    confidence: Floats,
    correct: Flags,
    targets: DecisionTargets,
) -> tuple[Category, ...]:
    """Return the categories of a level with their thresholds.

    Args:
        allowed: whether a category may be decided, [categories]. The texts are of such categories.
        singles: whether a category shares no threshold, [categories].
        best: the most probable category of each text, [texts].
        confidence: its probability, [texts].
        correct: whether it is correct, [texts].
    """
    found = [Category(name, None, 1, 0, 0.0) for name in names]
    precision = targets.accept_precision
    groups = grouped(best, confidence, np.flatnonzero(allowed & ~singles), _group_size(precision))
    for group in [*groups, *([number] for number in np.flatnonzero(singles & allowed).tolist())]:
        own = np.isin(best, group)
        limit = _threshold(confidence[own], correct[own], precision)
        for number in group:
            each = confidence[best == number]
            share = float((each >= limit).mean()) if limit is not None and len(each) else 0.0
            found[number] = Category(names[number], limit, len(group), len(each), share)
    return tuple(found)


def grouped(best: Ints, confidence: Floats, categories: Ints, least: int) -> list[list[int]]:
    """Group categories so that each group has `least` texts. A category with so many stays alone.

    The others are grouped in the order of their mean confidence, so that categories of a group are about equally hard.
    The correct labels are not used, so that the bound of the group's precision stays valid.

    Args:
        best: the most probable category of each text, [texts].
        confidence: its probability, [texts].
        categories: the numbers of the categories.
    """
    count = int(max(categories, default=-1)) + 1
    rows = np.bincount(best, minlength=count)
    mean = np.bincount(best, confidence, minlength=count) / np.maximum(rows, 1)
    alone = [[number] for number in categories.tolist() if rows[number] >= least]
    few = [number for number in categories.tolist() if rows[number] < least]
    groups: list[list[int]] = [[]]
    for number in sorted(few, key=lambda each: -mean[each]):
        if rows[groups[-1]].sum() >= least:
            groups.append([])
        groups[-1].append(number)
    rest = groups.pop() if rows[groups[-1]].sum() < least else []
    found = alone + groups
    if not found:
        return [rest]
    min(found, key=lambda group: rows[group].sum()).extend(rest)
    return found


def _threshold(confidence: Floats, correct: Flags, precision: float) -> float | None:
    """Return the lowest confidence from which on the precision holds; None if there is none."""
    if not len(confidence):
        return None
    order = np.argsort(-confidence, kind="stable")
    ranked, right = confidence[order], np.cumsum(correct[order])
    last = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))  # equal confidences are accepted together
    tried = last[np.searchsorted(last, np.ceil(np.linspace(0, len(ranked), STEPS + 1)[1:]) - 1)]
    holds = tried[lowest_share(right[tried], tried + 1, ERROR) >= precision]
    if not len(holds):
        return None
    end = holds[-1]
    below = ranked[end + 1] if end + 1 < len(ranked) else ranked[end]
    return float((ranked[end] + below) / 2)  # halfway, so that rounding in an engine changes nothing


@cache
def _group_size(precision: float) -> int:
    """Return the size of a group: twice as many texts as show the precision with half of the errors that it allows."""
    rows, errors = 1, 0
    while lowest_share(rows - errors, rows, ERROR) < precision:
        rows += 1
        errors = int(rows * (1 - precision) / 2)
    return 2 * rows
