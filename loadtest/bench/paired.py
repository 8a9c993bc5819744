"""Paired ratios of two systems measured in turn: the median, its confidence interval, and whether it is conclusive."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

MAX_WIDTH = 0.3  # an interval wider than this share of the median allows no conclusion
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Paired:
    """The median of paired figures, one per round, with a 95 % confidence interval."""

    median: float
    low: float
    high: float
    rounds: int
    conclusive: bool  # there are enough rounds, and the interval is narrow

    def __str__(self) -> str:
        interval = f"({self.low:.3g} to {self.high:.3g})"
        return f"{self.median:.3g} {interval}" if self.conclusive else f"undecided {interval}"

    def below(self, value: float) -> bool | None:
        """Return whether the true median is below a value; None if the interval does not decide it."""
        if not interval_rank(self.rounds) or self.low <= value <= self.high:
            return None
        return self.high < value

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def paired(values: Sequence[float]) -> Paired | None:
    """Summarize one figure per round, such as the ratio of two systems; None without figures.

    If the speed of the machine varies, both figures of a round vary together, and their ratio stays the same. The
    bounds of the interval are order statistics: this assumes no distribution, and the interval contains the true median
    with a probability of 95 %. This needs at least six rounds. With fewer rounds, or an interval wider than 30 % of the
    median, the result is not conclusive.
    """
    values = sorted(value for value in values if not math.isnan(value))
    if not values:
        return None
    rank = interval_rank(len(values))
    low, high = values[max(rank, 1) - 1], values[-max(rank, 1)]
    middle = median(values)
    return Paired(middle, low, high, len(values), rank > 0 and high - low <= MAX_WIDTH * abs(middle))


def interval_rank(count: int) -> int:
    """Return the largest k so that the k-th lowest and k-th highest of `count` values enclose the median with 95 %.

    Returns 0 if there is no such k. The median is below the k-th lowest value if fewer than k values are below the
    median. Their number is binomial with probability 1/2 (the interval of the sign test).
    """
    tail, rank = 0.0, 0
    while (tail := tail + math.comb(count, rank) / 2**count) <= (1 - CONFIDENCE) / 2:
        rank += 1
    return rank


def ratios(ours: Sequence[float], others: Sequence[float]) -> Paired | None:
    """Return the paired ratios of two systems over the rounds that both have."""
    return paired([one / other for one, other in zip(ours, others, strict=True) if other])
