"""Similar rows: open texts that share many groups of characters with one text, so that they are labelled in one go."""

from __future__ import annotations

import sqlite3
import threading
from typing import Any

from aisle.deploy.desk.queue import Item, free_items, items

MOST = 10  # similar texts
LEAST_COSINE = 0.5
READ = 500  # characters of a text
# `char_wb` takes groups within words. A Chinese text without spaces is one word, so it works for both.
GROUPS = {"analyzer": "char_wb", "ngram_range": (2, 3)}


class Similar:
    """Finds similar open texts. It keeps the groups of each text, so that only new texts are read."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._place: dict[int, int] = {}  # of an item in the matrix
        self._matrix: Any = None  # a row of unit length for each item

    def find(self, db: sqlite3.Connection, person: str, item: int, now: float) -> list[Item]:
        """Return up to `MOST` texts that this person may label, most similar first; none if the item is not open."""
        free = free_items(db, person, now) - {item}
        texts = dict(db.execute("SELECT id, text FROM items WHERE state = 'open'").fetchall())
        if item not in texts or not free:
            return []
        with self._lock:
            self._read(texts)
            place, matrix = self._place, self._matrix
        cosines = (matrix @ matrix[place[item]].T).toarray().ravel()
        near = [(-cosines[place[each]], each) for each in free if cosines[place[each]] >= LEAST_COSINE]
        return items(db, [each for _, each in sorted(near)[:MOST]])

    def _read(self, texts: dict[int, str]) -> None:
        """Add the texts that are new; leave out those that are no longer open once they are the larger part."""
        from scipy.sparse import vstack
        from sklearn.feature_extraction.text import HashingVectorizer

        if len(self._place) > 2 * len(texts):
            self._place, self._matrix = {}, None
        new = [each for each in texts if each not in self._place]
        if not new:
            return
        read = HashingVectorizer(**GROUPS, alternate_sign=False).transform(texts[each][:READ] for each in new)
        start = len(self._place)
        # New objects, because other threads may be using the old ones.
        self._matrix = read if self._matrix is None else vstack([self._matrix, read], format="csr")
        self._place = {**self._place, **{each: start + order for order, each in enumerate(new)}}
