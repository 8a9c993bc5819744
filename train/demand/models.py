"""The models of one series, from statsforecast, and the choice among them by rolling-origin validation."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from aisle.train.demand.counts import Floats

SEASON = 7  # days
HISTORY = 365  # days; the models see no more, because the time of a fit grows with them
LEAST = 28  # days before the first origin
ORIGINS = 3
SPARSE = 0.3  # of the last weeks' days have a count; below it, a series is sparse
RECENT = 56  # days; the level of a sparse series
QUANTILES = {80: 1.2815515655446004, 95: 1.959963984540054}  # of the normal distribution, for two-sided intervals
MAE_TO_DEVIATION = 1.2533141373155001  # √(π/2), of the normal distribution
NAIVE, MEAN = "SeasonalNaive", "Mean"


class Forecast(NamedTuple):
    """A forecast and its intervals, each [days]."""

    mean: Floats
    low_80: Floats
    high_80: Floats
    low_95: Floats
    high_95: Floats

    def lifted(self, factors: Floats, errors: Floats) -> Forecast:
        """Return the forecast with the factors of festivals, and with intervals as wide as the errors on their days.

        Args:
            factors: [days]
            errors: [days], mean absolute errors
        """
        mean, *bounds = (part * factors for part in self)
        spread = {share: MAE_TO_DEVIATION * z * errors for share, z in QUANTILES.items()}
        return Forecast(
            mean,
            np.minimum(bounds[0], mean - spread[80]),
            np.maximum(bounds[1], mean + spread[80]),
            np.minimum(bounds[2], mean - spread[95]),
            np.maximum(bounds[3], mean + spread[95]),
        )


class Choice(NamedTuple):
    """The model of one series, and its mean absolute error over the origins of the validation, by model."""

    model: str
    why: str  # empty if validation chose it
    errors: dict[str, float]
    variance: float  # mean squared error of the validation


def forecast(model: str, counts: Floats, horizon: int) -> Forecast:
    """Forecast the days after `counts`, [days], with a model of `MODELS` or the mean."""
    counts = counts[-HISTORY:]
    if model == MEAN:
        return _mean(counts, horizon)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = MODELS[model]().forecast(y=counts, h=horizon, level=[80, 95])  # type: ignore[attr-defined]
    return Forecast(*(np.asarray(found[key], np.float64) for key in ("mean", "lo-80", "hi-80", "lo-95", "hi-95")))


def _ets() -> object:
    from statsforecast.models import AutoETS

    return AutoETS(season_length=SEASON, model="AZA")  # counts may be 0, so errors and season are additive


def _theta() -> object:
    from statsforecast.models import AutoTheta

    return AutoTheta(season_length=SEASON, decomposition_type="additive")


def _naive() -> object:
    from statsforecast.models import SeasonalNaive

    return SeasonalNaive(season_length=SEASON)


MODELS: dict[str, Callable[[], object]] = {NAIVE: _naive, "AutoETS": _ets, "AutoTheta": _theta}


def _mean(counts: Floats, horizon: int) -> Forecast:
    """Forecast the mean of the last weeks, with the spread of single days around it."""
    recent = counts[-RECENT:]
    mean, spread = recent.mean(), recent.std(ddof=1) if len(recent) > 1 else 0.0
    bounds = [mean + sign * QUANTILES[level] * spread for level in (80, 95) for sign in (-1, 1)]
    return Forecast(*(np.full(horizon, value) for value in (mean, *bounds)))


def origins(days: int, horizon: int) -> list[int]:
    """Return how many days are known at each origin of the validation, the last one first."""
    step = SEASON * max(1, horizon // (2 * SEASON))
    return [end for k in range(ORIGINS) if (end := days - horizon - k * step) >= LEAST]


def choose(counts: Floats, factors: Floats, horizon: int) -> Choice:
    """Choose the model of a series by rolling-origin validation.

    Args:
        counts: [days], from the first day with a count
        factors: [days] of the festivals
    """
    days = len(counts)
    if days < 2 * SEASON:
        return Choice(MEAN, f"too short: {days} days", {}, _variance(counts, 1))
    if (counts[-RECENT:] > 0).mean() < SPARSE:
        return Choice(MEAN, f"too sparse: a count on {(counts[-RECENT:] > 0).mean():.0%} of days", {}, counts.var())
    ends = origins(days, horizon)
    if not ends:
        return Choice(NAIVE, f"too short to validate: {days} days", {}, _variance(counts, SEASON))
    absolute: dict[str, float] = {}
    squared: dict[str, float] = {}
    for name in MODELS:
        errors = np.array([_errors(name, counts, factors, end, horizon) for end in ends])
        absolute[name], squared[name] = float(np.abs(errors).mean()), float((errors**2).mean())
    best = min(absolute, key=lambda name: absolute[name])
    return Choice(best, "", absolute, squared[best])


def _errors(name: str, counts: Floats, factors: Floats, end: int, horizon: int) -> Floats:
    after = slice(end, end + horizon)
    told = forecast(name, counts[:end] / factors[:end], horizon)
    errors: Floats = told.mean * factors[after] - counts[after]
    return errors


def _variance(counts: Floats, lag: int) -> float:
    steps = counts[lag:] - counts[:-lag]
    return float((steps**2).mean()) if len(steps) else 0.0
