"""Further heads on one encoder: each gives a text an attribute, such as its brand, beside its category.

The logits of all heads follow those of the categories, so engines, quantization and packing only see wider logits. In a
checkpoint, the rows of the heads lie apart, and the rest is a plain classifier of transformers. This file needs no
PyTorch; `aisle.train.core.head_rows` has the weights.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from aisle.errors import InputError
from aisle.files import write_json

FILE = "heads.json"  # in a checkpoint and in a version: {"brand": ["Bosch", …], …}, in the order of the logits


class Head(NamedTuple):
    """A further head: the name of its attribute, and the attribute's values in the order of its logits."""

    name: str
    labels: tuple[str, ...]


Heads = tuple[Head, ...]


def spans(categories: int, heads: Sequence[Head]) -> list[slice]:
    """Return which logits each head has, in logits [texts, categories + all values]."""
    found, start = [], categories
    for head in heads:
        found.append(slice(start, start + len(head.labels)))
        start += len(head.labels)
    return found


def width(heads: Sequence[Head]) -> int:
    """Return the number of logits of all heads."""
    return sum(len(head.labels) for head in heads)


def save_heads(folder: Path, heads: Sequence[Head]) -> None:
    """Write heads.json."""
    write_json(folder / FILE, {head.name: head.labels for head in heads})


def load_heads(folder: Path) -> Heads:
    """Read heads.json of a checkpoint or version; no head if there is none.

    Raises:
        InputError: it is damaged.
    """
    try:
        found = json.loads((folder / FILE).read_text("utf-8"))
        heads = tuple(Head(name, tuple(labels)) for name, labels in found.items())
        valid = heads and all(len(labels) > 1 and all(isinstance(each, str) for each in labels) for _, labels in heads)
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{folder}/{FILE} is damaged: {error}") from None
    if not valid:
        raise InputError(f"{folder}/{FILE} is damaged: it must name attributes, each with two or more values")
    return heads
