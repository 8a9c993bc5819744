"""Draw the README's picture: the table that `aisle demo` prints, as an SVG that loads nothing from outside.

aisle demo --json | python docs/picture.py docs/_static/demo.svg
"""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

from rich import box
from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.table import Table
from rich.terminal_theme import DEFAULT_TERMINAL_THEME
from rich.text import Text


def draw(result: dict[str, list[dict[str, str | float]]], path: Path) -> None:
    """Write the predictions of a demo as a picture of a terminal."""
    title = "a model trained on a SYNTHETIC catalogue"
    table = Table("text", "category", "confidence", "latency", title=title, box=box.SIMPLE_HEAVY)
    for row in result["predictions"]:
        figures = f"{row['confidence']:.4f}", f"{row['milliseconds']:.1f} ms"
        table.add_row(Text(str(row["text"])), Text(str(row["category"])), *figures)
    console = Console(record=True, width=112, file=io.StringIO(), force_terminal=True)
    console.print(table)
    form = re.sub(r"@font-face \{\{.*?\}\}\s*", "", CONSOLE_SVG_FORMAT, flags=re.S)  # its fonts lie on other hosts
    picture = console.export_svg(title="make demo", theme=DEFAULT_TERMINAL_THEME, code_format=form)
    # rich gives each run of text a length that counts a Chinese character as one column, and so squeezes it.
    picture = re.sub(r' textLength="[^"]*"([^>]*>[^<]*[\u2e80-\uffff])', r"\1", picture)
    path.write_text(picture, "utf-8")


if __name__ == "__main__":
    draw(json.load(sys.stdin), Path(sys.argv[1]))
