"""The review queue: texts that people label. One person has a text at a time; some texts need two people.

All functions work on a connection of `Store.write` or `Store.read`, and get the time as `now`, in seconds.
"""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from aisle.deploy.desk.errors import Problem
from aisle.deploy.desk.store import note, set_setting, setting
from aisle.preprocess.clean import content_key
from aisle.train.adapt.labelling_tools import Disputed, majority
from aisle.train.adapt.review import margin

SECOND_OPINIONS = 10  # one in so many texts is labelled by two people
TEAM = "team"  # setting: the names of the people who use the desk, as JSON
MOST_PEOPLE = 5  # for one text; if no more than half of them agree, it stays open as disputed
LEASE_SECONDS = 600.0  # a text goes to someone else afterwards
FIRST = -1.0  # the margin of texts that come first; rows of one margin keep their order
FEWEST_PAIRS = 10  # texts with two labels, for kappa

Kind = Literal["category", "none", "skip"]

# Whether `:person` may label a text: it still needs a label, beyond those that others are about to give.
_FREE = """items.state = 'open'
    AND NOT EXISTS (SELECT 1 FROM labels WHERE item = items.id AND person = :person)
    AND (SELECT count(*) FROM labels WHERE item = items.id AND kind != 'skip')
      + (SELECT count(*) FROM leases WHERE item = items.id AND person != :person AND until > :now) < items.wanted"""


@dataclass(frozen=True)
class Item:
    """A text to label, and what the model said when it was classified."""

    id: int
    text: str
    category: str
    confidence: float
    category_2: str | None
    confidence_2: float | None
    decision: str | None


@dataclass(frozen=True)
class Batch:
    """What one key press labelled; undo takes all of it back."""

    number: int
    items: list[int]


@dataclass(frozen=True)
class Progress:
    """How far the queue is. `open` includes `waiting` and `disputed`."""

    open: int
    done: int
    mine: int  # labels of this person
    skipped: int  # open texts that this person skipped
    waiting: int  # have a label and need another person's
    disputed: int  # labelled without a majority by `MOST_PEOPLE`, or by all people that there are


@dataclass(frozen=True)
class Agreement:
    """How often the first two people who labelled a text agree."""

    texts: int
    share: float | None
    kappa: float | None  # Cohen's; None if there are fewer than `FEWEST_PAIRS` texts, or one category only


def add(db: sqlite3.Connection, file: int, rows: Iterable[dict[str, Any]], *, ranked: bool = False) -> int:
    """Add rows of `aisle review` to the queue; return their number. A text that it has already is not added again.

    Args:
        ranked: the rows keep their order, and come before texts that are ordered by their margin.
    """
    added = 0
    for row in rows:
        key = content_key(row["text"])
        second = row.get("confidence_2")
        values = key, file, row["text"], row["category"], row["confidence"], row.get("category_2") or None, second
        order = FIRST if ranked else margin(row["confidence"], second)
        done = db.execute(
            "INSERT INTO items "
            "(key, file, text, category, confidence, category_2, confidence_2, decision, margin, wanted) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (key) DO NOTHING",
            (*values, row.get("decision") or None, order, _people(db, key)),
        )
        added += done.rowcount
    return added


def take(db: sqlite3.Connection, person: str, now: float) -> Item | None:
    """Give a person the text to label next, for `LEASE_SECONDS`: the one on the screen, else the least certain."""
    db.execute("DELETE FROM leases WHERE until <= ?", (now,))
    values = {"person": person, "now": now}
    held = f"SELECT id FROM items WHERE id IN (SELECT item FROM leases WHERE person = :person) AND {_FREE} LIMIT 1"
    least_certain = f"SELECT id FROM items WHERE {_FREE} ORDER BY margin, id LIMIT 1"
    row = db.execute(held, values).fetchone() or db.execute(least_certain, values).fetchone()
    return None if row is None else _lease(db, person, row["id"], now)


def label(db: sqlite3.Connection, person: str, items: list[int], kind: Kind, category: str | None, now: float) -> Batch:
    """Label texts as one batch, which lists those that were labelled.

    A text is left out if it is no longer open, if others have it, or if this person has labelled or skipped it.
    """
    number = int(db.execute("SELECT coalesce(max(batch), 0) + 1 FROM labels").fetchone()[0])
    done = [item for item in dict.fromkeys(items) if _is_free(db, person, item, now)]
    for item in items:
        db.execute("DELETE FROM leases WHERE item = ? AND person = ?", (item, person))
    for item in done:
        values = item, person, now, number, kind, category if kind == "category" else None
        db.execute("INSERT INTO labels (item, person, at, batch, kind, category) VALUES (?, ?, ?, ?, ?, ?)", values)
        wanted = db.execute("SELECT wanted FROM items WHERE id = ?", (item,)).fetchone()["wanted"]
        _decide(db, item, wanted)
    return Batch(number, done)


