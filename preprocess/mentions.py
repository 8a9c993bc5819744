"""Values of a column that are mentioned in texts, and how often a mention is right.

A value is looked for as whole words. In Chinese and Japanese, each character is a word. It is used only if it proves
itself on the texts whose value is known: of those that contain it, it must be right in more than `LEAST`, by a lower
bound with error `ERROR`. A mention inside a longer value that is used does not count. If a text mentions several values
that are used, the one that contains the others is its value. If there is none, the text has no value.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from aisle.preprocess.binomial import lowest_share
from aisle.preprocess.clean import clean
from aisle.preprocess.han import HAN

LEAST = 0.8  # of the texts that contain a value, the share in which it must be right
ERROR = 0.05  # of each lower bound
FOLDS = 5  # of the held-out estimate
SHORTEST = 2  # characters of a value to look for
LONGEST = 32  # words of it
SHOWN = 100  # values in the figures: of those that are used, and of those that are not
MISSING, DISPUTED, OTHER = -1, -2, -3  # instead of the number of a value; OTHER: the cell is no text and no number

_KANA = "\u3040-\u30ff"
_WORD = re.compile(rf"[{HAN}{_KANA}]|[^\W_{HAN}{_KANA}]+")

Integers = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


class Values(NamedTuple):
    """The values of a column."""

    of_row: Integers  # [rows], the number of the value, or MISSING or OTHER
    written: list[Any]  # [values], the most frequent spelling
    spellings: list[tuple[str, int, int]]  # text, number of the value, rows


def agreed(value: Integers, group: Integers, without_own: bool) -> Integers:
    """Return the value of each row's group: MISSING if none of its rows has one, DISPUTED if they differ. [rows]

    Args:
        group: [rows], numbers; rows with a negative number have no group, and their answer means nothing.
        without_own: a row's own value does not count. This is how well a hidden value would have been filled.
    """
    known = np.flatnonzero((value >= 0) & (group >= 0))
    count = int(value.max(initial=0)) + 1
    pairs, pair, rows = np.unique(group[known] * count + value[known], return_inverse=True, return_counts=True)
    groups = int(group.max(initial=0)) + 1
    distinct = np.bincount(pairs // count, minlength=groups)[group]
    # If a group has one value, the sum of its different values is this value.
    total = np.bincount(pairs // count, pairs % count, minlength=groups).astype(np.int64)[group]
    if without_own:
        alone = known[rows[pair] == 1]
        distinct[alone] -= 1
        total[alone] -= value[alone]
    return np.where(distinct == 0, MISSING, np.where(distinct == 1, total, DISPUTED))


class Proof(NamedTuple):
    """How patterns did on the texts whose value is known."""

    right: Integers  # [patterns], texts in which it is the value
    total: Integers  # [patterns], texts that contain it, but not inside a longer pattern that is used
    used: list[bool]  # [patterns]


class Mentions:
    """Finds the values of a column in texts, and learns which of them are right where they are found.

    What is found in a text is a set of patterns. Many texts have the same set, so each set is kept and judged once.
    """

    def __init__(self, values: Values, first: Integers, product: Integers) -> None:
        """Prepare the search.

        Args:
            first: [rows], the place of the first row with the same content.
            product: [rows], the product of each row. Its texts are in the same fold, so that none proves another.
        """
        self._first = first
        self._known = agreed(values.of_row, first, without_own=False)
        self._fold = np.random.default_rng(0).integers(0, FOLDS, int(product.max(initial=0)) + 1)[product]
        self._names = values.written
        self._patterns, self._value = _patterns(values.spellings)
        self._padded = [f" {pattern} " for pattern in self._patterns]
        self._lengths = _lengths(self._patterns)
        self._sets: dict[tuple[int, ...], int] = {}
        self._set_of_row = np.zeros(len(first), np.int64)
        self._evidence: dict[int, Counter[tuple[int, int]]] = {}  # set -> known value and fold -> texts

    def read(self, texts: Iterable[tuple[int, str]]) -> None:
        """Read the first text of each content."""
        for place, text in texts:
            found = self._sets.setdefault(self._find(text), len(self._sets))
            self._set_of_row[place] = found
            if self._known[place] != MISSING:
                self._evidence.setdefault(found, Counter())[int(self._known[place]), int(self._fold[place])] += 1
        self._set_of_row = self._set_of_row[self._first]

    def _find(self, text: str) -> tuple[int, ...]:
        words = _WORD.findall(text.casefold())
        found = set()
        for start, word in enumerate(words):
            for length in self._lengths.get(word, ()):
                pattern = self._patterns.get(" ".join(words[start : start + length]))
                if pattern is not None:
                    found.add(pattern)
        return tuple(sorted(found))

    def prove(self, left_out: int | None = None) -> Proof:
        """Count on the texts of all folds but one. Longer patterns are judged first."""
        right, total = np.zeros((2, len(self._value)), np.int64)
        proof = Proof(right, total, [False] * len(self._value))
        by_length: dict[int, list[tuple[int, tuple[int, ...], int]]] = {}
        for found, number in self._sets.items():
            for pattern in found if number in self._evidence else ():
                by_length.setdefault(self._padded[pattern].count(" "), []).append((pattern, found, number))
        for length in sorted(by_length, reverse=True):
            for pattern, found, number in by_length[length]:
                if not any(proof.used[p] and self._inside(pattern, p) for p in found):
                    self._count(proof, pattern, number, left_out)
            judged = sorted({pattern for pattern, _, _ in by_length[length]})
            for pattern, bound in zip(judged, _bound(proof.right[judged], proof.total[judged]), strict=True):
                proof.used[pattern] = bool(bound > LEAST)
        return proof

    def _count(self, proof: Proof, pattern: int, number: int, left_out: int | None) -> None:
        for (value, fold), texts in self._evidence[number].items():
            if fold != left_out:
                proof.total[pattern] += texts
                proof.right[pattern] += texts * (self._value[pattern] == value)

    def _inside(self, pattern: int, other: int) -> bool:
        return pattern != other and self._padded[pattern] in self._padded[other]

    def _answers(self, used: Sequence[bool]) -> list[int]:
        """Return the value of each set of patterns: MISSING if none of them is used, DISPUTED if they differ. [sets]"""
        return [self._answer([pattern for pattern in found if used[pattern]]) for found in self._sets]

    def _answer(self, found: list[int]) -> int:
        if not found:
            return MISSING
        longest = max(found, key=lambda pattern: len(self._padded[pattern]))
        value = self._value[longest]
        return value if all(self._value[p] == value or self._inside(p, longest) for p in found) else DISPUTED

    def answers(self, proof: Proof) -> Integers:
        """Return the value that each row's text mentions, MISSING if none is used, or DISPUTED. [rows]"""
        return np.array(self._answers(proof.used), np.int64)[self._set_of_row]

    def held_out(self) -> dict[str, Any]:
        """Return how often a known value is filled from its text, and right, as proven on the other folds."""
        hidden = filled = right = 0
        for fold in range(FOLDS):
            answers = self._answers(self.prove(fold).used)
            for number, counts in self._evidence.items():
                for (value, own), texts in counts.items():
                    if own == fold and value >= 0:
                        hidden += texts
                        filled += texts * (answers[number] >= 0)
                        right += texts * (answers[number] == value)
        return precision(hidden, filled, right)

    def figures(self, proof: Proof, wanted: Mask, filled: Integers) -> list[dict[str, Any]]:
        """Return the figures of the values that the rows `wanted` mention: those used, then others, the most frequent.

        Args:
            filled: [rows], the values that are filled.
        """
        rows: Counter[int] = Counter()
        sets = np.bincount(self._set_of_row[wanted], minlength=len(self._sets)).tolist()
        for found, count in zip(self._sets, sets, strict=True):
            rows.update(dict.fromkeys(found, count))
        fills = Counter(filled[wanted].tolist())
        shown = [pattern for pattern, count in rows.most_common() if count]
        used = [pattern for pattern in shown if proof.used[pattern]][:SHOWN]
        others = [pattern for pattern in shown if not proof.used[pattern]][:SHOWN]
        bounds = _bound(proof.right, proof.total)
        return [
            {
                "value": self._names[self._value[p]],
                "texts": int(proof.total[p]),
                "right": int(proof.right[p]),
                "at_least": float(bounds[p]),
                "used": proof.used[p],
                "mentions": rows[p],
                "filled": fills[self._value[p]] if proof.used[p] else 0,
            }
            for p in [*used, *others]
        ]


