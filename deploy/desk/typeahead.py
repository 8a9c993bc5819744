"""Type-ahead: find a category among ten thousand by words of any level of its path."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from aisle.preprocess.labels import SEPARATOR

MOST = 20  # categories that are found


class Catalogue:
    """Categories, prepared for searching."""

    def __init__(self, categories: list[str]) -> None:
        self.categories = categories
        self._names = frozenset(categories)
        self._folded = [(each, _folded(each), _folded(each).split(SEPARATOR)) for each in sorted(categories)]

    def __contains__(self, category: str) -> bool:
        return category in self._names

    def search(self, query: str, used: Sequence[str], most: int = MOST) -> list[str]:
        """Return the categories that contain all words of a query, in any order.

        Those in `used` come first, in its order. Then come those where every word begins a level, then all others.
        """
        words = [word for word in _folded(query).split() if word != SEPARATOR.strip()]
        rank = {category: order for order, category in enumerate(used)}
        found = [
            (rank.get(category, len(rank)), not _begins(words, levels), category)
            for category, folded, levels in self._folded
            if all(word in folded for word in words)
        ]
        return [category for _, _, category in sorted(found)[:most]]


def _folded(text: str) -> str:
    """Return a text without differences of case and width."""
    return unicodedata.normalize("NFKC", text).casefold()


def _begins(words: list[str], levels: list[str]) -> bool:
    return all(any(level.startswith(word) for level in levels) for word in words)
