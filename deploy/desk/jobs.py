"""Long work: `aisle` commands in processes of their own, with progress. Jobs outlive a crash of the desk."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from aisle.console import PROGRESS
from aisle.deploy.desk.store import Store, note

POLL_SECONDS = 0.5
STOP_SECONDS = 20.0  # for a command to stop by itself
# Each lane runs one job at a time. So a table is classified while a model trains.
LANES: dict[str, tuple[str, ...]] = {
    "tables": ("classify",),
    "models": ("retrain", "evaluate", "drift", "doubtful"),
    "rollouts": ("deploy", "rollback"),
}
TITLES = {
    "classify": "Classifying",
    "retrain": "Retraining",
    "deploy": "Rollout",
    "rollback": "Rollback",
    "evaluate": "Measuring",
    "drift": "Looking for drift",
    "doubtful": "Looking for wrong labels",
}
# These start again when the desk was killed: the command resumes. A rollout does not: a person decides that.
RESUMABLE = ("classify", "retrain", "evaluate", "drift", "doubtful")

State = Literal["waiting", "running", "done", "failed", "stopped"]
Results = list[dict[str, Any]]


@dataclass(frozen=True)
class Job:
    id: int
    kind: str
    commands: list[list[str]]  # the words after `aisle`, without --json; run in order
    detail: dict[str, Any]
    person: str
    state: State
    results: Results | None  # the JSON of each command
    error: str | None
    at: float
    started: float | None
    ended: float | None

    @property
    def active(self) -> bool:
        return self.state in ("waiting", "running")


# What else is written in the transaction that ends a job, so that both or neither happen.
Write = Callable[[sqlite3.Connection], None]
# Reads what a job made; it may add to the results.
Finish = Callable[[Job, Results], Write]
# Returns a further command, which depends on the results so far. If that fails, the job is done all the same.
Follow = Callable[[Job, Results], list[str]]


class Jobs:
    """Runs the jobs of the store, in one thread for each lane."""

    def __init__(self, store: Store, folder: Path) -> None:
        """`folder` gets the output and progress of each job."""
        self._store, self._folder = store, folder
        self._finish: dict[str, Finish] = {}
        self._follow: dict[str, Follow] = {}
        self._stopping = threading.Event()
        self._running: dict[int, subprocess.Popen[bytes]] = {}
        self._cancelled: set[int] = set()
        self._threads: list[threading.Thread] = []

    def on_finish(self, kind: str, finish: Finish) -> None:
        """Have a function called when a job of this kind is done."""
        self._finish[kind] = finish

    def on_results(self, kind: str, follow: Follow) -> None:
        """Have a further command run once the commands of a job of this kind are done. `[]` is no command."""
        self._follow[kind] = follow

    def add(self, db: sqlite3.Connection, kind: str, commands: list[list[str]], person: str, **detail: Any) -> int:
        """Add a job to those that wait; return its number."""
        assert any(kind in kinds for kinds in LANES.values())
        row = kind, json.dumps(commands), json.dumps(detail, ensure_ascii=False), person, time.time()
        added = db.execute(
            "INSERT INTO jobs (kind, commands, detail, person, state, at) VALUES (?, ?, ?, ?, 'waiting', ?)", row
        )
        note(db, person, kind, **detail)
        return int(added.lastrowid or 0)

    def start(self) -> None:
        """Start the lanes. What an earlier desk was running starts again, or counts as failed."""
        with self._store.write() as db:
            for row in db.execute("SELECT id, kind FROM jobs WHERE state = 'running'").fetchall():
                _cut_off(db, row["id"], row["kind"])
        self._threads = [threading.Thread(target=self._run_lane, args=(kinds,)) for kinds in LANES.values()]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Stop the commands, and wait. What ran is waiting again, and resumes with the next start."""
        self._stopping.set()
        for process in list(self._running.values()):
            process.terminate()
        for thread in self._threads:
            thread.join()

    def cancel(self, job: int, person: str) -> None:
        """Stop a job for good. One that has ended stays as it is."""
        with self._store.write() as db:
            row = db.execute("SELECT state FROM jobs WHERE id = ?", (job,)).fetchone()
            if row is None or row["state"] not in ("waiting", "running"):
                return
            note(db, person, "stop", job=job)
            if row["state"] == "waiting":
                _end(db, job, "stopped")
                return
            self._cancelled.add(job)
        if process := self._running.get(job):
            process.terminate()

    def get(self, job: int) -> Job | None:
        with self._store.read() as db:
            row = db.execute("SELECT * FROM jobs WHERE id = ?", (job,)).fetchone()
        return None if row is None else _job(row)

    def last(self, *kinds: str, state: State | None = None) -> Job | None:
        """Return the newest job of some kinds; with `state`, the newest in that state."""
        marks = ", ".join("?" * len(kinds))
        only, values = ("AND state = ?", (*kinds, state)) if state else ("", kinds)
        query = f"SELECT * FROM jobs WHERE kind IN ({marks}) {only} ORDER BY id DESC LIMIT 1"
        with self._store.read() as db:
            row = db.execute(query, values).fetchone()
        return None if row is None else _job(row)

    def progress(self, job: int) -> dict[str, Any]:
        """Return what a running job does: `what`, `done` and `total`; empty, 0 and None as long as nothing is known."""
        try:
            found: dict[str, Any] = json.loads((self._folder / str(job) / "progress").read_text("utf-8"))
        except (OSError, ValueError):
            return {"what": "", "done": 0, "total": None}
        return found

    def _run_lane(self, kinds: tuple[str, ...]) -> None:
        while not self._stopping.is_set():
            job = self._next(kinds)
            if job is None:
                self._stopping.wait(POLL_SECONDS)
                continue
            self._run(job)

    def _next(self, kinds: tuple[str, ...]) -> Job | None:
        marks = ", ".join("?" * len(kinds))
        query = f"SELECT * FROM jobs WHERE state = 'waiting' AND kind IN ({marks}) ORDER BY id LIMIT 1"
        with self._store.read() as db:
            if db.execute(query, kinds).fetchone() is None:
                return None
        with self._store.write() as db:
            row = db.execute(query, kinds).fetchone()
            if row is None:
                return None
            db.execute("UPDATE jobs SET state = 'running', started = ? WHERE id = ?", (time.time(), row["id"]))
        return _job(row)

    def _run(self, job: Job) -> None:
        folder = self._folder / str(job.id)
        results: Results = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for words in job.commands:
                code, answer = self._run_command(job.id, words, folder)
                if code:
                    self._give_up(job, _last_line(folder / "stderr"))
                    return
                results.append(answer)
            if (follow := self._follow.get(job.kind)) and (words := follow(job, results)):
                code, answer = self._run_command(job.id, words, folder)
                results.append({"error": _last_line(folder / "stderr")} if code else answer)
            finish = self._finish.get(job.kind)
            write = finish(job, results) if finish else None
            if job.id in self._cancelled or self._stopping.is_set():
                self._give_up(job, "")
                return
            with self._store.write() as db:
                if write:
                    write(db)
                _end(db, job.id, "done", results=results)
        except Exception as error:  # whatever it is, the job ends with it and the lane goes on
            self._end(job.id, "failed", error=f"{type(error).__name__}: {error}")

    def _give_up(self, job: Job, why: str) -> None:
        """End a job that was stopped or has failed, or put it back if the desk stops."""
        if job.id in self._cancelled:
            self._end(job.id, "stopped")
        elif not self._stopping.is_set():
            self._end(job.id, "failed", error=why)
        else:
            with self._store.write() as db:
                _cut_off(db, job.id, job.kind)

    def _run_command(self, job: int, words: list[str], folder: Path) -> tuple[int, dict[str, Any]]:
        """Run one command; return its exit code and its JSON.

        One that printed a result has done its work: a table in which no row has an answer ends with an exit code too.
        """
        (folder / "progress").unlink(missing_ok=True)
        environment = {**os.environ, PROGRESS: str(folder / "progress")}
        with (folder / "stdout").open("wb") as out, (folder / "stderr").open("wb") as err:
            process = subprocess.Popen(
                [sys.executable, "-m", "aisle.deploy.desk.child", str(os.getpid()), *words, "--json"],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=environment,
                start_new_session=True,  # Ctrl-C reaches the desk alone, which stops its jobs itself
            )
            self._running[job] = process
            try:
                if self._stopping.is_set() or job in self._cancelled:
                    process.terminate()
                code = _wait(process, self._stopping)
            finally:
                del self._running[job]
        try:
            return 0, json.loads((folder / "stdout").read_text("utf-8"))
        except ValueError:  # it printed nothing, or was killed while it did
            if not code:
                raise
            return code, {}

    def _end(self, job: int, state: State, **values: Any) -> None:
        with self._store.write() as db:
            _end(db, job, state, **values)