def undo(db: sqlite3.Connection, person: str, now: float) -> Item | None:
    """Take back the last batch of a person; return its first text, or another one if others have that by now.

    Raises:
        Problem: there is no batch, or a model was trained with it.
    """
    rows = db.execute(
        "SELECT labels.item, labels.kind, items.retrained, items.key FROM labels JOIN items ON items.id = labels.item "
        "WHERE person = :person AND batch = (SELECT max(batch) FROM labels WHERE person = :person) "
        "ORDER BY labels.rowid",
        {"person": person},
    ).fetchall()
    if not rows:
        raise Problem("There is nothing to undo.", 409)
    if any(row["retrained"] is not None and row["kind"] != "skip" for row in rows):
        raise Problem("A model was trained with your last label, so it cannot be undone.", 409)
    for row in rows:
        db.execute("DELETE FROM labels WHERE item = ? AND person = ?", (row["item"], person))
        if row["kind"] != "skip":
            _decide(db, row["item"], _people(db, row["key"]))
    note(db, person, "undo", kind=rows[0]["kind"], texts=len(rows))
    first = rows[0]["item"]
    return _lease(db, person, first, now) if _is_free(db, person, first, now) else take(db, person, now)


def bring_back(db: sqlite3.Connection, person: str) -> int:
    """Forget what a person skipped, so that they get it again; return the number of texts."""
    skipped = "person = ? AND kind = 'skip' AND item IN (SELECT id FROM items WHERE state = 'open')"
    return db.execute(f"DELETE FROM labels WHERE {skipped}", (person,)).rowcount


def progress(db: sqlite3.Connection, person: str) -> Progress:
    """Return how far the queue is, and how much of it this person labelled."""
    states = Counter(dict(db.execute("SELECT state, count(*) FROM items GROUP BY state").fetchall()))
    kinds = Counter(dict(db.execute("SELECT kind, count(*) FROM labels WHERE person = ? GROUP BY kind", (person,))))
    skipped = db.execute(
        "SELECT count(*) FROM labels JOIN items ON items.id = labels.item "
        "WHERE person = ? AND kind = 'skip' AND state = 'open'",
        (person,),
    ).fetchone()[0]
    half = db.execute(
        "SELECT items.wanted, count(*) AS number FROM items JOIN labels ON labels.item = items.id "
        "WHERE state = 'open' AND kind != 'skip' GROUP BY items.id"
    ).fetchall()
    disputed = sum(row["number"] >= row["wanted"] for row in half)
    done = states["agreed"] + states["none"]
    mine = kinds["category"] + kinds["none"]
    return Progress(states["open"], done, mine, skipped, len(half) - disputed, disputed)


def people(db: sqlite3.Connection) -> list[dict[str, Any]]:
    """Return each person with the number of texts that they labelled and skipped, most labels first."""
    rows = db.execute(
        "SELECT person, sum(kind != 'skip') AS labels, sum(kind = 'skip') AS skips FROM labels "
        "GROUP BY person ORDER BY labels DESC, person"
    )
    return [dict(row) for row in rows]


def agreement(db: sqlite3.Connection) -> Agreement:
    """Return how far two people agree. "None of these" counts as a category."""
    answers: dict[int, list[tuple[str, str]]] = {}
    rows = db.execute(
        "SELECT item, person, coalesce(category, '') AS category FROM labels WHERE kind != 'skip' "
        "AND item IN (SELECT item FROM labels WHERE kind != 'skip' GROUP BY item HAVING count(*) > 1) "
        "ORDER BY item, at, rowid"
    )
    for row in rows:
        answers.setdefault(row["item"], []).append((row["person"], row["category"]))
    # In the order of their names, so that with two people each of them is one rater.
    pairs = [sorted(each[:2]) for each in answers.values()]
    if not pairs:
        return Agreement(0, None, None)
    first, second = ([pair[rater][1] for pair in pairs] for rater in (0, 1))
    share = sum(one == other for one, other in zip(first, second, strict=True)) / len(pairs)
    return Agreement(len(pairs), share, _kappa(first, second))


