"""Charts of the pages, as SVG images without style attributes, which the desk's security policy forbids."""

from __future__ import annotations

import io
import re
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DRAWING = threading.Lock()  # matplotlib's fonts and settings belong to the process
TICKS = 8  # dates below a chart
Translate = Callable[[str], str]


def calibration_chart(bins: Sequence[dict[str, Any]], translate: Translate) -> bytes:
    """Draw the accuracy of each bin of confidence, beside that of a calibrated model, and its number of texts."""
    with _DRAWING:
        from aisle.palette import BLUE, GREY
        from aisle.plots import log_axis, percent_axis

        figure = _figure(6, 5)
        axes, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        axes.plot([0, 1], [0, 1], "--", color=GREY, label=translate("calibrated model"))
        confidence, accuracy = ([each[name] for each in bins] for name in ("confidence", "accuracy"))
        axes.plot(confidence, accuracy, "o-", color=BLUE, label=translate("this model"))
        axes.set(ylabel=translate("Accuracy"))
        below.bar(confidence, [each["rows"] for each in bins], width=0.04, color=BLUE)
        below.set(xlabel=translate("Confidence"), ylabel=translate("Texts"), yscale="log", ylim=(0.8, None))
        log_axis(below, "y")
        axes.legend(loc="upper left", frameon=False, fontsize=9)
        axes.grid(alpha=0.3)
        for direction in ("x", "y"):
            percent_axis(axes, direction)
        return _svg(figure)


def course_chart(points: Sequence[dict[str, float | None]], dates: Sequence[str], translate: Translate) -> bytes:
    """Draw each measure of drift over time, with its limits. `points` has a value or None for each measure."""
    with _DRAWING:
        from aisle.train.adapt.drift_statistics import RULES

        names = [name for name in RULES if any(point.get(name) is not None for point in points)]
        figure = _figure(8, 1.8 * max(1, len(names)) + 0.6)
        panels = figure.subplots(max(1, len(names)), 1, sharex=True, squeeze=False)[:, 0]
        for axes, name in zip(panels, names, strict=False):
            _draw_measure(axes, [point.get(name) for point in points], name, translate)
        places = range(len(dates))
        shown = places[:: -(-len(places) // TICKS) or 1]
        panels[-1].set_xticks(shown, [dates[place] for place in shown], rotation=30, ha="right", fontsize=8)
        lines = {label: line for axes in panels for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
        figure.legend(lines.values(), lines.keys(), loc="outside upper right", ncols=3, frameon=False, fontsize=9)
        return _svg(figure)


def _figure(width: float, height: float) -> Figure:
    """Return an empty figure; sizes are in inches."""
    from matplotlib.figure import Figure

    import aisle.report  # noqa: F401 - it has matplotlib leave text as text, for the browser's fonts

    return Figure(figsize=(width, height), layout="constrained")


def _draw_measure(axes: Any, values: Sequence[float | None], name: str, translate: Translate) -> None:
    from aisle.palette import BLUE, GREY, RED
    from aisle.train.adapt.drift_statistics import RULES

    rule = RULES[name]
    known = [(place, value) for place, value in enumerate(values) if value is not None]
    axes.plot(*zip(*known, strict=True), "o-", color=BLUE, label=translate("traffic"))
    axes.axhline(rule.watch, linestyle=":", color=GREY, label=translate("watch above"))
    if rule.retrain is not None:
        axes.axhline(rule.retrain, linestyle="--", color=RED, label=translate("retrain above"))
    axes.set_title(f"{translate(rule.title)} ({translate(rule.unit)})", fontsize=9, loc="left")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)


def _svg(figure: Figure) -> bytes:
    image = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the browser has the glyphs
        figure.savefig(image, format="svg", metadata={"Date": None})
    drawn = image.getvalue()
    drawn = re.sub(r"<style.*?</style>", "", drawn, flags=re.S)
    drawn = drawn.replace("<svg ", '<svg stroke-linejoin="round" stroke-linecap="butt" ', 1)
    return re.sub(r'style="([^"]*)"', _attributes, drawn).encode()


def _attributes(style: re.Match[str]) -> str:
    """Return the attributes that mean the same as a style; `font` alone is no attribute."""
    found = dict(each.split(":", 1) for each in style[1].split(";") if ":" in each)
    values = {name.strip(): value.strip() for name, value in found.items()}
    if font := values.pop("font", ""):
        size, _, family = font.partition("px ")
        values |= {"font-size": size.rpartition(" ")[2], "font-family": family}
    return " ".join(f'{name}="{value}"' for name, value in values.items())
