"""The colours of the HTML pages and of the terminal. Each has one meaning."""

from __future__ import annotations

BLUE = "#1f5fa8"  # the model, or the measured series; words that support a category
ORANGE = "#c85a00"  # a second method; words that oppose a category
GREEN = "#2e7d32"
PURPLE = "#7b4fa3"
GREY = "#8a8a8a"  # the reference: a baseline, the diagonal, the training data
RED = "#b3261e"  # a limit that calls for action
BLACK = "#222222"  # a bound or a mark across the plot
SERIES = (BLUE, ORANGE, GREEN, PURPLE, RED, GREY)  # the order of colours for series of equal rank


def rgb(color: str) -> tuple[int, int, int]:
    """Return the red, green and blue of a colour #rrggbb, each from 0 to 255."""
    value = int(color.removeprefix("#"), 16)
    return value >> 16, value >> 8 & 255, value & 255
