"""Daily counts of categories, from a table or a traffic log."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import numpy.typing as npt

from aisle.console import track
from aisle.errors import InputError
from aisle.preprocess.clean import prepare_label
from aisle.preprocess.tables.table import Row, as_text, checked, read_rows, refuse_faulty
from aisle.preprocess.values import TextError

Floats = npt.NDArray[np.float64]
OPTIONS = "--date-column, --label-column or --count-column"
LONGEST = 30  # years; a longer span has a wrong date in it
EVENING = 22  # hour; a last day whose rows end earlier looks incomplete
_SEPARATED = re.compile(r"(\d{4})[-/.年](\d{1,2})[-/.月](\d{1,2})日?(?=$|[ T])")


@dataclass(frozen=True)
class Columns:
    """The columns of the input, and how its rows are counted."""

    day: str = "time"  # of the date or the time
    category: str = "category"
    count: str = ""  # empty: each row counts as one
    zone: ZoneInfo | None = None  # days are counted in this zone; None: in the zone of the input
    until: date | None = None  # the last day that counts


@dataclass
class Counts:
    """Daily counts of the categories as they are written, from the first to the last day of the input."""

    first: date
    days: int
    by_category: dict[str, Floats]  # [days]
    rows: int
    skipped: dict[str, int]  # rows by the reason why they do not count
    ends_early: str = ""  # the time of the last row, if the last day looks incomplete
    unzoned: bool = False  # no time has a time zone, although one is given

    def longest_gap(self) -> tuple[date, int]:
        """Return the first day and the length of the longest run of days without any count."""
        empty = ~np.any([values > 0 for values in self.by_category.values()], axis=0)
        first = length = run = 0
        for day, none in enumerate(empty):
            run = run + 1 if none else 0
            if run > length:
                first, length = day - run + 1, run
        return self.day(first), length

    def day(self, number: int) -> date:
        return self.first + timedelta(days=number)

    @property
    def last(self) -> date:
        return self.day(self.days - 1)


def read_counts(path: Path, columns: Columns) -> Counts:
    """Count the rows of each category and day; a day without rows has the count 0.

    Raises:
        InputError: the table cannot be read, lacks a column, has a date or a count that cannot be used, has no
            category, or holds fewer than two days.
    """
    tally = _Tally(columns)
    names = [name for name in (columns.day, columns.category, columns.count) if name]
    reading = checked(refuse_faulty(read_rows(path, names), path), names, path, OPTIONS)
    for number, row in enumerate(track(reading, "reading"), start=1):
        if "words" not in row or columns.category in row:  # the traffic log's counts of words have no category
            tally.add(row, f"{path}, row {number}")
    tally.check(path)
    return tally.counts()


class _Tally:
    """Adds up the rows of each category and day."""

    def __init__(self, columns: Columns) -> None:
        self._columns = columns
        self._clock = _Clock(columns.zone)
        self._totals: dict[str, dict[int, float]] = defaultdict(lambda: defaultdict(float))
        self._skipped: Counter[str] = Counter()
        self._rows = 0

    def add(self, row: Row, where: str) -> None:
        columns = self._columns
        try:
            category = prepare_label(row.get(columns.category))
        except TextError as error:
            self._skipped[error.reason] += 1
            return
        day = self._clock.day(row.get(columns.day), where, columns.day)
        if columns.until is not None and day > columns.until:
            self._skipped["after --until"] += 1
            return
        count = _count(row.get(columns.count), where) if columns.count else 1.0
        self._totals[category][day.toordinal()] += count
        self._rows += 1

    def check(self, path: Path) -> None:
        if not any(count for days in self._totals.values() for count in days.values()):
            why = ", ".join(f"{reason}: {rows}" for reason, rows in self._skipped.items())
            if self._rows:
                raise InputError(f"{path}: nothing to count: the count of every row is 0")
            raise InputError(f"{path}: nothing to count ({why or 'no row'}); give the right columns with {OPTIONS}")
        days = {day for each in self._totals.values() for day in each}
        first, last = date.fromordinal(min(days)), date.fromordinal(max(days))
        if first == last:
            raise InputError(f"{path}: all rows are of one day, {first}; a forecast needs two weeks or more")
        if last.year - first.year > LONGEST:
            raise InputError(f"{path}: its days are from {first} to {last}, over {LONGEST} years; correct the date")

    def counts(self) -> Counts:
        start = min(min(each) for each in self._totals.values())
        days = max(max(each) for each in self._totals.values()) - start + 1
        series = {name: np.zeros(days) for name in sorted(self._totals)}
        for name, each in self._totals.items():
            for day, count in each.items():
                series[name][day - start] = count
        early = "" if self._columns.until else self._clock.ends_early()
        unzoned = self._columns.zone is not None and not self._clock.zoned
        return Counts(date.fromordinal(start), days, series, self._rows, dict(self._skipped), early, unzoned)


class _Clock:
    """Reads days, and refuses times of several time zones: one moment is in two days then."""

    def __init__(self, zone: ZoneInfo | None) -> None:
        self._zone = zone
        self._seen: str | None = None
        self._latest: datetime | None = None
        self._timed = False
        self.zoned = False  # whether a time has a time zone

    def day(self, value: Any, where: str, name: str) -> date:
        time = self._time(value, where, name)
        own = _zone_name(time)
        if self._zone is not None and time.tzinfo is not None:
            time, own = time.astimezone(self._zone), "given"
        self.zoned = self.zoned or time.tzinfo is not None
        if self._seen is None:
            self._seen = own
        elif own != self._seen:
            fix = "give --time-zone" if own and self._seen else "write all of them with a zone, or none"
            raise InputError(f"{where}: {name} {value!r} is in another time zone than the rows before; {fix}")
        time = time.replace(tzinfo=None)
        self._timed = self._timed or bool(time.hour or time.minute)
        self._latest = time if self._latest is None else max(self._latest, time)
        return time.date()

    def _time(self, value: Any, where: str, name: str) -> datetime:
        if isinstance(value, datetime):
            return value
        try:
            return _parse(str(as_text(value)))
        except ValueError:
            text = "is missing" if value in (None, "") else f"{value!r} is not a date"
            raise InputError(f"{where}: {name} {text}; write it as 2026-11-24 or 2026-11-24T08:18:42Z") from None

    def ends_early(self) -> str:
        """Return the time of the last row if rows have times and the last day ends before the evening."""
        if self._latest is None or not self._timed or self._latest.hour >= EVENING:
            return ""
        return f"{self._latest:%H:%M}"


@lru_cache(100_000)
def _parse(text: str) -> datetime:
    """Read an ISO 8601 date or time, also with the separators of 2026/1/5 and 2026年1月5日.

    Raises:
        ValueError: it is neither. Forms such as 11/12/2026 are refused, because they mean two days.
    """
    dashed = _SEPARATED.sub(lambda each: f"{each[1]}-{int(each[2]):02}-{int(each[3]):02}", text.strip(), count=1)
    return datetime.fromisoformat(dashed)


def _zone_name(time: datetime) -> str:
    """Return what two times of one zone share; empty for times without a zone."""
    if time.tzinfo is None:
        return ""
    return str(getattr(time.tzinfo, "key", time.utcoffset()))


def _count(value: Any, where: str) -> float:
    try:
        count = float(value)
    except (TypeError, ValueError):
        count = float("nan")
    if isinstance(value, bool) or not 0 <= count < 1e15:
        raise InputError(f"{where}: count {value!r} is not a number of 0 or more; correct it or leave the row out")
    return count
