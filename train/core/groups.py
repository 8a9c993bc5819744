"""Groups of texts with one meaning, such as the offers of one product in several shops: a column of the table."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from aisle.errors import InputError
from aisle.preprocess.clean import content_key, prepare, prepare_label
from aisle.preprocess.tables.table import column, read_rows
from aisle.preprocess.values import TextError
from aisle.train.core.split import Split

HELD_OUT = 5  # one group in five is held out: no pair of its texts is learnt
VALIDATION = 10  # of the others, one in ten is for validation


def is_held_out_group(group: str) -> bool:
    """Return whether a group is held out, to measure search. Only its name decides, in any table."""
    return _hash(group) % HELD_OUT == 0


def is_validation_group(group: str) -> bool:
    """Return whether a group that is not held out is for validation."""
    return _hash(group) // HELD_OUT % VALIDATION == 0


def _hash(group: str) -> int:
    return int.from_bytes(hashlib.blake2b(group.encode(), digest_size=8).digest())


def read_groups(
    data: Path, text_column: str, group_column: str, options: str = "--text-column or --contrastive"
) -> dict[bytes, str]:
    """Return the group of each text of a table, by the text's content key.

    A text without a group, or in two groups, is left out.

    Args:
        options: what named the columns, for a message.

    Raises:
        InputError: the table cannot be read, or has no such column.
    """
    found: dict[bytes, str] = {}
    ambiguous: set[bytes] = set()
    names = [text_column, group_column]
    for raw, raw_group in column(read_rows(data, names), names, data, options):
        try:
            key, group = content_key(prepare(raw)), prepare_label(raw_group)
        except TextError:
            continue
        if found.setdefault(key, group) != group:
            ambiguous.add(key)
    return {key: group for key, group in found.items() if key not in ambiguous}


def check_groups(groups: Mapping[bytes, str], parts: Split, name: str) -> None:
    """Check that a split can teach groups.

    Args:
        name: of the column, for the message.

    Raises:
        InputError: fewer than two groups have two texts to learn from.
    """
    texts = Counter(groups.get(content_key(text)) for text in parts.train.texts)
    learnt = [group for group, count in texts.items() if group and count > 1 and is_learnt_group(group)]
    if len(learnt) < 2:
        problem = "no two training texts have" if not learnt else "all pairs of training texts have"
        raise InputError(
            f"--contrastive {name}: {problem} the same {name}; name a column in which texts of one product have the "
            "same value, and those of others another, or leave it out"
        )


def is_learnt_group(group: str) -> bool:
    """Return whether the pairs of a group are learnt."""
    return not is_held_out_group(group) and not is_validation_group(group)