def _patterns(spellings: Sequence[tuple[str, int, int]]) -> tuple[dict[str, int], list[int]]:
    """Return the number of each pattern, a value as words with spaces between, and the value of each pattern.

    Of several values with the same words, such as C and C++, the most frequent is looked for.
    """
    best: dict[str, tuple[int, int]] = {}
    for text, value, rows in spellings:
        words = _WORD.findall(clean(text).casefold())
        if len(words) <= LONGEST and sum(map(len, words)) >= SHORTEST:
            pattern = " ".join(words)
            best[pattern] = max(best.get(pattern, (0, 0)), (rows, -value))
    return {pattern: number for number, pattern in enumerate(best)}, [-value for _, value in best.values()]


def _lengths(patterns: Iterable[str]) -> dict[str, list[int]]:
    """Return, for the first word of patterns, their lengths in words."""
    lengths: dict[str, set[int]] = {}
    for pattern in patterns:
        words = pattern.split(" ")
        lengths.setdefault(words[0], set()).add(len(words))
    return {word: sorted(each) for word, each in lengths.items()}


def _bound(right: Integers, total: Integers) -> npt.NDArray[np.floating[Any]]:
    return lowest_share(right, total, ERROR)


def precision(hidden: int, filled: int, right: int) -> dict[str, Any]:
    """Return the figures of an estimate: how many known values were hidden, filled, and filled with the right value."""
    share = right / filled if filled else None
    at_least = float(lowest_share(right, filled, ERROR)) if filled else None
    return {"hidden": hidden, "filled": filled, "right": right, "precision": share, "at_least": at_least}
