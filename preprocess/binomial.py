"""Exact confidence bounds of a share (Clopper and Pearson 1934)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import beta

Floats = npt.NDArray[np.floating[Any]]


def lowest_share(right: npt.ArrayLike, rows: npt.ArrayLike, error: float) -> Floats:
    """Return a lower bound of the share behind `right` of `rows`, arrays; it is too high with probability `error`."""
    hits, total = np.asarray(right), np.asarray(rows)
    return np.where(hits > 0, beta.ppf(error, np.maximum(hits, 1), total - hits + 1), 0.0)


def interval(right: int, rows: int, error: float = 0.05) -> tuple[float, float]:
    """Return the two-sided confidence interval of the share behind `right` of `rows`."""
    return float(lowest_share(right, rows, error / 2)), 1 - float(lowest_share(rows - right, rows, error / 2))
