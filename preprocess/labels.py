"""Labels: they are kept as written; detect variants of one label, and rare labels."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aisle.errors import InputError

SEPARATOR = " > "  # between the levels of a category
BAR = "|"  # between the categories of a set
_UNSEEN = re.compile("[\\s\u00ad\u200b-\u200f\u2060\ufe00-\ufe0f\ufeff]+")


@dataclass(frozen=True)
class Labelling:
    """How the labels of a table are changed before training or measuring.

    `renamed` maps labels to new names. With `fold`, variants (labels that differ only in case, spaces or width) become
    the most frequent of them. Categories with fewer than `min_rows` rows join their parents, or are left out if they
    have none. `known` are the categories of a model: variants fold into these first.
    """

    renamed: Mapping[str, str] = field(default_factory=dict)
    fold: bool = False
    min_rows: int = 0
    known: tuple[str, ...] = ()
    multi_label: bool = False  # a label is a set of categories, as in `aisle.preprocess.label_sets`

    def apply(self, labels: Sequence[str]) -> list[str]:
        """Return the labels, renamed and, with `fold`, folded. Rare labels are not changed. No label is a set."""
        labels = [self.renamed.get(label, label) for label in labels]
        replacements = fold_variants(Counter(labels), self.known) if self.fold else {}
        return [replacements.get(label, label) for label in labels]

    def after(self, first: Labelling) -> Labelling:
        """Return a labelling that does the same as `first` followed by this one, except for rare categories."""
        renamed = {old: self.renamed.get(new, new) for old, new in first.renamed.items()}
        multi_label = self.multi_label or first.multi_label
        return Labelling({**self.renamed, **renamed}, self.fold or first.fold, multi_label=multi_label)

    def metadata(self) -> dict[str, Any]:
        """Return the entry of training.json; an empty one if labels are not changed."""
        entry = {"renamed": dict(self.renamed), "fold": self.fold, "min_rows": self.min_rows}
        if self.multi_label:
            entry["multi_label"] = True
        return {"labelling": entry} if any(entry.values()) else {}


def read_label_map(path: Path) -> dict[str, str]:
    """Read a table with the columns `from` and `to`.

    Raises:
        InputError: it cannot be read, has no row, lacks a column or a name, or renames one label twice.
    """
    from aisle.preprocess.tables.table import column, read_rows

    rows = list(read_rows(path))
    if not rows:
        raise InputError(f"{path} has no row; give the columns `from` and `to`, and a row for each label to rename")
    if not {"from", "to"} <= rows[0].keys():
        raise InputError(f"{path}: a label map has the columns `from` and `to`; this has: {', '.join(rows[0])}")
    renamed: dict[str, str] = {}
    for number, pair in enumerate(column(rows, ["from", "to"], path), start=1):
        if not all(isinstance(each, str) and each.strip() for each in pair):
            raise InputError(f"{path}, row {number}: a name is missing; give both `from` and `to`")
        old, new = (each.strip() for each in pair)
        if renamed.setdefault(old, new) != new:
            raise InputError(f"{path}, row {number}: {old!r} is already renamed to {renamed[old]!r}; keep one of them")
    return renamed


def upto(label: str, level: int) -> str:
    """Return the beginning of a category's path, with `level` names at most."""
    return SEPARATOR.join(label.split(SEPARATOR)[:level])


def variant_key(label: str) -> str:
    """Return a key that is equal for labels that differ only in case, spaces or width."""
    return _UNSEEN.sub("", unicodedata.normalize("NFKC", label)).casefold()


def variant_groups(labels: Iterable[str]) -> list[list[str]]:
    """Return the groups of labels that differ only in case, spaces or width."""
    groups = defaultdict(list)
    for label in dict.fromkeys(labels):
        groups[variant_key(label)].append(label)
    return [group for group in groups.values() if len(group) > 1]


def variants_warning(groups: list[list[str]]) -> str:
    """Return a line that names groups of variants and how to merge them."""
    shown = "; ".join(", ".join(map(repr, group)) for group in groups[:3])
    more = f"; and {len(groups) - 3} more groups" if len(groups) > 3 else ""
    return (
        f"labels that differ only in case, spaces or width are kept apart: {shown}{more}; merge them with "
        "--fold-labels or --label-map"
    )


def sets_note(labels: Iterable[str]) -> str | None:
    """Return a note that labels look like sets of categories, although each is read as one category; else None."""
    example = next((label for label in labels if BAR in label), None)
    if example is None:
        return None
    return (
        f"labels with {BAR!r}, such as {example!r}, are read as one category each; if they are several categories of a "
        "text, use aisle train --multi-label"
    )


def fold_variants(counts: Mapping[str, int], known: Sequence[str] = ()) -> dict[str, str]:
    """Return the replacement of each label that has a variant.

    That is a label among `known` if the group has one, else the most frequent label, the first of equally frequent
    ones. A label among `known` is not replaced.
    """
    replacements, of_model = {}, set(known)
    for group in variant_groups([*known, *counts]):
        kept = [label for label in group if label in of_model]
        most = max(kept or group, key=lambda label: counts.get(label, 0))
        replacements.update({label: most for label in group if label != most and label not in kept})
    return replacements


def merge_rare(
    counts: Mapping[str, int], least: int, learnable: Mapping[str, int] | None = None
) -> dict[str, str | None]:
    """Return, for each category with fewer than `least` rows, the parent that it joins; None to leave it out.

    Args:
        counts: rows of each category.
        learnable: rows of each category that training would see. A category without such a row is rare as well.
    """
    if not least:
        return {}
    rows = Counter(counts)
    seen = Counter(counts if learnable is None else learnable)
    parents: dict[str, str | None] = {}
    pending = sorted(rows, key=lambda label: -label.count(SEPARATOR))
    while pending:
        label = pending.pop(0)
        if rows[label] >= least and seen[label]:
            continue
        parent = label.rpartition(SEPARATOR)[0] or None
        parents[label] = parent
        if parent:
            if parent not in rows:
                pending.append(parent)
                pending.sort(key=lambda each: -each.count(SEPARATOR))
            rows[parent] += rows.pop(label)
            seen[parent] += seen.pop(label, 0)
    return {label: _kept_ancestor(label, parents) for label in parents if label in counts}


def _kept_ancestor(label: str, parents: Mapping[str, str | None]) -> str | None:
    """Return the first ancestor that is not rare; None if there is none."""
    ancestor: str | None = label
    while ancestor is not None and ancestor in parents:
        ancestor = parents[ancestor]
    return ancestor
