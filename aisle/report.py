"""HTML reports: one self-contained page of headings, tables and plots."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import jinja2
from matplotlib.figure import Figure

from aisle.errors import InputError
from aisle.files import write_json, write_text

# Text stays text in the SVG, so that the reader's browser draws Chinese with its own fonts.
matplotlib.rcParams["svg.fonttype"] = "none"
matplotlib.rcParams["svg.hashsalt"] = "aisle"  # the same figure gives the same bytes


@dataclass
class Page:
    """A report in the making; parts appear in the order in which they are added."""

    title: str
    summary: str
    parts: list[dict[str, Any]] = field(default_factory=list)

    def heading(self, text: str) -> None:
        self.parts.append({"kind": "heading", "text": text})

    def text(self, text: str) -> None:
        self.parts.append({"kind": "text", "text": text})

    def marked(self, pieces: Sequence[tuple[str, float]]) -> None:
        """Add a text in coloured pieces: blue for a share of 1, orange for -1, none for 0."""
        self.parts.append({"kind": "marked", "pieces": pieces})

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Add a table; floats are shown to four significant digits, None as a dash."""
        cells = [[_cell(cell) for cell in row] for row in rows]
        self.parts.append({"kind": "table", "columns": columns, "rows": cells})

    def plot(self, figure: Figure, description: str) -> None:
        """Add a figure; the description is read out where it cannot be seen."""
        image = io.StringIO()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")  # it only guesses such a glyph's width
            figure.savefig(image, format="svg", bbox_inches="tight", metadata={"Date": None})
        svg = image.getvalue()
        self.parts.append({"kind": "plot", "image": svg[svg.index("<svg") :], "text": description})

    def write(self, path: Path, figures: dict[str, Any] | None = None) -> None:
        """Write the page and, beside it as .json, the figures that it shows.

        Raises:
            InputError: a file cannot be written.
        """
        source = Path(__file__).with_name("report.html").read_text("utf-8")
        template = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(source)
        page = template.render(page=self) + "\n"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, page)
            if figures is not None:
                write_json(path.with_suffix(".json"), figures)
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror}") from None


def _cell(value: Any) -> dict[str, Any]:
    if value is None:
        return {"text": "–", "number": True}
    if isinstance(value, float):
        return {"text": f"{value:.4g}", "number": True}
    return {"text": str(value), "number": isinstance(value, int)}
