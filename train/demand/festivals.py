"""Festivals of Chinese shops: their days, and what they multiply demand by, learned from earlier ones."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date, timedelta
from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from aisle.train.demand.counts import Floats

WEEKS = 4  # of days before and after a festival that show the usual demand
PRIOR = 10.0  # counts; a factor learned from few counts stays near 1
GAIN = 0.95  # of the error without factors; above it, factors have not proved themselves
BOUNDS = (0.05, 20.0)  # of a factor
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Festival:
    """A festival and the days around it on which demand differs."""

    name: str
    month: int  # 0: the first month of the Chinese calendar
    day: int
    before: int  # days
    after: int

    def days(self, year: int) -> list[date]:
        main = _new_year(year) if self.month == 0 else date(year, self.month, self.day)
        return [main + timedelta(days=step) for step in range(-self.before, self.after + 1)]


FESTIVALS = (
    Festival("春节", 0, 1, 21, 14),
    Festival("618", 6, 18, 18, 3),
    Festival("国庆", 10, 1, 3, 7),
    Festival("双11", 11, 11, 11, 2),
    Festival("双12", 12, 12, 3, 1),
)


@cache
def _new_year(year: int) -> date:
    """Return the first day of the Chinese year that begins in `year`."""
    import holidays

    found = holidays.country_holidays("CN", years=year, language="zh_CN")
    return min(day for day, name in found.items() if name.startswith("春节") and day.year == year)


class Calendar:
    """The festivals from a first day on. Days are counted from it."""

    def __init__(self, first: date, days: int) -> None:
        self.days = days
        self._windows: dict[Festival, list[range]] = {}
        self.name = np.full(days, "", np.object_)  # of the festival of each day
        last = first + timedelta(days=days - 1)
        for festival in FESTIVALS:
            spans = [festival.days(year) for year in range(first.year, last.year + 2)]
            starts = [((span[0] - first).days, len(span)) for span in spans]
            self._windows[festival] = [range(start, start + length) for start, length in starts]
            for window in self._windows[festival]:
                self.name[max(0, window.start) : max(0, window.stop)] = festival.name

    def seen(self, festival: Festival, begin: int, end: int) -> list[range]:
        """Return the windows of a festival that lie in the days from `begin` to `end`, with a week before them."""
        return [each for each in self._windows[festival] if each.start - 7 >= begin and each.stop <= end]

    def windows(self, festival: Festival) -> list[range]:
        """Return the windows of a festival that touch the calendar."""
        return [each for each in self._windows[festival] if each.stop > 0 and each.start < self.days]

    def shown(self, start: int) -> list[range]:
        """Return the parts of all windows that lie in the calendar's days from `start` on."""
        every = [each for windows in self._windows.values() for each in windows]
        parts = [range(max(start, each.start), min(self.days, each.stop)) for each in every]
        return [part for part in parts if part]

    def usual(self, counts: Floats, window: range, begin: int, end: int) -> Floats:
        """Return the usual demand on the days of a window: the mean of the same weekday in the weeks around it.

        Args:
            begin: the first day that may be used.
            end: the day after the last day that may be used.
        """
        around = [*range(window.start - 7 * WEEKS, window.start), *range(window.stop, window.stop + 7 * WEEKS)]
        near = np.array([day for day in around if begin <= day < end and not self.name[day]], np.int64)
        if not len(near):
            return np.full(len(window), counts[begin:end].mean())
        level = counts[near].mean()
        means = [counts[near[near % 7 == weekday]] for weekday in range(7)]
        by_weekday = np.array([each.mean() if len(each) else level for each in means])
        usual: Floats = by_weekday[np.arange(window.start, window.stop) % 7]
        return usual

    def learn(self, counts: Floats, past: list[range], begin: int, end: int) -> Floats:
        """Return the factor of each day of a festival's window, from its past windows."""
        observed = np.sum([counts[window.start : window.stop] for window in past], axis=0)
        usual = np.sum([self.usual(counts, window, begin, end) for window in past], axis=0)
        factors: Floats = np.clip((observed + PRIOR) / (usual + PRIOR), *BOUNDS)
        return factors


@dataclass(frozen=True)
class Test:
    """What a festival's factors gained on windows that they were not learned from."""

    used: bool
    windows: int
    error_without: float  # mean absolute error of the usual demand of the weeks before
    error_with: float  # of the same, times factors from earlier windows

    @property
    def error(self) -> float:
        """The error of what is used."""
        return self.error_with if self.used else self.error_without


class Effect(NamedTuple):
    """What the festivals do to one series."""

    factors: Floats  # [days of the calendar]; what they multiply demand by
    errors: Floats  # [days of the calendar]; the mean absolute error of earlier forecasts of such days, or 0
    tests: dict[str, Test]


def examine(calendar: Calendar, counts: Floats, festival: Festival, begin: int, end: int) -> Test:
    """Forecast each window of a festival from the days before it, with and without factors from earlier windows.

    Args:
        counts: [days or more] of one series
        begin: the first day of the series.
        end: the day after the last day that is known.
    """
    seen = calendar.seen(festival, begin, end)
    without, with_factors = [], []
    for number in range(1, len(seen)):
        window = seen[number]
        usual = calendar.usual(counts, window, begin, window.start)
        factors = calendar.learn(counts, seen[:number], begin, window.start)
        actual = counts[window.start : window.stop]
        without.append(np.abs(actual - usual).mean())
        with_factors.append(np.abs(actual - usual * factors).mean())
    if not without:
        return Test(False, 0, 0.0, 0.0)
    before, after = float(np.mean(without)), float(np.mean(with_factors))
    return Test(after < GAIN * before, len(without), before, after)


def effect_of(calendar: Calendar, counts: Floats, begin: int, end: int) -> Effect:
    """Return what festivals do to a series. Only days before `end` are used.

    A festival without a proved gain has the factor 1.
    """
    effect = Effect(np.ones(calendar.days), np.zeros(calendar.days), {})
    for festival in FESTIVALS:
        test = effect.tests[festival.name] = examine(calendar, counts, festival, begin, end)
        if not test.windows:
            continue
        learned = calendar.learn(counts, calendar.seen(festival, begin, end), begin, end)
        for window in calendar.windows(festival):
            inside = slice(max(0, -window.start), min(len(window), calendar.days - window.start))
            days = slice(max(0, window.start), window.start + inside.stop)
            effect.errors[days] = test.error
            if test.used:
                effect.factors[days] = learned[inside]
    return effect
