"""The desk's SQLite file: tables of texts, jobs, the review queue, labels, and who did what."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from aisle.errors import InputError

VERSION = 1  # of the schema
FOLDER = "folder"  # setting: where the desk's files were at the last start
WAIT_SECONDS = 30.0  # for another writer

SCHEMA = (
    """CREATE TABLE files (
        id INTEGER PRIMARY KEY, name TEXT NOT NULL, source TEXT NOT NULL, person TEXT NOT NULL, at REAL NOT NULL,
        text_column TEXT, output TEXT, job INTEGER, queued INTEGER NOT NULL DEFAULT 0)""",
    """CREATE TABLE jobs (
        id INTEGER PRIMARY KEY, kind TEXT NOT NULL, commands TEXT NOT NULL, detail TEXT NOT NULL, person TEXT NOT NULL,
        state TEXT NOT NULL CHECK (state IN ('waiting', 'running', 'done', 'failed', 'stopped')),
        result TEXT, error TEXT, at REAL NOT NULL, started REAL, ended REAL)""",
    # One row for each text to label. `wanted` people label it; `agreed` is what more than half of them said.
    """CREATE TABLE items (
        id INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, file INTEGER, text TEXT NOT NULL, category TEXT NOT NULL,
        confidence REAL NOT NULL, category_2 TEXT, confidence_2 REAL, decision TEXT, margin REAL NOT NULL,
        wanted INTEGER NOT NULL, state TEXT NOT NULL DEFAULT 'open' CHECK (state IN ('open', 'agreed', 'none')),
        agreed TEXT, retrained INTEGER)""",
    "CREATE INDEX open_items ON items (state, margin)",
    # An item that a person has on the screen is given to nobody else until then.
    """CREATE TABLE leases (
        item INTEGER NOT NULL REFERENCES items, person TEXT NOT NULL, until REAL NOT NULL,
        PRIMARY KEY (item, person))""",
    # `batch` holds together what one key press labelled, so that undo takes all of it back.
    """CREATE TABLE labels (
        item INTEGER NOT NULL REFERENCES items, person TEXT NOT NULL, at REAL NOT NULL, batch INTEGER NOT NULL,
        kind TEXT NOT NULL CHECK (kind IN ('category', 'none', 'skip')), category TEXT, PRIMARY KEY (item, person))""",
    "CREATE INDEX labels_of_person ON labels (person, batch)",
    """CREATE TABLE events (
        id INTEGER PRIMARY KEY, at REAL NOT NULL, person TEXT NOT NULL, what TEXT NOT NULL, detail TEXT NOT NULL)""",
    "CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL)",
)


class Store:
    """Opens the file for each transaction, so that any thread can use it."""

    def __init__(self, path: Path) -> None:
        """Create the file if it does not exist.

        Raises:
            InputError: it is not a file of this release, or it cannot be written.
        """
        self._path = path
        try:
            with self.write() as db:
                version = db.execute("PRAGMA user_version").fetchone()[0]
                if not version and not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                    for statement in SCHEMA:
                        db.execute(statement)
                    db.execute(f"PRAGMA user_version = {VERSION}")
                    version = VERSION
        except sqlite3.Error as error:
            raise InputError(f"{path}: {error}; choose another --folder") from None
        if version != VERSION:
            raise InputError(f"{path} was made by another release of Aisle; choose another --folder")

    @contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """One transaction: all of it is on the disk afterwards, or none of it."""
        with closing(self._open()) as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
            except BaseException:
                db.rollback()
                raise
            db.commit()

    @contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """One view of the file, which later writes do not change."""
        with closing(self._open()) as db:
            db.execute("BEGIN")
            yield db

    def _open(self) -> sqlite3.Connection:
        db = sqlite3.connect(self._path, timeout=WAIT_SECONDS, isolation_level=None)
        db.row_factory = sqlite3.Row
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")  # a label that was acknowledged survives a power failure
        db.execute("PRAGMA foreign_keys = ON")
        return db


def note(db: sqlite3.Connection, person: str, what: str, **detail: Any) -> None:
    """Record who did what."""
    row = time.time(), person, what, json.dumps(detail, ensure_ascii=False)
    db.execute("INSERT INTO events (at, person, what, detail) VALUES (?, ?, ?, ?)", row)


def events(db: sqlite3.Connection, most: int = 50) -> list[dict[str, Any]]:
    """Return the last events, newest first."""
    rows = db.execute("SELECT at, person, what, detail FROM events ORDER BY id DESC LIMIT ?", (most,))
    return [{**dict(row), "detail": json.loads(row["detail"])} for row in rows]


def setting(db: sqlite3.Connection, name: str) -> str | None:
    row = db.execute("SELECT value FROM settings WHERE name = ?", (name,)).fetchone()
    return None if row is None else str(row["value"])


def set_setting(db: sqlite3.Connection, name: str, value: str) -> None:
    db.execute(
        "INSERT INTO settings VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value", (name, value)
    )


def follow_folder(db: sqlite3.Connection, folder: Path) -> None:
    """Have the paths of jobs and settings lead into the desk's folder as it is now. It may have been moved."""
    before, now = setting(db, FOLDER), str(folder)
    set_setting(db, FOLDER, now)
    if before is None or before == now:
        return
    for row in db.execute("SELECT id, commands, detail, result FROM jobs").fetchall():
        moved = [each and _moved_json(each, before, now) for each in tuple(row)[1:]]
        db.execute("UPDATE jobs SET commands = ?, detail = ?, result = ? WHERE id = ?", (*moved, row["id"]))
    for row in db.execute("SELECT name, value FROM settings").fetchall():
        set_setting(db, row["name"], _moved(row["value"], before, now))


def _moved_json(content: str, before: str, now: str) -> str:
    return json.dumps(_moved(json.loads(content), before, now), ensure_ascii=False)


def _moved(value: Any, before: str, now: str) -> Any:
    """Return a value in which each path below a folder is below another one."""
    if isinstance(value, str):
        return now + value[len(before) :] if value.startswith(f"{before}/") else value
    if isinstance(value, list):
        return [_moved(each, before, now) for each in value]
    if isinstance(value, dict):
        return {name: _moved(each, before, now) for name, each in value.items()}
    return value
