"""Labelled rows to a training, a validation and a held-out part; content alone decides where a text goes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

from aisle.errors import InputError
from aisle.preprocess.clean import Table, content_key

HELD_OUT = 5  # one text in so many is kept away from training
VALIDATION = 10  # and of the others, one in so many: it decides when to stop, and nothing is reported on it


class Split(NamedTuple):
    train: Table
    validation: Table
    held_out: Table
    labels: list[str]


def is_held_out(text: str) -> bool:
    """Tell whether a cleaned text belongs to the held-out fifth.

    Content alone decides, so equal texts never lie on both sides, whatever file or order they come in.
    """
    return int.from_bytes(content_key(text)[:8]) % HELD_OUT == 0


def is_validation(text: str) -> bool:
    """Tell whether a cleaned text that is not held out belongs to the validation tenth."""
    return int.from_bytes(content_key(text)[8:]) % VALIDATION == 0


def split(table: Table) -> Split:
    """Split by content.

    Raises:
        InputError: fewer than two categories are left, or one has a single row or none to train on.
    """
    counts = Counter(table.labels)
    if len(counts) < 2:
        left = "".join(f"only category {label!r} is" for label in counts) or "no row is"
        raise InputError(f"{left} left after cleaning; training needs two categories or more")
    single = sorted(label for label, rows in counts.items() if rows == 1)
    if single:
        message = f"category {single[0]!r} has one row after cleaning, as have {len(single) - 1} more"
        raise InputError(f"{message}; a category needs two or more: add rows, or drop it")
    parts = _divide(table, sorted(counts), is_held_out)
    lost = sorted(counts.keys() - set(parts.train.labels))
    if lost:
        raise InputError(f"category {lost[0]!r} has {counts[lost[0]]} row(s), none to train on; add rows or drop it")
    if not parts.held_out.texts:
        raise InputError(f"{len(table.texts)} rows are too few to hold a fifth out; add rows")
    return parts


def folds(table: Table, count: int) -> Iterator[Split]:
    """Yield `count` splits for cross-validation, each with another part held out.

    The held-out fifth is in none of them. A category whose rows are all in one part is not learnt there, and is scored
    as the errors that it causes.

    Raises:
        InputError: there is but one part, or one is empty.
    """
    if count < 2:
        raise InputError("cross-validation takes two folds or more")
    rest = [(text, label) for text, label in zip(table.texts, table.labels, strict=True) if not is_held_out(text)]
    learnable = Table([text for text, _ in rest], [label for _, label in rest])
    for number in range(count):

        def in_fold(text: str, number: int = number) -> bool:
            return int.from_bytes(content_key(text)[8:]) // VALIDATION % count == number

        parts = _divide(learnable, sorted(set(table.labels)), in_fold)
        if not parts.held_out.texts or not parts.train.texts:
            raise InputError(f"{len(rest)} rows are too few for {count} folds; add rows or lower --folds")
        yield parts


def _divide(table: Table, labels: list[str], held_out: Callable[[str], bool]) -> Split:
    parts = Split(Table([], []), Table([], []), Table([], []), labels)
    for text, label in zip(table.texts, table.labels, strict=True):
        part = parts.held_out if held_out(text) else parts.validation if is_validation(text) else parts.train
        part.texts.append(text)
        part.labels.append(label)
    # A category that only the validation part has would not be learnt.
    lost = set(parts.validation.labels) - set(parts.train.labels)
    if lost:
        validation = Table([], [])
        for text, label in zip(parts.validation.texts, parts.validation.labels, strict=True):
            part = parts.train if label in lost else validation
            part.texts.append(text)
            part.labels.append(label)
        parts = parts._replace(validation=validation)
    return parts
