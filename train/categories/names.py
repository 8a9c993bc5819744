"""Names of categories: checks of new ones, and how an older table is read after a change."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from aisle.errors import InputError
from aisle.preprocess.clean import prepare_label
from aisle.preprocess.labels import SEPARATOR, Labelling, variant_key
from aisle.preprocess.values import TextError

Changes = Mapping[str, str]  # category -> its new name


def checked_name(raw: str) -> str:
    """Return a new category's name without spaces around it, line breaks and repeated spaces.

    Raises:
        InputError: it, or a level of its path, is empty.
    """
    try:
        name = " ".join(prepare_label(raw).split())
    except TextError as error:
        why = "is an empty name" if error.reason == "label missing" else "is not valid Unicode"
        raise InputError(f"{raw!r} {why}; give the category a name, such as 'A > B'") from None
    if "> >" in name or not all(part.strip() for part in f" {name} ".split(SEPARATOR)):
        raise InputError(f"{name!r} has an empty level; write it as 'A > B'")
    return name


def check_free(name: str, labels: Iterable[str]) -> None:
    """Check that a new name fits beside the other categories.

    Raises:
        InputError: a category has this name or a variant of it, or lies below it.
    """
    for label in labels:
        if label == name:
            raise InputError(f"there is already a category {name!r}; choose another name, or see: aisle category merge")
        if variant_key(label) == variant_key(name):
            raise InputError(f"{name!r} differs from {label!r} only in case, spaces or width; choose another name")
        if label.startswith(name + SEPARATOR):
            raise InputError(f"{name!r} is the level above {label!r}; name a category below it: '{name}{SEPARATOR}…'")


def check_known(name: str, labels: Sequence[str]) -> None:
    """Check that a category exists.

    Raises:
        InputError: it does not; the message suggests the nearest name.
    """
    if name in labels:
        return
    below = below_path(name, labels)
    if below:
        raise InputError(
            f"{name!r} is not a category but the level above {len(below)} of them, such as {below[0]!r}; rename the "
            "level with aisle category move"
        )
    raise unknown(name, labels)


def unknown(name: str, names: Iterable[str]) -> InputError:
    """Return the error for an unknown name, with the nearest of `names`."""
    near = difflib.get_close_matches(name, [*names], 1, 0.5)
    meant = f"did you mean {near[0]!r}?" if near else "labels.json in the checkpoint lists its categories"
    return InputError(f"there is no category {name!r}; {meant}")


def below_path(path: str, labels: Iterable[str]) -> list[str]:
    """Return the category of this name, and those below it."""
    return [label for label in labels if label == path or label.startswith(path + SEPARATOR)]


def upper_paths(labels: Iterable[str]) -> set[str]:
    """Return the levels above categories."""
    paths = [label.split(SEPARATOR) for label in labels]
    return {SEPARATOR.join(path[:length]) for path in paths for length in range(1, len(path))}


def changed(labels: Iterable[str], changes: Changes) -> list[str]:
    """Return the categories after a change, in the same order; of merged ones only the first place stays."""
    return list(dict.fromkeys(changes.get(label, label) for label in labels))


def labelling_after(before: Labelling, cleaning: Mapping[str, Any], changes: Changes) -> Labelling:
    """Return how an older table's labels are read after categories got new names.

    Variants and rare categories, which became part of a category in training, become part of it under its new name.

    Args:
        before: how they were read until now.
        cleaning: the report of the cleaning in training; empty if there was none.

    Raises:
        InputError: rows of the older table have a new name already, and belong to another category.
    """
    part_of = parts_of(cleaning)
    names = {**changes, **{name: changes[label] for name, label in part_of.items() if label in changes}}
    after = replace(Labelling(names).after(before), min_rows=before.min_rows)
    for name in changes.values():
        check_unused(name, after, {part: label for part, label in part_of.items() if label not in changes})
    return after


def check_unused(name: str, labelling: Labelling, part_of: Mapping[str, str]) -> None:
    """Check that the rows of a table with this label do not belong to another category.

    Raises:
        InputError: they do.
    """
    other = labelling.renamed.get(name, part_of.get(name, name))
    if other != name:
        raise InputError(f"rows called {name!r} in the training table belong to {other!r}; choose another name")


def parts_of(cleaning: Mapping[str, Any]) -> dict[str, str]:
    """Return the labels of a table that became part of another category in its cleaning: variants, rare categories."""
    folded, merged = cleaning.get("folded", {}), cleaning.get("merged", {})
    return {name: merged.get(folded.get(name, name), folded.get(name, name)) for name in {**folded, **merged}}
