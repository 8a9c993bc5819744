"""Labelled rows to a training part and a held-out part."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from aisle.errors import InputError
from aisle.preprocess.clean import Table, content_key

HELD_OUT = 5  # one text in so many is kept away from training


class Split(NamedTuple):
    train: Table
    held_out: Table
    labels: list[str]


def is_held_out(text: str) -> bool:
    """Tell whether a cleaned text belongs to the held-out fifth.

    Content alone decides, so equal texts never lie on both sides, whatever file or order they come in.
    """
    return int.from_bytes(content_key(text)[:8]) % HELD_OUT == 0


def split(table: Table) -> Split:
    """Split by content.

    Raises:
        InputError: fewer than two categories are left, or one has no row to train on.
    """
    parts = Table([], []), Table([], [])
    for text, label in zip(table.texts, table.labels, strict=True):
        part = parts[is_held_out(text)]
        part.texts.append(text)
        part.labels.append(label)
    counts = Counter(table.labels)
    if len(counts) < 2:
        raise InputError(f"{len(counts)} categories are left after cleaning; training needs two or more")
    lost = sorted(counts.keys() - set(parts[0].labels))
    if lost:
        raise InputError(f"category {lost[0]!r} has {counts[lost[0]]} row(s), none to train on; add rows or drop it")
    if not parts[1].texts:
        raise InputError(f"{len(table.texts)} rows are too few to hold a fifth out; add rows")
    return Split(*parts, sorted(counts))
