"""The columns of a table that further heads learn: which value of an attribute each text has."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from aisle.errors import InputError
from aisle.preprocess.clean import LabelledTexts, clean_rows, content_key, prepare
from aisle.preprocess.fields import columns_of
from aisle.preprocess.labels import Labelling
from aisle.preprocess.tables.table import column, read_rows
from aisle.preprocess.values import TextError
from aisle.train.core.heads import Head
from aisle.train.core.split import Split, is_learnt, is_validation

OPTION = "--also"
NONE = -1  # the number of a missing value
LONGEST = 64  # characters of a name
# Outputs of the server, and columns that `aisle classify FILE` writes.
TAKEN = {
    *("category", "confidence", "unknown", "logits", "embedding", "version", "model", "text", "warning", "error"),
    *("decision", "decided", "prediction_set", "energy", "attribute", "attribute_value", "attribute_confidence"),
}
_RANKED = re.compile(r"(?:category|confidence)_\d+")
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


class HeadData(NamedTuple):
    """What a head is taught."""

    head: Head
    value_of: Mapping[bytes, str]  # content key of a text -> its value; a text without one teaches the head nothing

    def numbers(self, texts: Iterable[str]) -> list[int]:
        """Return the number of each text's value, and `NONE` for a text without one."""
        number = {label: i for i, label in enumerate(self.head.labels)}
        return [number.get(self.value_of.get(content_key(text), ""), NONE) for text in texts]


def check_names(also: Sequence[str], text_column: str, label_column: str) -> None:
    """Check that columns can be attributes: each is written as a column of its name, and one with `_confidence`.

    Raises:
        InputError: a name is given twice, is that of the label or a text, is taken, or cannot be used.
    """
    for place, name in enumerate(also):
        problem = ""
        if name in also[:place]:
            problem = "it is given twice; give it once"
        elif name == label_column:
            problem = "this is the column of the category, which is learnt already; name another column"
        elif name in columns_of(text_column):
            problem = "this column is in the text, where the answer could be read; name another column"
        elif not name.strip() or name != name.strip() or len(name) > LONGEST or _UNPRINTABLE.search(name):
            problem = f"a name has 1 to {LONGEST} characters, no control characters and no space at an end; rename it"
        elif name in TAKEN or _RANKED.fullmatch(name):
            problem = "the server or aisle classify has an output of this name; rename the column"
        elif name.removesuffix("_confidence") != name and name.removesuffix("_confidence") in {*also, *TAKEN}:
            problem = f"this is the name of a confidence, that of {name.removesuffix('_confidence')!r}; rename it"
        if problem:
            raise InputError(f"{OPTION} {name}: {problem}")


def read_heads(
    data: Path, text_column: str, also: Sequence[str], table: LabelledTexts, labelling: Labelling, option: str = OPTION
) -> tuple[HeadData, ...]:
    """Read the attributes of the texts of a cleaned table.

    The values of an attribute are cleaned as categories are: `labelling` folds variants and leaves out rare values,
    conflicting values of one text are dropped, and so are empty ones.

    Args:
        option: what named the columns, for a message.

    Raises:
        InputError: a column is missing, or a head cannot be learnt: it has fewer than two values, or one with a single
            row or none to train on.
    """
    texts = {content_key(text) for text in table.texts}
    # Names of categories say nothing about an attribute's values.
    own = replace(labelling, renamed={}, multi_label=False, known=())
    found = []
    for name in also:
        rows = _known_rows(read_values(data, text_column, name, option), texts)
        values, _ = clean_rows(rows, own, learnable=_is_trained)
        _check_values(name, values)
        value_of = {content_key(text): value for text, value in zip(values.texts, values.labels, strict=True)}
        found.append(HeadData(Head(name, tuple(sorted(values.counts()))), value_of))
    return tuple(found)


def read_values(data: Path, text_column: str, name: str, option: str) -> Iterator[tuple[object, object]]:
    """Yield the text and the attribute of each row.

    Raises:
        InputError: the table has no such column.
    """
    names = [text_column, name]
    for text, value in column(read_rows(data, [*columns_of(text_column), name]), names, data, option):
        yield text, value


def _known_rows(rows: Iterable[tuple[object, object]], texts: AbstractSet[bytes]) -> Iterator[tuple[object, object]]:
    """Yield the rows whose text is among those with these content keys."""
    for raw, value in rows:
        try:
            text = prepare(raw)
        except TextError:
            continue
        if content_key(text) in texts:
            yield text, value


def _is_trained(text: str) -> bool:
    return is_learnt(text) and not is_validation(text)


def _check_values(name: str, values: LabelledTexts) -> None:
    """Check that each value can be learnt, as `aisle.train.core.split.split` checks categories."""
    counts = values.counts()
    if len(counts) < 2:
        left = "".join(f"only the value {value!r} is" for value in counts) or "no value is"
        raise InputError(f"{OPTION} {name}: {left} left after cleaning; an attribute needs at least two values")
    trained = Counter(value for text, value in zip(values.texts, values.labels, strict=True) if _is_trained(text))
    for value, rows in sorted(counts.items(), key=lambda each: (each[1], each[0])):
        if rows == 1 or not trained[value]:
            others = sum(count == 1 or not trained[each] for each, count in counts.items()) - 1
            more = f" (and {others} more)" if others else ""
            problem = "has only one row" if rows == 1 else f"has {rows} rows, none to train on,"
            raise InputError(
                f"{OPTION} {name}: value {value!r}{more} {problem} after cleaning; add rows, or give --min-rows 2, "
                "which leaves such values out"
            )


def notes_of(parts: Split) -> list[str]:
    """Return a line for each head: how many values it has, and how many texts teach it."""
    notes = []
    for each in parts.heads:
        known = sum(number != NONE for number in each.numbers(parts.train.texts))
        notes.append(f"attribute {each.head.name}: {len(each.head.labels)} values, {known} texts to train on")
    return notes
