"""The log of answered texts, as drift reads it: times, categories, confidences, lengths and counts of words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from aisle.console import track
from aisle.errors import InputError
from aisle.preprocess import vocabulary
from aisle.preprocess.clean import prepare
from aisle.preprocess.fields import columns_of
from aisle.preprocess.tables.table import FaultyRow, Row, missing_column, read_rows, value_of
from aisle.preprocess.values import TextError

BLOCK = 250  # texts of a table whose words are counted together
CELLS = 256  # the buckets of words are merged into this number of cells, so that each has enough words to compare

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


class WordCounts(NamedTuple):
    """The words of some texts, counted together."""

    time: float  # of the last text, in seconds of the epoch; its row number if the log has no time
    texts: int
    words: int
    unknown: float  # words that are not in the checkpoint's vocabulary, estimated
    cells: Integers  # [CELLS]


@dataclass
class Traffic:
    """Answered texts, in the order of time."""

    times: Floats  # [texts]
    dated: bool
    categories: npt.NDArray[np.object_]  # [texts]
    confidence: Floats  # [texts]
    lengths: Floats  # [texts], characters; NaN where unknown
    words: list[WordCounts]

    def part(self, chosen: slice | npt.NDArray[np.bool_], words: list[WordCounts]) -> Traffic:
        return Traffic(
            self.times[chosen],
            self.dated,
            self.categories[chosen],
            self.confidence[chosen],
            self.lengths[chosen],
            words,
        )


class WordCounter:
    """Counts words against a vocabulary."""

    def __init__(self, entries: Iterable[str]) -> None:
        self._known = np.zeros(vocabulary.BUCKETS, np.bool_)
        self._known[[vocabulary.bucket(entry) for entry in entries]] = True

    def __call__(self, time: float, texts: int, counts: Mapping[int, int]) -> WordCounts:
        buckets = np.fromiter(counts.keys(), np.int64, len(counts))
        numbers = np.fromiter(counts.values(), np.int64, len(counts))
        # A new word shares a bucket with a known word in proportion to the occupied buckets; correct for that.
        unknown = float(numbers[~self._known[buckets]].sum() / max(1e-9, 1 - self._known.mean()))
        cells = np.bincount(buckets % CELLS, numbers, CELLS).astype(np.int64)
        total = int(numbers.sum())
        return WordCounts(time, texts, total, unknown, cells)


def read_log(path: Path, labels: Sequence[str], counter: WordCounter, text_column: str) -> tuple[Traffic, Counter[str]]:
    """Read a log; return it with the number of skipped rows, by reason.

    Args:
        text_column: the column of the texts in a classified table. In a traffic log it is "text", if there are texts.

    Raises:
        InputError: it cannot be read, lacks a column, or has a category that is not in `labels`.
    """
    answers = _Answers(labels, counter)
    dated = None
    column = ""
    for number, row in enumerate(track(read_rows(path), "reading"), start=1):
        where = f"{path}, row {number}"
        if "words" in row and "category" not in row:
            answers.logged.append(_counts(row, where, counter))
            continue
        if isinstance(row, FaultyRow):
            raise InputError(f"{where}: {row.fault}")
        if dated is None:
            lacking = [name for name in ("category", "confidence") if name not in row]
            if lacking:
                raise missing_column(path, lacking[0], list(row))
            dated = "time" in row
        if row.get("category") in (None, ""):
            answers.skipped["not answered"] += 1
            continue
        column = column or _text_column(row, text_column, path)
        answers.add(row, _time(row.get("time"), where) if dated else float(number), column, where)
    if not answers.times:
        raise InputError(f"{path}: no row with a category")
    return answers.traffic(bool(dated)), answers.skipped


def _text_column(row: Row, text_column: str, path: Path) -> str:
    """Return the column of a log's texts.

    Raises:
        InputError: it is a classified table without this column; three of the measures would be missing.
    """
    has = all(part in row for part in columns_of(text_column))
    found = text_column if has else "text" if "text" in row else None
    if found is None and "error" in row:  # only a classified table has this column
        raise missing_column(path, text_column, list(row))
    return found or text_column


class _Answers:
    """Collects the answers of a log."""

    def __init__(self, labels: Sequence[str], counter: WordCounter) -> None:
        self.times: list[float] = []
        self.logged: list[WordCounts] = []  # word counts that TrafficLog wrote
        self.skipped: Counter[str] = Counter()
        self._counter = counter
        self._names = {label: label for label in labels}  # all rows of a label share one string
        self._categories: list[str] = []
        self._confidences: list[float] = []
        self._lengths: list[float] = []
        self._counted: list[WordCounts] = []  # word counts from the log's texts
        self._texts: list[str] = []  # texts that are not counted yet

    def add(self, row: Row, time: float, text_column: str, where: str) -> None:
        """Add one answer.

        Raises:
            InputError: its category is unknown, or its confidence is not a probability.
        """
        category = self._names.get(str(row["category"]))
        if category is None:
            raise InputError(
                f"{where}: category {row['category']!r} is unknown to the checkpoint; was another one served?"
            )
        self.times.append(time)
        self._categories.append(category)
        self._confidences.append(_confidence(row.get("confidence"), where))
        length = self._add_text(value_of(row, text_column))
        self._lengths.append(float(row["length"]) if isinstance(row.get("length"), int) else length)
        if len(self._texts) == BLOCK:
            self._count_texts()

    def _add_text(self, raw: Any) -> float:
        """Keep a text to count its words; return its length in characters, NaN if there is no usable text."""
        if raw:
            try:
                self._texts.append(prepare(raw))
                return len(self._texts[-1])
            except TextError as error:
                self.skipped[f"words: {error.reason}"] += 1
        return float("nan")

    def _count_texts(self) -> None:
        self._counted.append(self._counter(self.times[-1], len(self._texts), vocabulary.count(self._texts)))
        self._texts.clear()

    def traffic(self, dated: bool) -> Traffic:
        """Return the answers, sorted by time."""
        if self._texts:
            self._count_texts()
        order = np.argsort(self.times, kind="stable")
        return Traffic(
            np.array(self.times)[order],
            dated,
            np.array(self._categories, np.object_)[order],
            np.array(self._confidences)[order],
            np.array(self._lengths)[order],
            sorted(self.logged or self._counted, key=lambda each: each.time),
        )


def _counts(row: dict[str, Any], where: str, counter: WordCounter) -> WordCounts:
    try:
        return counter(_time(row["time"], where), int(row["texts"]), {int(k): int(n) for k, n in row["words"].items()})
    except (KeyError, ValueError, TypeError, AttributeError, IndexError):
        raise InputError(f"{where}: the word counts are damaged; delete the line") from None


def _time(value: Any, where: str) -> float:
    try:
        time = value if isinstance(value, datetime) else datetime.fromisoformat(str(value))
    except ValueError:
        raise InputError(f"{where}: time {value!r} is invalid; write it as 2026-11-24T08:18:42Z") from None
    return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()


def _confidence(value: Any, where: str) -> float:
    try:
        confidence = float(value)
    except (TypeError, ValueError):
        confidence = float("nan")
    if not 0 <= confidence <= 1.0001:  # fp32 may round up
        raise InputError(f"{where}: confidence {value!r} is not a probability; it must be from 0 to 1")
    return confidence


def last_days(live: Traffic, days: float, log: Path) -> Traffic:
    if not live.dated:
        raise InputError(f"{log}: --days needs a column 'time'")
    since = live.times[-1] - days * 86400
    return live.part(live.times >= since, [each for each in live.words if each.time >= since])


def time_span(traffic: Traffic) -> dict[str, Any]:
    """Return the times of the first and the last text, or their row numbers if the log has no time."""
    first, last = traffic.times[[0, -1]].tolist()
    if not traffic.dated:
        return {"from": f"row {first:.0f}", "to": f"row {last:.0f}"}
    return {"from": _show_time(first), "to": _show_time(last)}


def _show_time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
