"""Label errors: find the rows of a table whose label is probably wrong, by confident learning.

Each label is compared with probabilities of a linear SVM that has not seen it (cross-fitting). cleanlab estimates from
them how many labels are wrong, and ranks the rows (Northcutt et al. 2021, arXiv:1911.00068). Nothing is changed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from cleanlab.experimental.label_issues_batched import LabelInspector

from aisle.errors import InputError
from aisle.preprocess.clean import LabelledTexts
from aisle.preprocess.labels import BAR, SEPARATOR, upto
from aisle.preprocess.tables.table import Row
from aisle.preprocess.tables.writing import output_kind, refuse_same, replacing, write_rows
from aisle.train.adapt.labelling_tools import CORRECTION
from aisle.train.core.calibration import fit_temperature, softmax
from aisle.train.core.linear import CELLS, FOLDS, Scores, cross_fit

# A table to label, as `aisle review` writes it, with the row in the source and the level of the error.
COLUMNS = ["row", "text", "category", "confidence", "category_2", "confidence_2", "level", CORRECTION]
SHOWN = 50  # suspects in the report
CUT = 200  # characters of their texts there

Integers = npt.NDArray[np.int32]


class _Level(NamedTuple):
    """One level of the categories' paths, departments first. Level n has the first n names of each path."""

    starts: npt.NDArray[np.int64]  # [names of the level]: the first of their categories, which lie side by side
    of_category: npt.NDArray[np.int64]  # [categories]: the number of the name at this level


class _Judged(NamedTuple):
    """What is kept of the probabilities at one level; arrays are indexed by row."""

    given: Scores  # of the given label's name at this level
    other: Scores  # of the most probable other name
    suspect: Integers  # the most probable category below that name
    of_suspect: Scores


class _Found(NamedTuple):
    """The suspects of one level, most probable error first, and cleanlab's estimate of the number of errors."""

    rows: npt.NDArray[np.int64]
    wrong: int


class Suspects:
    """The table of suspects of one source: found while its rows are in memory, written after the clean table."""

    def __init__(self, source: Path, out: Path) -> None:
        """Raise InputError if `out` is the source, or its name has an unknown ending."""
        refuse_same(source, out)
        self._out, self._kind = out, output_kind(source, out)
        self._rows: list[Row] = []

    def find(self, numbers: Sequence[int], table: LabelledTexts) -> dict[str, Any]:
        """Find the suspects, as `find_label_errors`; return the figures."""
        self._rows, figures = find_label_errors(numbers, table)
        return {"output": str(self._out), **figures}

    def write(self) -> None:
        """Write the table.

        Raises:
            InputError: it cannot be written.
        """
        try:
            with replacing(self._out) as writing:
                write_rows(writing, lambda: iter(self._rows), COLUMNS, self._kind)
        except OSError as error:
            raise InputError(f"cannot write {self._out}: {error.strerror}") from None


def find_label_errors(numbers: Sequence[int], table: LabelledTexts) -> tuple[list[Row], dict[str, Any]]:
    """Find the labels that are probably wrong.

    Probabilities are summed to each level of the categories' paths, and cleanlab judges the labels there. It names as
    many suspects as it estimates wrong labels: those whose given name is least probable. A wrong department is worse
    than a wrong leaf, so suspects of an upper level come first; within a level, the least probable.

    A category of one row is left out, because nothing else tells what belongs to it. Memory: the texts with their
    n-grams, 16 bytes for each row and level, and about 1 GB for the SVM's weights and `CELLS` probabilities.

    Args:
        numbers: the row number of each text, for the result.

    Returns:
        The suspects with `COLUMNS`: `category` is the given label, `category_2` the suspected one, and `confidence`
        and `confidence_2` are their probabilities. And the figures: `rows_judged`, `rows_alone` (of categories with
        one row), `suspects`, `by_level`, `wrong` (the estimated share of wrong labels), `reachable` (1 - `wrong`) and
        the first suspects as `examples`.

    Raises:
        InputError: labels are sets of categories, fewer than two categories have two rows, or the texts are too few to
            judge.
    """
    known = set(table.labels)
    sets = (label for label in known if BAR in label and known.issuperset(map(str.strip, label.split(BAR))))
    if several := min(sets, default=None):
        raise InputError(f"--label-errors judges one category per text, but {several!r} is several; leave it out")
    counts = Counter(table.labels)
    places = [place for place, label in enumerate(table.labels) if counts[label] > 1]
    judged = LabelledTexts([table.texts[i] for i in places], [table.labels[i] for i in places])
    names = sorted(set(judged.labels), key=lambda label: label.split(SEPARATOR))
    if len(names) < 2:
        raise InputError(
            f"judging labels takes two categories with two rows or more, and the table has {len(names)}; add rows, or "
            "leave --label-errors out"
        )
    number = {name: i for i, name in enumerate(names)}
    given = np.array([number[label] for label in judged.labels], np.int32)
    levels = _levels(names)
    confidence, kept = _judge(judged, names, given, levels)
    found = [_inspect(level, given, each) for level, each in zip(levels, kept, strict=True)]
    rows = _suspects(judged, [numbers[i] for i in places], names, confidence, kept, found)
    by_level = Counter(row["level"] for row in rows)
    wrong = max(each.wrong for each in found) / len(places)  # an error of an upper level is one of the leaf, too
    return rows, {
        "rows_judged": len(places),
        "rows_alone": len(table.texts) - len(places),
        "suspects": len(rows),
        "by_level": {str(level): by_level[level] for level in range(1, len(levels) + 1)},
        "wrong": wrong,
        "reachable": 1 - wrong,
        "examples": [{**row, "text": row["text"][:CUT]} for row in rows[:SHOWN]],
    }


