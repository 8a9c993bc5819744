"""Readable axes: percent scales that end at 100 %, and logarithmic scales with plain numbers."""

from __future__ import annotations

from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator, PercentFormatter

Direction = Literal["x", "y"]
MARGIN = 0.08  # share of the range of the values


def percent_axis(axes: Axes, direction: Direction, *, whole: bool = True) -> None:
    """Show shares from 0 to 1 as percent, on an axis that ends at 100 % at most.

    Args:
        whole: show 0 to 100 %; otherwise show the range of the values with a margin.
    """
    limits = (0.0, 1.0) if whole else _around(axes, direction)
    axes.set(**{f"{direction}lim": limits})
    axis = getattr(axes, f"{direction}axis")
    axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    decimals = None if whole else 0 if limits[1] - limits[0] > 0.05 else 1 if limits[1] - limits[0] > 0.005 else 2
    axis.set_major_formatter(PercentFormatter(1.0, decimals))
    for line in axes.lines:
        line.set_clip_on(False)  # a marker at 100 % is shown whole


def log_axis(axes: Axes, direction: Direction) -> None:
    """Use a logarithmic scale whose ticks are plain numbers: 1, 2, 5, 10, …"""
    axes.set(**{f"{direction}scale": "log"})
    axis = getattr(axes, f"{direction}axis")
    low, high = sorted(axis.get_view_interval())
    wide = low > 0 and high / low > 1000  # powers of ten alone, or the numbers would overlap
    axis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def legend(axes: Axes, **options: Any) -> None:
    """Add a legend below the plot, so that it does not cover values."""
    handles, labels = axes.get_legend_handles_labels()
    columns = options.pop("ncols", min(len(labels), 3))
    axes.legend(handles, labels, ncols=columns, frameon=False, fontsize=9, **BELOW | options)


BELOW: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16)}


def _around(axes: Axes, direction: Direction) -> tuple[float, float]:
    low, high = getattr(axes.dataLim, f"interval{direction}")
    margin = max(MARGIN * (high - low), 0.001)
    return max(0.0, low - margin), min(1.0, high + margin)