def most_used(db: sqlite3.Connection, most: int) -> list[str]:
    """Return the categories that people chose most often, most used first."""
    query = (
        "SELECT category FROM labels WHERE kind = 'category' GROUP BY category ORDER BY count(*) DESC, category LIMIT ?"
    )
    return [str(row["category"]) for row in db.execute(query, (most,))]


def named(db: sqlite3.Connection) -> list[str]:
    """Return the categories that occur in the queue or in labels, in alphabetical order."""
    rows = db.execute(
        "SELECT category FROM items UNION SELECT category_2 FROM items UNION SELECT category FROM labels"
    ).fetchall()
    return sorted(row["category"] for row in rows if row["category"])


def free_items(db: sqlite3.Connection, person: str, now: float) -> set[int]:
    """Return the open texts that a person may label now."""
    rows = db.execute(f"SELECT id FROM items WHERE {_FREE}", {"person": person, "now": now})
    return {int(row["id"]) for row in rows}


def items(db: sqlite3.Connection, numbers: Iterable[int]) -> list[Item]:
    """Return items by their numbers, in the same order; those that do not exist are left out."""
    found = (db.execute("SELECT * FROM items WHERE id = ?", (number,)).fetchone() for number in numbers)
    return [_item(row) for row in found if row is not None]


def corrections(db: sqlite3.Connection) -> Iterator[dict[str, str]]:
    """Yield the texts that people agree on, as rows of a table to train with."""
    for row in db.execute("SELECT text, agreed FROM items WHERE state = 'agreed' ORDER BY id"):
        yield {"text": row["text"], "correct_category": row["agreed"]}


def set_team(db: sqlite3.Connection, people: Sequence[str]) -> None:
    """Say who uses the desk. One person alone gives no second opinions, and no text waits for who has left."""
    names = json.dumps(sorted(people))
    if setting(db, TEAM) == names:
        return
    set_setting(db, TEAM, names)
    for row in db.execute("SELECT id, key FROM items WHERE state = 'open' AND wanted > 1").fetchall():
        _decide(db, row["id"], _people(db, row["key"]))


def _team(db: sqlite3.Connection) -> list[str] | None:
    """Return who uses the desk; None if nobody said so."""
    names = setting(db, TEAM)
    return None if names is None else json.loads(names)


def _people(db: sqlite3.Connection, key: bytes) -> int:
    """Return how many people label a text at first. It depends on the text alone, so it is a fair sample."""
    team = _team(db)
    alone = team is not None and len(team) < 2
    return 2 if key[0] % SECOND_OPINIONS == 0 and not alone else 1


def _is_free(db: sqlite3.Connection, person: str, item: int, now: float) -> bool:
    values = {"person": person, "now": now, "item": item}
    return db.execute(f"SELECT 1 FROM items WHERE id = :item AND {_FREE}", values).fetchone() is not None


def _lease(db: sqlite3.Connection, person: str, item: int, now: float) -> Item:
    """Give a text to a person, who has no other one then."""
    db.execute("DELETE FROM leases WHERE person = ?", (person,))
    db.execute("INSERT INTO leases VALUES (?, ?, ?)", (item, person, now + LEASE_SECONDS))
    (found,) = items(db, [item])
    return found


def _decide(db: sqlite3.Connection, item: int, wanted: int) -> None:
    """Set the state of a text from its labels. If `wanted` people do not agree, one more decides, if there is one."""
    rows = db.execute("SELECT person, category FROM labels WHERE item = ? AND kind != 'skip'", (item,)).fetchall()
    state, agreed = "open", None
    if len(rows) >= wanted:
        try:
            agreed = majority([row["category"] for row in rows])
            state = "none" if agreed is None else "agreed"
        except Disputed:
            team = _team(db)
            another = team is None or bool({*team} - {row["person"] for row in rows})
            wanted = min(len(rows) + another, MOST_PEOPLE)
    values = state, agreed, wanted, item
    db.execute("UPDATE items SET state = ?, agreed = ?, wanted = ? WHERE id = ?", values)


def _kappa(first: list[str], second: list[str]) -> float | None:
    if len(first) < FEWEST_PAIRS or len({*first, *second}) == 1:
        return None
    from sklearn.metrics import cohen_kappa_score

    return float(cohen_kappa_score(first, second))


def _item(row: sqlite3.Row) -> Item:
    return Item(*(row[name] for name in Item.__dataclass_fields__))
