"""Read records of CSV and TSV, with proper quotes and with stray quotes.

For Python's csv module, any quote at the start of a cell opens a quoted cell, which ends at the next quote, even many
lines later. Titles contain stray quotes ("7 inch tablet). So here a quote opens a cell only if the cell is also closed
properly: quotes inside are doubled, and a delimiter or the end of the line follows. Otherwise it is a character.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import deque
from collections.abc import Iterator
from typing import IO

LONGEST = 16 * 1024 * 1024  # characters of a line or cell
WINDOW = 64 * 1024  # characters to look ahead for a stray quote
MANY = 50  # lines; a cell with so many lines that are whole rows is not one cell

_INSIDE = re.compile(r'(?:[^"]++|"")*+')  # up to the first quote that is not doubled


class TooLong(ValueError):
    """A line has more than LONGEST characters."""


class Records:
    """Iterates over the records of a file, in linear time and bounded memory.

    `columns` is the number of cells of a row, once the header is known. `line` is the line where the last record began.
    """

    def __init__(self, file: IO[str], delimiter: str) -> None:
        self.delimiter = delimiter
        self.columns: int | None = None
        self.line = 0
        self._file = file
        self._ahead: deque[str] = deque()  # lines that were read ahead
        self._taken = 0  # number of lines taken
        self._offset = 0  # characters up to the end of the last line taken
        self._stray = False  # a quote was found that no CSV writer would write
        self._spanning = False  # a cell was found that must have several lines
        self._clear = 0.0  # offset up to which there is no stray quote
        self._aligned = 0  # offset where the search for stray quotes continues
        self.split_at(delimiter)

    def split_at(self, delimiter: str) -> None:
        """Change the delimiter. If it is empty, each line is one cell."""
        self.delimiter = delimiter
        between = re.escape(delimiter) + "|" if delimiter else ""
        quoted = r'"(?:[^"]++|"")*+"'
        self._closed = re.compile(rf"{quoted}(?={between}\Z)")
        plain = rf'[^"\r\n{re.escape(delimiter)}]*+(?!")'
        self._proper = re.compile(rf"(?:(?:{between}\r\n|\n|\r)(?:{quoted}(?={between}\r|\n|\Z)|{plain}))*+")

    def __iter__(self) -> Iterator[list[str]]:
        while (line := self.take()) is not None:
            self.line = self._taken
            body = line.rstrip("\r\n")
            if not body:
                continue
            if '"' in body:
                yield self._record(body, line[len(body) :])
            else:
                yield body.split(self.delimiter) if self.delimiter else [body]

    def take(self) -> str | None:
        """Return the next line with its line end; None at the end of the file."""
        line = self._ahead.popleft() if self._ahead else self._read()
        if line is None:
            return None
        self._taken += 1
        self._offset += len(line)
        return line

    def put_back(self, line: str) -> None:
        """Return a line that was read from the file to the front."""
        if len(line) > LONGEST:
            raise TooLong(f"a line has more than {LONGEST} characters")
        self._ahead.appendleft(line)

    def _read(self) -> str | None:
        line = self._file.readline(LONGEST + 1)
        if len(line) > LONGEST:
            raise TooLong(f"a line has more than {LONGEST} characters")
        return line or None

    def _peek(self) -> Iterator[str]:
        """Yield the next lines without taking them."""
        yield from self._ahead
        while (line := self._read()) is not None:
            self._ahead.append(line)
            yield line

    def _record(self, body: str, end: str) -> list[str]:
        """Return the cells of the record that begins with the line `body`; `end` is its line end."""
        cells: list[str] = []
        at = 0
        while True:
            quoted = self._quoted(body, at)
            if quoted is None and body.startswith('"', at) and _INSIDE.fullmatch(body, at + 1):
                spanning = self._span(cells, body, end, at)
                if spanning is not None:
                    quoted, body, end = spanning
                    at = 0
            if quoted is None:
                stop = self._stop(body, at)
                self._stray = self._stray or '"' in body[at:stop]
                cells.append(body[at:stop])
            else:
                stop, content = quoted
                cells.append(content.replace('""', '"'))
            if stop == len(body):
                return cells
            at = stop + 1

    def _quoted(self, body: str, at: int) -> tuple[int, str] | None:
        """Return the end and the content of the quoted cell at `at`; None if no cell is quoted within the line."""
        found = self._closed.match(body, at)
        return found and (found.end(), body[at + 1 : found.end() - 1])

    def _stop(self, body: str, at: int) -> int:
        stop = body.find(self.delimiter, at) if self.delimiter else -1
        return len(body) if stop < 0 else stop

    def _span(self, before: list[str], body: str, end: str, at: int) -> tuple[tuple[int, str], str, str] | None:
        """Read a cell that opens with a quote and is closed on a later line.

        Returns the end of the cell in that line and its content, the line, and its line end. Returns None if the quote
        is only a character.
        """
        parts = [body[at + 1 :] + end]
        size = len(parts[0])
        for line in self._peek():
            stop = _INSIDE.match(line).end() if '"' in line else len(line)  # type: ignore[union-attr]
            if stop < len(line):
                break
            parts.append(line)
            size += len(line)
            if size > LONGEST:
                return None
        else:
            return None
        last = line.rstrip("\r\n")
        if stop + 1 < len(last) and not (self.delimiter and last.startswith(self.delimiter, stop + 1)):
            return None
        if self._are_rows(len(before) + len(self._split(body[at:])), body, parts[1:], last, stop):
            return None
        for _ in parts:
            self.take()
        return (stop + 1, "".join(parts) + line[:stop]), last, line[len(last) :]

    def _split(self, text: str) -> list[str]:
        return text.split(self.delimiter) if self.delimiter else [text]

    def _are_rows(self, width: int, first: str, between: list[str], last: str, stop: int) -> bool:
        """Return whether lines that could be one cell are separate rows, with a stray quote in the first and the last.

        Both are possible only if each line has as many cells as the table has columns. In this case the rest of the
        file decides: without any stray quote, the file is properly quoted and the lines are one cell.
        """
        if self.columns is None:
            return False
        widths = [
            {width, len(self._split(first))},
            *({len(self._split(line))} for line in between),
            {len(self._line(last)), len(self._split(last))},
        ]
        if not all(self.columns in each for each in widths):
            self._spanning = True
            return False
        if self.columns > 1 and len(widths) >= MANY:
            return True
        if self._spanning:
            return False
        self._stray = self._stray or self._stray_ahead(len(between), stop)
        return self._stray

    def _line(self, body: str) -> list[str]:
        """Return the cells of one line, to count them."""
        cells, at = [], 0
        while True:
            stop, content = self._quoted(body, at) or (self._stop(body, at), "")
            cells.append(content)
            if stop == len(body):
                return cells
            at = stop + 1

    def _stray_ahead(self, between: int, stop: int) -> bool:
        """Return whether a later quote is one that no CSV writer would write.

        Each part of the file is searched at most once.
        """
        lines = list(itertools.islice(self._peek(), between + 1))
        close = self._offset + sum(map(len, lines[:-1])) + stop + 1
        if self._clear >= close + WINDOW:
            return False
        start = max(close, self._aligned)
        position, pieces, ended = self._offset, [], True
        for line in self._peek():
            pieces.append(line[max(0, start - position) :])
            position += len(line)
            if position > close + 2 * WINDOW:
                ended = False
                break
        text = "".join(pieces).rstrip("\r\n")
        reached = self._proper.match(text).end()  # type: ignore[union-attr]
        self._aligned = start + reached
        self._clear = math.inf if ended else close + 2 * WINDOW
        if reached == len(text):
            return False
        inside = _INSIDE.match(text, text.find('"', reached) + 1)
        return ended or inside.end() < len(text)  # type: ignore[union-attr]
