"""Windows: a text that is longer than the token limit is read in parts, and the parts' logits are averaged.

Each part is a whole input of the encoder: [CLS], its tokens and [SEP], exactly as many tokens as the limit. Neighbours
do not overlap, except that the last part starts early enough to be full. A windowed text is its parts end to end, so
its number of tokens is a multiple of the limit.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from aisle.errors import InputError
from aisle.files import write_json

FILE = "windows.json"  # in a version's tokenizer, if it has windows
KEY = "text_windows"  # in a checkpoint's config.json
Ints = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Windows:
    """How much of a long text a model reads."""

    count: int  # the most windows that a text has; the rest of the text is cut off
    tokens: int  # of one window, [CLS] and [SEP] included

    def put_into(self, config: Any) -> None:
        """Write the windows into a model's configuration; a model with one window needs no entry."""
        if self.count > 1 or getattr(config, KEY, None):
            setattr(config, KEY, asdict(self) if self.count > 1 else None)

    @staticmethod
    def of(entry: dict[str, int] | None) -> Windows | None:
        """Return the windows of an entry `KEY` of a model's configuration; None without one: the rest is cut off.

        Raises:
            TypeError: the entry is damaged.
        """
        return Windows(**entry) if entry else None


def read_count(folder: Path) -> int:
    """Return the number of windows of a version's tokenizer.

    Raises:
        InputError: the file is damaged.
    """
    try:
        return int(json.loads((folder / FILE).read_text())["count"])
    except FileNotFoundError:
        return 1
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / FILE} is damaged: {error}; build the version again") from None


def write_count(folder: Path, count: int) -> None:
    """Write the number of windows of a version's tokenizer, unless it is 1."""
    if count > 1:
        write_json(folder / FILE, {"count": count})


def into_windows(ids: list[int], tokens: int, added: tuple[int, int]) -> list[int]:
    """Return a text's token ids as windows end to end; a text of at most `tokens` tokens stays as it is.

    Args:
        ids: the token ids of the text, with the special tokens at its start and end.
        added: the number of special tokens at the start and at the end.
    """
    if len(ids) <= tokens:
        return ids
    first, last = added
    start, end, content = ids[:first], ids[len(ids) - last :], ids[first : len(ids) - last]
    size = tokens - first - last
    places = [*range(0, len(content) - size, size), len(content) - size]
    return [token for place in places for token in (*start, *content[place : place + size], *end)]


def one_of_each(texts: list[list[int]], tokens: int, seeds: Iterable[str]) -> list[list[int]]:
    """Return one window of each text, drawn at random with the text's seed."""
    if max(map(len, texts), default=0) <= tokens:
        return texts
    return [_drawn(ids, tokens, seed) if len(ids) > tokens else ids for ids, seed in zip(texts, seeds, strict=True)]


def _drawn(ids: list[int], tokens: int, seed: str) -> list[int]:
    start = int(random.Random(seed).random() * (len(ids) // tokens)) * tokens
    return ids[start : start + tokens]


def separate(texts: Sequence[Sequence[int]], tokens: int) -> tuple[Sequence[Sequence[int]], Ints]:
    """Return the windows of all texts, and how many each text has, [texts]."""
    counts = counts_of(np.array([len(ids) for ids in texts], np.int64), tokens)
    if (counts <= 1).all():
        return texts, counts
    return [ids[start : start + tokens] for ids in texts for start in range(0, len(ids), tokens)], counts


def counts_of(lengths: Ints, tokens: int) -> Ints:
    """Return the number of windows of texts with these lengths in tokens, [texts]."""
    counts: Ints = -(-lengths // tokens)
    return counts


def averaged(values: npt.NDArray[np.float32], counts: Ints) -> npt.NDArray[np.float32]:
    """Return the mean of the windows' values, [windows, n], for each text, [texts, n]; `counts` as in `separate`."""
    if len(values) == len(counts):
        return values
    sums: npt.NDArray[np.float32] = np.add.reduceat(values, np.cumsum(counts) - counts, axis=0)
    return sums / counts[:, None].astype(np.float32)
