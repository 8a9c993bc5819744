"""Split labelled rows into a training, a validation and a held-out part, by a hash of the text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from aisle.errors import InputError
from aisle.preprocess.clean import LabelledTexts, content_key

if TYPE_CHECKING:
    from aisle.train.core.head_data import HeadData

HELD_OUT = 5  # one text in five is held out from training
VALIDATION = 10  # of the others, one in ten is for validation: it decides when to stop, and no score is reported on it


class Split(NamedTuple):
    train: LabelledTexts
    validation: LabelledTexts
    held_out: LabelledTexts
    labels: list[str]
    groups: Mapping[bytes, str] = MappingProxyType({})  # content key -> group, if groups are learnt too
    heads: tuple[HeadData, ...] = ()  # further heads that are learnt


def is_held_out(text: str) -> bool:
    """Return whether a cleaned text belongs to the held-out fifth.

    Only its content decides, so equal texts are in the same part, in any file and any order.
    """
    return int.from_bytes(content_key(text)[:8]) % HELD_OUT == 0


def is_validation(text: str) -> bool:
    """Return whether a cleaned text that is not held out belongs to the validation tenth."""
    return int.from_bytes(content_key(text)[8:]) % VALIDATION == 0


def is_learnt(text: str) -> bool:
    """Return whether a cleaned text is used for training. A category without such a text cannot be learnt."""
    return not is_held_out(text)


def split(table: LabelledTexts) -> Split:
    """Split by content.

    Raises:
        InputError: fewer than two categories are left, or one has a single row or none to train on.
    """
    counts = table.counts()
    if len(counts) < 2:
        left = "".join(f"only category {label!r} is" for label in counts) or "no row is"
        raise InputError(f"{left} left after cleaning; training needs at least two categories")
    single = sorted(label for label, rows in counts.items() if rows == 1)
    if single:
        others = f" (and {len(single) - 1} more)" if len(single) > 1 else ""
        raise InputError(
            f"category {single[0]!r}{others} has only one row after cleaning; a category needs two or more: "
            "add rows, or give --min-rows 2"
        )
    parts = _divide(table, sorted(counts), is_held_out)
    lost = sorted(counts.keys() - parts.train.counts().keys())
    if lost:
        raise InputError(
            f"category {lost[0]!r} has {counts[lost[0]]} row(s), none to train on; add rows, or give --min-rows 2"
        )
    if not parts.held_out.texts:
        raise InputError(f"{len(table.texts)} rows are too few to hold out a fifth; add rows")
    return parts


def folds(table: LabelledTexts, count: int) -> Iterator[Split]:
    """Yield `count` splits for cross-validation, each with another part held out.

    No split contains the held-out fifth. If all rows of a category are in the part that a fold holds out, that fold
    cannot learn it, and the rows count as errors.

    Raises:
        InputError: `count` is below two, or a part is empty.
    """
    if count < 2:
        raise InputError("cross-validation takes two folds or more")
    rest = [(text, label) for text, label in zip(table.texts, table.labels, strict=True) if not is_held_out(text)]
    learnable = LabelledTexts([text for text, _ in rest], [label for _, label in rest])
    for number in range(count):

        def in_fold(text: str, number: int = number) -> bool:
            return int.from_bytes(content_key(text)[8:]) // VALIDATION % count == number

        parts = _divide(learnable, sorted(set(table.labels)), in_fold)
        if not parts.held_out.texts or not parts.train.texts:
            raise InputError(f"{len(rest)} rows are too few for {count} folds; add rows or lower --folds")
        yield parts


def _divide(table: LabelledTexts, labels: list[str], held_out: Callable[[str], bool]) -> Split:
    parts = Split(table.like([], []), table.like([], []), table.like([], []), labels)
    for text, label in zip(table.texts, table.labels, strict=True):
        part = parts.held_out if held_out(text) else parts.validation if is_validation(text) else parts.train
        part.texts.append(text)
        part.labels.append(label)
    # A category that only the validation part has would not be learnt.
    lost = parts.validation.counts().keys() - parts.train.counts().keys()
    if lost:
        validation = table.like([], [])
        for text, label in zip(parts.validation.texts, parts.validation.labels, strict=True):
            part = validation if lost.isdisjoint(table.categories_of(label)) else parts.train
            part.texts.append(text)
            part.labels.append(label)
        parts = parts._replace(validation=validation)
    return parts