def _levels(names: Sequence[str]) -> list[_Level]:
    """Return the levels of sorted categories."""
    levels = []
    for level in range(1, max(name.count(SEPARATOR) for name in names) + 2):
        _, starts, of_category = np.unique(
            np.array([upto(name, level) for name in names]), return_index=True, return_inverse=True
        )
        order = np.argsort(starts)  # np.unique sorts by the whole name, which is another order
        levels.append(_Level(starts[order], np.argsort(order)[of_category]))
    return levels


def _judge(
    table: LabelledTexts, names: Sequence[str], given: Integers, levels: Sequence[_Level]
) -> tuple[Scores, list[_Judged]]:
    """Return the probability of each text's given label, and what is kept of the probabilities at each level.

    Raises:
        InputError: the texts are too few to judge.
    """
    rows = len(given)
    confidence = np.zeros(rows, np.float32)
    kept = [_Judged(*(np.zeros(rows, kind) for kind in ("f4", "f4", "i4", "f4"))) for _ in levels]
    temperature = 0.0
    try:
        for part, margins in cross_fit(table, names):
            temperature = temperature or fit_temperature(margins, given[part])
            probabilities = softmax(margins / np.float32(temperature)).astype(np.float32, copy=False)
            confidence[part] = probabilities[np.arange(len(part)), given[part]]
            for level, each in zip(levels, kept, strict=True):
                _keep(each, level, part, given[part], probabilities)
    except ValueError as error:  # from scikit-learn: only one category, no n-gram that occurs twice, or an empty fold
        few = f"{rows} texts are too few to judge their labels in {FOLDS} parts"
        raise InputError(f"{few}; add rows, or leave --label-errors out") from error
    return confidence, kept


def _keep(kept: _Judged, level: _Level, part: npt.NDArray[np.int64], given: Integers, probabilities: Scores) -> None:
    """Sum the probabilities of some texts to a level, and keep what the level needs."""
    rows, own = np.arange(len(part)), level.of_category[given]
    summed = np.add.reduceat(probabilities, level.starts, axis=1)
    kept.given[part] = summed[rows, own]
    summed[rows, own] = -1
    other = summed.argmax(axis=1)
    kept.other[part] = summed[rows, other]
    below = np.where(level.of_category == other[:, None], probabilities, -1)
    suspect = below.argmax(axis=1)
    kept.suspect[part], kept.of_suspect[part] = suspect, probabilities[rows, suspect]


def _inspect(level: _Level, given: Integers, kept: _Judged) -> _Found:
    """Let cleanlab judge one level. It needs only the given and the most probable other name: the rest may be zero."""
    own, other = level.of_category[given], level.of_category[kept.suspect]
    count = len(level.starts)
    if count < 2:
        return _Found(np.zeros(0, np.int64), 0)
    inspector = LabelInspector(
        num_class=count,
        verbose=False,
        quality_score_kwargs={"method": "self_confidence"},
        num_issue_kwargs={"estimation_method": "off_diagonal_calibrated"},
    )
    for use in (inspector.update_confident_thresholds, inspector.score_label_quality):
        size = max(1, CELLS // count)
        for start in range(0, len(own), size):
            part = slice(start, start + size)
            probabilities = np.zeros((len(own[part]), count), np.float32)
            rows = np.arange(len(probabilities))
            probabilities[rows, own[part]] = kept.given[part]
            probabilities[rows, other[part]] = kept.other[part]
            use(own[part], probabilities)
    rows = inspector.get_label_issues()
    return _Found(rows[kept.other[rows] > kept.given[rows]], int(inspector.get_num_issues()))


def _suspects(
    table: LabelledTexts,
    numbers: Sequence[int],
    names: Sequence[str],
    confidence: Scores,
    kept: Sequence[_Judged],
    found: Sequence[_Found],
) -> list[Row]:
    """Return the suspects of all levels. What an upper level suspects comes from there."""
    ranked: dict[int, tuple[int, float, Row]] = {}
    for judged, each in zip(kept, found, strict=True):
        for place in each.rows.tolist():
            if place in ranked:
                continue
            label, suspected = table.labels[place], names[judged.suspect[place]]
            level = _first_difference(label, suspected)
            row = {
                "row": numbers[place],
                "text": table.texts[place],
                "category": label,
                "confidence": round(float(confidence[place]), 4),
                "category_2": suspected,
                "confidence_2": round(float(judged.of_suspect[place]), 4),
                "level": level,
                CORRECTION: "",
            }
            ranked[place] = level, float(judged.given[place]), row
    return [row for *_, row in sorted(ranked.values(), key=lambda each: each[:2])]


def _first_difference(label: str, other: str) -> int:
    """Return the first level, from 1, at which the paths of two categories differ."""
    level = 1
    while upto(label, level) == upto(other, level):
        level += 1
    return level
