"""The review queue: texts that people label."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from typing import Any

from aisle.preprocess.clean import content_key

SECOND_OPINIONS = 10  # one in so many texts is labelled by two people


def add(db: sqlite3.Connection, file: int, rows: Iterable[dict[str, Any]]) -> int:
    """Add rows of `aisle review` to the queue; return their number. A text that it has already is not added again."""
    added = 0
    for row in rows:
        key = content_key(row["text"])
        second = row.get("confidence_2")
        margin = row["confidence"] - (1 - row["confidence"] if second is None else second)
        wanted = 2 if key[0] % SECOND_OPINIONS == 0 else 1
        values = key, file, row["text"], row["category"], row["confidence"], row.get("category_2") or None, second
        done = db.execute(
            "INSERT INTO items (key, file, text, category, confidence, category_2, confidence_2, margin, wanted) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (key) DO NOTHING",
            (*values, margin, wanted),
        )
        added += done.rowcount
    return added