def _end(
    db: sqlite3.Connection, job: int, state: State, *, results: Results | None = None, error: str | None = None
) -> None:
    result = None if results is None else json.dumps(results, ensure_ascii=False)
    values = state, result, error, time.time(), job
    db.execute("UPDATE jobs SET state = ?, result = ?, error = ?, ended = ? WHERE id = ?", values)


def _cut_off(db: sqlite3.Connection, job: int, kind: str) -> None:
    """Put a job back that ran when the desk stopped, or end it if it cannot resume."""
    if kind in RESUMABLE:
        db.execute("UPDATE jobs SET state = 'waiting' WHERE id = ?", (job,))
    else:
        why = "the desk stopped while this ran; see which version is live, and start it again"
        _end(db, job, "failed", error=why)


def _wait(process: subprocess.Popen[bytes], stopping: threading.Event) -> int:
    """Wait for a command. At a stop, it gets `STOP_SECONDS`."""
    while not stopping.is_set():
        try:
            return process.wait(POLL_SECONDS)
        except subprocess.TimeoutExpired:
            continue
    try:
        return process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def _last_line(path: Path) -> str:
    lines = path.read_text("utf-8", errors="replace").strip().splitlines()
    return lines[-1].removeprefix("aisle: ") if lines else "the command ended without a message"


def _job(row: Mapping[str, Any]) -> Job:
    values = dict(row)
    results = values.pop("result")
    return Job(
        **{**values, "commands": json.loads(values["commands"]), "detail": json.loads(values["detail"])},
        results=None if results is None else json.loads(results),
    )
