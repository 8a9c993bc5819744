"""Terminal output: progress and messages go to stderr, results to stdout.

Names, texts and labels are printed literally: they are not parsed as markup, and control characters are escaped.
"""

from __future__ import annotations

import json
import os
import select
import shlex
import sys
import time
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from operator import length_hint
from pathlib import Path
from typing import Any, TextIO, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from aisle.errors import OutputClosed, ServerError
from aisle.files import write_json

PROGRESS = "AISLE_PROGRESS"  # environment variable: a file in which commands keep their progress, for the desk
NOTE_SECONDS = 0.25  # between two notes of the progress

T = TypeVar("T")


@contextmanager
def detect_closed_output() -> Iterator[None]:
    """Distinguish a closed stdout or stderr from other broken connections.

    Raises:
        OutputClosed: the reader of the output has closed it.
        ServerError: another connection broke.
    """
    try:
        yield
    except BrokenPipeError:
        poll = select.poll()
        for descriptor in (1, 2):
            poll.register(descriptor, select.POLLOUT)
        if any(event & select.POLLERR for _, event in poll.poll(0)):
            raise OutputClosed from None
        raise ServerError("a connection broke; run the command again") from None


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise  # `aisle.failures` handles it; rich would exit with 1


stderr = _Console(stderr=True, highlight=False, markup=False, emoji=False)
stdout = _Console(highlight=False, markup=False, emoji=False)


def say(message: str) -> None:
    """Print a message on stderr."""
    stderr.print(printable(message), soft_wrap=True)


@lru_cache(maxsize=100)
def say_once(message: str) -> None:
    """Print a message on stderr, but only once: a command reads a table several times."""
    say(message)


def show(message: str) -> None:
    """Print a line of the result on stdout."""
    stdout.print(printable(message), soft_wrap=True)


def say_next(done: str, *command: object) -> None:
    """Print what is done and the next command, quoted for a shell."""
    say(f"{done}; next: {shlex.join(map(str, command))}" if command else done)


def printable(value: object) -> str:
    """Return a value as text in which control characters other than line feeds are escapes, such as \\x1b."""
    return "".join(
        repr(char)[1:-1] if unicodedata.category(char) in ("Cc", "Cs") and char != "\n" else char for char in str(value)
    )


def new_table(*columns: str, title: str | None = None) -> Table:
    """Return a table that folds its cells, and does not cut them, if the terminal is too narrow."""
    table = Table(title=title)
    for name in columns:
        table.add_column(printable(name), overflow="fold")
    return table


def cell(value: object) -> Text:
    """Return one cell: a dash for None, floats to four significant digits, other values literally."""
    shown = "–" if value is None else f"{value:.4g}" if isinstance(value, float) else printable(value)
    return Text(shown, justify="right" if isinstance(value, (int, float)) else "left")


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Yield `items` and show a progress bar."""
    if total is None:
        total = length_hint(items) or None
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=stderr) as progress:
        yield from _noted(progress.track(items, total=total, description=description), description, total)


def _noted(items: Iterable[T], description: str, total: int | None) -> Iterator[T]:
    """Yield `items`, and keep the progress in the file that the environment variable `PROGRESS` names."""
    path = os.environ.get(PROGRESS)
    if not path:
        yield from items
        return
    noted = 0.0
    for done, item in enumerate(items):
        if (now := time.monotonic()) - noted >= NOTE_SECONDS:
            write_json(Path(path), {"what": description, "done": done, "total": total})
            noted = now
        yield item


def print_json(value: dict[str, Any]) -> None:
    """Print one JSON object on one line; if stdout is not UTF-8, in ASCII, which every encoding can hold."""
    in_utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    print(json.dumps(value, ensure_ascii=not in_utf8, allow_nan=False))


def prepare_streams() -> None:
    """Make stdout and stderr accept every character: one that the encoding lacks becomes an escape."""
    for name in ("stdout", "stderr"):
        stream: TextIO | None = getattr(sys, name)
        if stream is None:  # the parent process closed it
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
