"""The answer cache: a text with the same token ids as an earlier text is not computed again."""

from __future__ import annotations

import os
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.integer[Any]]
CACHE_MB = "AISLE_CACHE_MB"  # environment variable with the budget, which `aisle serve` sets for its steps
ENTRY_OVERHEAD = 48  # bytes per entry that the allocator needs beyond what Python reports, measured
PAIR = np.dtype([("index", np.int32), ("confidence", np.float32)])  # one category of an answer
# What an answer with decisions has before its categories.
DECISION = np.dtype([("outcome", np.int32), ("category", np.int32), ("set_size", np.int32), ("energy", np.float32)])


class Kind(NamedTuple):
    """A kind of answer, which has entries of its own."""

    suffix: bytes  # ends the keys of its entries; the ids before it are a multiple of four bytes
    head: int  # bytes of an entry before its categories


PLAIN = Kind(b"", 0)  # the best k categories
DECIDED = Kind(b"d", DECISION.itemsize)  # with decisions
REACHED = Kind(b"r", 0)  # the categories of a multi-label version that reach their thresholds: an entry has all of them


class AnswerCache:
    """A bounded least-recently-used map from the token ids of a text to its ranked categories. Thread-safe.

    It holds answers, never errors. An entry holds as many categories as the largest `k` requested for its text so far,
    so it also answers every smaller `k`. Entries with decisions also hold the categories of the prediction set.
    """

    def __init__(self, budget: int) -> None:
        """Create an empty cache of at most `budget` bytes, including Python's overhead; 0 turns it off."""
        self._budget = budget
        self._rows: OrderedDict[bytes, bytes] = OrderedDict()
        self._payload = 0  # bytes of the entries
        self._lock = threading.Lock()

    @staticmethod
    def of_environment() -> AnswerCache:
        return AnswerCache(int(os.environ.get(CACHE_MB, "0")) << 20)

    def __bool__(self) -> bool:
        """Return whether the cache is turned on."""
        return self._budget > 0

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def size(self) -> int:
        """Bytes of memory that the cache uses."""
        return self._payload + sys.getsizeof(self._rows)

    def find(self, keys: Iterable[bytes], k: int, *, kind: Kind = PLAIN) -> dict[bytes, bytes]:
        """Return the entries of those texts whose best `k` categories are in the cache, in answers of a kind."""
        found: dict[bytes, bytes] = {}
        wanted = k * PAIR.itemsize + kind.head
        with self._lock:
            for key in keys:
                row = self._rows.get(key + kind.suffix)
                if row is not None and len(row) >= wanted:
                    self._rows.move_to_end(key + kind.suffix)
                    found[key] = row
        return found

    def put(self, rows: Mapping[bytes, bytes], *, kind: Kind = PLAIN) -> int:
        """Store answers; return how many older answers were dropped to make room.

        Args:
            rows: entries made by `rows_of` or, if `DECIDED`, by `aisle.deploy.serving.decider.Decider.entries`.
        """
        evicted = 0
        with self._lock:
            for text, row in rows.items():
                key = text + kind.suffix
                old = self._rows.get(key)
                if old is None:
                    self._payload += _bytes(key) + _bytes(row) + ENTRY_OVERHEAD
                elif len(old) < len(row):
                    self._payload += _bytes(row) - _bytes(old)
                else:
                    continue
                self._rows[key] = row
            while self._rows and self.size > self._budget:
                key, row = self._rows.popitem(last=False)
                self._payload -= _bytes(key) + _bytes(row) + ENTRY_OVERHEAD
                evicted += 1
        return evicted


def _bytes(value: bytes) -> int:
    return sys.getsizeof(value) + 15 & ~15  # Python's allocator rounds up to 16 bytes


def keys_of(tokens: Ints, lengths: Ints) -> list[bytes]:
    """Return a key for each text.

    Args:
        tokens: the concatenated token ids of the texts, [sum of lengths].
        lengths: [texts].
    """
    content = tokens.tobytes()
    ends = [0, *(np.cumsum(lengths) * tokens.itemsize).tolist()]
    return [content[start:stop] for start, stop in pairwise(ends)]


def rows_of(keys: Sequence[bytes], pairs: npt.NDArray[Any]) -> dict[bytes, bytes]:
    """Return the cache entries of texts.

    Args:
        keys: the keys of the texts, all different.
        pairs: their ranked categories, [texts, k] of `PAIR`.
    """
    content, width = pairs.tobytes(), pairs.shape[1] * PAIR.itemsize
    return {key: content[row * width : (row + 1) * width] for row, key in enumerate(keys)}


def read_rows(keys: Sequence[bytes], rows: Mapping[bytes, bytes], k: int, start: int = 0) -> npt.NDArray[Any]:
    """Return the best `k` categories of each text, [texts, k] of `PAIR`, from entries that hold at least `k`.

    Args:
        start: the byte of an entry at which its categories begin.
    """
    end = start + k * PAIR.itemsize
    return np.frombuffer(b"".join([rows[key][start:end] for key in keys]), PAIR).reshape(len(keys), k)
