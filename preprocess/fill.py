"""Fill the missing values of a column from what the table has: from rows of the same product, then from the text.

Rows with the same text, or with the same value in another column, are one product. A missing value is filled if the
rows of its product that have one agree. If they disagree, the row stays empty. If they have none, the text decides, as
`aisle.preprocess.mentions` describes.

Values that differ only in case, spaces or width are one value; its most frequent spelling is filled.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from numbers import Real
from typing import Any, NamedTuple

import numpy as np

from aisle.console import say
from aisle.errors import InputError
from aisle.preprocess.fields import columns_of
from aisle.preprocess.labels import variant_key
from aisle.preprocess.mentions import DISPUTED, MISSING, OTHER, Integers, Mask, Mentions, Values, agreed, precision
from aisle.preprocess.tables.table import Row, as_text

PRODUCT, TITLE = "product", "title"  # how a value was filled

Texts = Callable[[Mask], Iterable[tuple[int, str]]]  # which rows -> place and cleaned text of each


@dataclass(frozen=True)
class Filling:
    """Which columns are filled. Rows with equal texts are one product, and rows with the same value of `by`."""

    columns: Sequence[str]
    by: str | None = None
    track: Callable[[Iterable[Any]], Iterable[Any]] = iter  # shows the progress of reading the texts

    @property
    def names(self) -> list[str]:
        """The columns that the table must have."""
        return [*self.columns, *([self.by] if self.by else [])]

    def check(self, text_column: str, label_column: str) -> None:
        """Refuse columns that cannot be filled.

        Raises:
            InputError: a column is the text, the label or `by`, or has a + in its name.
        """
        taken = {label_column: "the label, which is never filled", text_column: "the text, where values are looked for"}
        if self.by:
            taken[self.by] = "the column of --fill-by"
        for name in self.columns:
            if name in taken:
                raise InputError(f"--fill {name}: this is {taken[name]}; leave it out, or give another column")
        for name in self.names:
            if len(columns_of(name)) > 1:
                raise InputError(f"--fill {name}: a column whose name has a + inside must be renamed")


def mark_of(column: str) -> str:
    """Return the name of the column that says how each value of `column` was filled."""
    return f"{column}_filled"


class Filled(NamedTuple):
    """A column as it is filled."""

    name: str
    value: Integers  # [rows], the number of the value to fill in, or below 0
    by_title: Mask  # [rows]
    written: list[Any]  # [values], as the table has them
    figures: dict[str, Any]

    def edit(self, place: int) -> Row:
        """Return the cells of a row that change: its mark, and the value if one is filled in."""
        value = int(self.value[place])
        if value < 0:
            return {mark_of(self.name): None}
        return {self.name: self.written[value], mark_of(self.name): TITLE if self.by_title[place] else PRODUCT}


def types_of(filled: Iterable[Filled]) -> dict[str, type]:
    """Return the types of the columns that are edited, as in `columnar.rewrite`."""
    return {name: kind for each in filled for name, kind in ((each.name, object), (mark_of(each.name), str))}


class Filler:
    """Collects the values of rows, and fills them after the last row. It keeps 8 bytes of each row and column."""

    def __init__(self, wanted: Filling) -> None:
        self._wanted = wanted
        self._cells = {name: _Cells() for name in wanted.names}

    def add(self, row: Row) -> None:
        """Take the values of the next row."""
        for name, cells in self._cells.items():
            cells.add(row.get(name))

    def refuse_marks(self, row: Row) -> None:
        """Refuse a table that has a column of the name of one that would be added.

        Raises:
            InputError: `row` has such a column.
        """
        for name in self._wanted.columns:
            if mark_of(name) in row:
                raise InputError(
                    f"--fill {name} adds the column {mark_of(name)!r}; the table has one: rename or drop it"
                )

    def fill(self, first: Integers, kept: Mask, texts: Texts) -> list[Filled]:
        """Return the columns as they are filled.

        Args:
            first: [rows], the place of the first row with the same content.
            kept: [rows], the rows of the new table. The values of the others are evidence too.
        """
        by = self._cells[self._wanted.by].values().of_row if self._wanted.by else np.full(len(first), MISSING)
        filled = []
        for name in self._wanted.columns:
            values = self._cells[name].values()
            if not values.written:
                say(f"--fill {name}: no row has a text or a number there, so nothing is filled")
            mentions = Mentions(values, first, np.where(by >= 0, by + len(first), first))
            mentions.read(self._wanted.track(texts(first == np.arange(len(first)))))
            filled.append(_fill(name, values, _from_products(values.of_row, first, by), mentions, kept))
        return filled


class _Cells:
    """The cells of a column, one number for each row."""

    def __init__(self) -> None:
        self._of_row = array("q")
        self._numbers: dict[str, int] = {}
        self._raw: list[Any] = []

    def add(self, raw: Any) -> None:
        text = as_text(raw)
        if text is None or (isinstance(text, str) and not text.strip()):
            self._of_row.append(MISSING)
        elif not isinstance(text, str) or not isinstance(raw, str | bytes | Real | Decimal) or not _is_utf8(text):
            self._of_row.append(OTHER)
        else:
            number = self._numbers.setdefault(text, len(self._raw))
            if number == len(self._raw):
                self._raw.append(raw)
            self._of_row.append(number)

    def values(self) -> Values:
        spelling = np.array(self._of_row, np.int64)
        rows = np.bincount(spelling[spelling >= 0], minlength=len(self._raw)).tolist()
        numbers: dict[str, int] = {}
        best: list[int] = []  # [values], the most frequent spelling
        spellings = []
        for own, text in enumerate(self._numbers):
            value = numbers.setdefault(variant_key(text) or text, len(best))
            if value == len(best):
                best.append(own)
            elif rows[own] > rows[best[value]]:
                best[value] = own
            spellings.append((text, value, rows[own]))
        codes = [OTHER, DISPUTED, MISSING]  # at the end, because they are negative indices
        lookup = np.array([*(value for _, value, _ in spellings), *codes])
        return Values(lookup[spelling], [self._raw[own] for own in best], spellings)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _from_products(value: Integers, first: Integers, by: Integers) -> Integers:
    """Return what the other rows of a row's product say: a value, MISSING if they have none, or DISPUTED. [rows]"""
    named = np.where(by >= 0, agreed(value, by, without_own=True), MISSING)
    return np.where(named == MISSING, agreed(value, first, without_own=True), named)


def _fill(name: str, values: Values, product: Integers, mentions: Mentions, kept: Mask) -> Filled:
    """Fill a column.

    Args:
        product: [rows], what the other rows of the product say, as `_from_products`.
        kept: [rows], the rows of the new table; no other is filled.
    """
    missing = (values.of_row == MISSING) & kept
    by_title = missing & (product == MISSING)
    proof = mentions.prove()
    value = np.where(by_title, mentions.answers(proof), np.where(missing, product, MISSING))
    ways = {PRODUCT: value[~by_title], TITLE: value[by_title]}
    known = values.of_row >= 0
    right = (product == values.of_row)[known]
    figures = {
        "missing": int(missing.sum()),
        "filled": {way: int((found >= 0).sum()) for way, found in ways.items()},
        "disputed": {way: int((found == DISPUTED).sum()) for way, found in ways.items()},
        "held_out": {
            PRODUCT: precision(int(known.sum()), int((product[known] >= 0).sum()), int(right.sum())),
            TITLE: mentions.held_out(),
        },
        "values": mentions.figures(proof, by_title, value),
    }
    return Filled(name, value, by_title, values.written, figures)
