"""HTML reports: a self-contained page of headings, tables and plots, with its command and versions."""

from __future__ import annotations

import io
import math
import os
import platform
import shlex
import statistics
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import jinja2
from matplotlib.figure import Figure

import aisle
from aisle.errors import InputError
from aisle.files import write_json, write_text
from aisle.palette import BLUE, ORANGE, rgb

# Text stays text in the SVG, so that the reader's browser draws Chinese with its own fonts.
matplotlib.rcParams["svg.fonttype"] = "none"
matplotlib.rcParams["svg.hashsalt"] = "aisle"  # the same figure gives the same bytes

PACKAGES = ("torch", "transformers", "openvino", "tensorrt", "tensorrt-rtx-cu13", "nvidia-pytriton", "locust")
SHORT = 24  # characters; a cell up to this length is not wrapped
DIGITS = 4  # significant digits of a column's median


@dataclass
class Page:
    """A report. Its parts appear in the order in which they are added."""

    title: str
    summary: str
    settings: Mapping[str, Any] = field(default_factory=dict)  # printed at the end, with the date and the versions
    parts: list[dict[str, Any]] = field(default_factory=list)

    def heading(self, text: str) -> None:
        self.parts.append({"kind": "heading", "text": text})

    def text(self, text: str) -> None:
        self.parts.append({"kind": "text", "text": text})

    def marked(self, pieces: Sequence[tuple[str, float]]) -> None:
        """Add a text in coloured pieces: blue for a share of 1, orange for -1, no colour for 0."""
        shades = [
            (text, share, " ".join(map(str, rgb(BLUE if share > 0 else ORANGE))), abs(share) * 0.6)
            for text, share in pieces
        ]
        self.parts.append({"kind": "marked", "pieces": shades})

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Add a table. All floats of a column have the same number of decimals; None becomes a dash."""
        decimals = [_decimals(column) for column in zip(*rows, strict=True)]
        cells = [[_cell(cell, places) for cell, places in zip(row, decimals, strict=True)] for row in rows]
        numeric = [bool(cells) and all(row[i]["number"] for row in cells) for i in range(len(columns))]
        heads = [{"text": name, "number": number} for name, number in zip(columns, numeric, strict=True)]
        self.parts.append({"kind": "table", "columns": heads, "rows": cells})

    def records(self, columns: Mapping[str, str], rows: Iterable[Mapping[str, Any]]) -> None:
        """Add a table of rows that have a value for each of the keys of `columns`, which maps keys to headings."""
        self.table(list(columns.values()), [[row[key] for key in columns] for row in rows])

    def plot(self, figure: Figure, description: str) -> None:
        """Add a figure; the description is its caption."""
        image = io.StringIO()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")  # the browser has the glyphs; only widths are guessed
            figure.savefig(image, format="svg", bbox_inches="tight", metadata={"Date": None})
        svg = image.getvalue()
        self.parts.append({"kind": "plot", "image": svg[svg.index("<svg") :], "text": description})

    def write(self, path: Path, figures: dict[str, Any] | None = None) -> None:
        """Write the page and, if given, its figures beside it as .json.

        Raises:
            InputError: a file cannot be written.
        """
        source = Path(__file__).with_name("report.html").read_text("utf-8")
        template = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(source)
        page = template.render(page=self, about=_about()) + "\n"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, page)
            if figures is not None:
                write_json(path.with_suffix(".json"), figures)
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror}") from None


def _about() -> dict[str, str]:
    """Return the date, the command, the versions and the machine of a page."""
    about = {"made": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"}
    program, *arguments = sys.argv
    if Path(program).name in ("aisle", "__main__.py"):
        about["command"] = shlex.join(["aisle", *arguments])
    versions = [f"Aisle {aisle.__version__}", f"Python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    about["versions"] = ", ".join(versions)
    about["machine"] = f"{platform.system()} on {platform.machine()}, {len(os.sched_getaffinity(0))} cores"
    return about


def _decimals(column: Sequence[Any]) -> int:
    """Return the decimals that show a column's median float with four significant digits, at most four decimals."""
    sizes = [abs(value) for value in column if isinstance(value, float) and value and math.isfinite(value)]
    if not sizes:
        return DIGITS
    return min(DIGITS, max(0, DIGITS - 1 - math.floor(math.log10(0.999 * statistics.median(sizes)))))


def _cell(value: Any, decimals: int) -> dict[str, Any]:
    if value is None:
        return {"text": "–", "number": True}
    if isinstance(value, float):
        return {"text": _number(value, decimals), "number": True}
    text = str(value)
    return {"text": text, "number": isinstance(value, int), "short": len(text) <= SHORT}


def _number(value: float, decimals: int) -> str:
    least = 10.0**-decimals
    if value and abs(value) < least / 2:
        return f"< {least:.{decimals}f}" if value > 0 else f"> -{least:.{decimals}f}"
    return f"{value:,.{decimals}f}"
