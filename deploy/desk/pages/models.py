"""Models: what was corrected, retraining, old and new side by side, rollout, rollback, and who did what."""

from __future__ import annotations

import json
import re
import sqlite3
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from aisle.deploy.desk import queue
from aisle.deploy.desk.desk import CHECKPOINT, Desk
from aisle.deploy.desk.errors import Problem
from aisle.deploy.desk.guard import field, form
from aisle.deploy.desk.jobs import Job, Results, Write
from aisle.deploy.desk.store import events, set_setting, setting
from aisle.deploy.server.release import Release, servers
from aisle.deploy.server.rollout import total
from aisle.errors import InputError
from aisle.files import write_text
from aisle.preprocess.clean import content_key

KINDS = ("retrain", "deploy", "rollback")  # one job of these at a time
NEWEST = 20  # corrections that are listed
HISTORY = 20  # retrainings and rollouts that are listed
MOST_CHANGED = 30  # categories whose F1 changed
LONGEST = 86400  # seconds of a comparison or a canary
# Each field of the rollout: its largest value, and what is said of a wrong one.
FIELDS = {
    "shadow": (LONGEST, "Give 0 to {most} seconds for the comparison."),
    "agreement": (100, "Give 0 to {most} percent for the least agreement."),
    "canary": (100, "Give 0 to {most} percent for the share of the canary."),
    "canary_seconds": (LONGEST, "Give 0 to {most} seconds for the canary."),
}
# What each event says. What is unknown here is shown by its name.
EVENTS = {
    "login": "logged in",
    "upload": "uploaded {file}",
    "classify": "classified {file}",
    "queue": "put {texts} texts of {file} into the review queue",
    "delete": "deleted {file}",
    "stop": "stopped job {job}",
    "undo": "took labels back",
    "evaluate": "measured the checkpoint",
    "drift": "looked for drift",
    "doubtful": "looked for wrong labels",
    "retrain": "retrained with {corrections} corrections",
    "deploy": "rolled out the checkpoint of retraining {retraining}",
    "rollback": "rolled back",
}


def routes(desk: Desk) -> APIRouter:
    router = APIRouter(prefix="/models")
    desk.jobs.on_finish("retrain", _finish_retraining)
    desk.jobs.on_finish("deploy", lambda job, results: _finish_rollout(desk, job, results))
    desk.jobs.on_finish("rollback", lambda job, results: _finish_rollout(desk, job, results))

    @router.get("")
    def show(request: Request) -> Response:
        return desk.render(request, "models.html", **_page(desk))

    @router.post("/retrain")
    def retrain(request: Request) -> Response:
        _start_retraining(desk, desk.person(request))
        return Response(headers={"HX-Redirect": "/models"})

    @router.post("/deploy")
    async def deploy(request: Request) -> Response:
        fields = await form(request)
        await run_in_threadpool(_start_rollout, desk, desk.person(request), fields)
        return Response(headers={"HX-Redirect": "/models"})

    @router.post("/rollback")
    def rollback(request: Request) -> Response:
        with desk.store.write() as db:
            refuse_second(db, *KINDS)
            words = ["rollback", "--repository", str(desk.options.repository)]
            desk.jobs.add(db, "rollback", [words], desk.person(request))
        return Response(headers={"HX-Redirect": "/models"})

    return router


def sources(desk: Desk) -> tuple[str, str]:
    """Return the checkpoint in use and its table.

    Raises:
        Problem: the desk was started without them.
    """
    checkpoint, data = desk.checkpoint, desk.options.data
    if checkpoint is None or data is None:
        raise Problem("Start the desk with --checkpoint and --data for this.", 409)
    return str(checkpoint), str(data)


def columns(desk: Desk) -> list[str]:
    """Return the options that name the columns of the table."""
    return ["--text-column", desk.options.text_column, "--label-column", desk.options.label_column]


def refuse_second(db: sqlite3.Connection, *kinds: str) -> None:
    """Make sure that no job of these kinds waits or runs.

    Raises:
        Problem: one does.
    """
    marks = ", ".join("?" * len(kinds))
    active = f"SELECT 1 FROM jobs WHERE kind IN ({marks}) AND state IN ('waiting', 'running')"
    if db.execute(active, kinds).fetchone():
        raise Problem("This is running already. Wait until it has ended, or stop it.", 409)


def _start_retraining(desk: Desk, person: str) -> None:
    """Write all corrections to a file, and add the job that trains with them.

    Raises:
        Problem: nothing is corrected, a job runs, or the desk was started without a checkpoint.
    """
    checkpoint, data = sources(desk)
    folder = desk.options.folder.resolve()
    with desk.store.write() as db:
        refuse_second(db, *KINDS)
        rows = list(queue.corrections(db))
        if not rows:
            raise Problem("Nothing is corrected yet. Label texts on the page Review.")
        number = int(db.execute("SELECT coalesce(max(id), 0) + 1 FROM jobs").fetchone()[0])  # the job's
        file = folder / "jobs-data" / f"corrections-{number}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        out = str(folder / "checkpoints" / str(number))
        words = ["retrain", checkpoint, data, "--corrections", str(file), "-o", out, "--overwrite", *columns(desk)]
        desk.jobs.add(db, "retrain", [words], person, file=str(file), corrections=len(rows))


def _finish_retraining(job: Job, _: Results) -> Write:
    """Mark what was in the file. What was corrected or changed meanwhile stays new."""
    lines = Path(job.detail["file"]).read_text("utf-8").splitlines()
    learnt = [(row["text"], row["correct_category"]) for row in map(json.loads, lines)]

    def write(db: sqlite3.Connection) -> None:
        db.executemany(
            "UPDATE items SET retrained = ? WHERE key = ? AND state = 'agreed' AND agreed = ?",
            [(job.id, content_key(text), category) for text, category in learnt],
        )

    return write


def _start_rollout(desk: Desk, person: str, fields: dict[str, list[str]]) -> None:
    """Add the job that rolls out the checkpoint of a retraining.

    Raises:
        Problem: a field is wrong, or a job runs.
    """
    options = _trial_options(fields)
    wanted = field(fields, "retraining")
    made = desk.jobs.get(int(wanted)) if wanted.isascii() and wanted.isdigit() and len(wanted) < 10 else None
    if made is None or made.kind != "retrain" or made.state != "done" or not made.results:
        raise Problem("This retraining does not exist.", 404)
    checkpoint = made.results[0]["checkpoint"]
    if not Path(checkpoint).is_dir():
        raise Problem("The checkpoint of this retraining was deleted. Retrain again.", 409)
    words = ["deploy", checkpoint, "--repository", str(desk.options.repository), *options]
    with desk.store.write() as db:
        refuse_second(db, *KINDS)
        desk.jobs.add(db, "deploy", [words], person, checkpoint=checkpoint, retraining=made.id)


def _trial_options(fields: dict[str, list[str]]) -> list[str]:
    """Return the options of `aisle deploy`. It refuses the details of a trial that does not take place.

    Raises:
        Problem: a number is wrong.
    """
    shadow, agreement, canary, seconds = (_number(fields, name) for name in FIELDS)
    if canary and not seconds:
        raise Problem("Give the canary at least 1 second, or a share of 0.")
    options: list[str] = []
    if shadow:
        options += ["--shadow", f"{shadow:.0f}", "--agreement", f"{agreement / 100:.6g}"]
    if canary:
        options += ["--canary", f"{canary / 100:.6g}", "--canary-seconds", f"{seconds:.0f}"]
    return options


def _number(fields: dict[str, list[str]], name: str) -> float:
    most, sentence = FIELDS[name]
    try:
        value = float(field(fields, name) or 0)
    except ValueError:
        value = -1.0
    whole = name in ("shadow", "canary_seconds")
    if not 0 <= value <= most or (whole and value != round(value)):  # also if it is NaN
        raise Problem(sentence, most=most)
    return value


def _finish_rollout(desk: Desk, job: Job, results: Results) -> Write:
    """Remember which checkpoint each version was made from. The live version's is the one in use."""
    version, previous = results[0]["version"], results[0]["previous"]

    def write(db: sqlite3.Connection) -> None:
        if not results[0].get("changed", True):
            return
        before = setting(db, CHECKPOINT) or desk.options.checkpoint
        if before and previous is not None:
            set_setting(db, _made_from(previous), str(before))
        now = job.detail.get("checkpoint") or setting(db, _made_from(version))
        if now:
            set_setting(db, _made_from(version), now)
            set_setting(db, CHECKPOINT, now)

    return write


def _made_from(version: int) -> str:
    return f"checkpoint of version {version}"


def _page(desk: Desk) -> dict[str, Any]:
    job, made = desk.jobs.last(*KINDS), desk.jobs.last("retrain", state="done")
    rollout = desk.jobs.last("deploy", "rollback", state="done")
    with desk.store.read() as db:
        values = {
            "new": _new_corrections(db),
            "history": _history(db),
            "events": [{**each, **_in_words(each)} for each in events(db)],
        }
    result: dict[str, Any] = made.results[0] if made and made.results else {}
    return {
        **values,
        "job": job,
        "progress": desk.jobs.progress(job.id) if job else {},
        "trial": trial(desk, job),
        "checkpoint": desk.checkpoint,
        "release": _release(desk),
        "made": made,
        "result": result,
        "changed": _changed_categories(result) if result else [],
        "deployable": bool(result) and str(desk.checkpoint) != result["checkpoint"],
        "rollout": rollout,
    }


def trial(desk: Desk, job: Job | None) -> dict[str, Any] | None:
    """Return how the new version does while a rollout tries it: the step, and the figures of the servers so far.

    None if no rollout runs, and before its version is built.
    """
    release = _release(desk) if job and job.kind == "deploy" and job.state == "running" else None
    if release is None or release.candidate is None:
        return None
    counted = [each for each in servers(desk.options.repository) if each.revision == release.revision]
    counts = total(counted)
    compared, requests = counts.get("shadow_compared", 0), counts.get("candidate_requests", 0)
    agreement = counts.get("shadow_agreed", 0) / compared if compared else None
    figures = {"compared": compared, "agreement": agreement, "requests": requests}
    return {"release": release, "failures": counts.get("candidate_failures", 0), **figures}


def _release(desk: Desk) -> Release | None:
    try:
        return Release.load(desk.options.repository)
    except InputError:
        return None  # Quality says what is wrong


def _new_corrections(db: sqlite3.Connection) -> dict[str, Any]:
    """Return what was agreed since the last retraining: the number, by category, and the newest."""
    fresh = "FROM items WHERE state = 'agreed' AND retrained IS NULL"
    categories = db.execute(
        f"SELECT agreed AS category, count(*) AS rows, sum(agreed != category) AS changed {fresh} "
        "GROUP BY agreed ORDER BY rows DESC, agreed"
    ).fetchall()
    newest = db.execute(
        f"SELECT text, category, agreed {fresh} "
        "ORDER BY (SELECT max(at) FROM labels WHERE item = items.id) DESC, id DESC LIMIT ?",
        (NEWEST,),
    ).fetchall()
    total = db.execute("SELECT count(*) FROM items WHERE state = 'agreed'").fetchone()[0]
    return {"rows": sum(each["rows"] for each in categories), "total": total, "by": categories, "newest": newest}


def _history(db: sqlite3.Connection) -> list[dict[str, Any]]:
    """Return the last retrainings and rollouts, newest first, each with what came of it."""
    marks = ", ".join("?" * len(KINDS))
    rows = db.execute(
        "SELECT id, kind, person, state, at, ended, error, "
        "CASE WHEN kind != 'retrain' THEN json_extract(result, '$[0].version') END AS version "
        f"FROM jobs WHERE kind IN ({marks}) ORDER BY id DESC LIMIT ?",
        (*KINDS, HISTORY),
    )
    return [dict(row) for row in rows]


def _in_words(event: dict[str, Any]) -> dict[str, Any]:
    """Return the sentence of an event and the values in it."""
    sentence, detail = EVENTS.get(event["what"], ""), event["detail"]
    wanted = re.findall(r"{(\w+)}", sentence)
    if sentence and all(name in detail for name in wanted):
        return {"sentence": sentence, "values": {name: detail[name] for name in wanted}}
    told = ", ".join(f"{name}: {value}" for name, value in detail.items())
    return {"sentence": "{what} ({detail})" if told else "{what}", "values": {"what": event["what"], "detail": told}}


def _changed_categories(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the categories whose F1 on held-out texts changed most."""
    old, new = (result["held_out"][which]["per_class"] for which in ("old", "new"))
    rows = [
        {
            "category": name,
            "rows": max(each.get(name, {}).get("support", 0) for each in (old, new)),
            "old": old.get(name, {}).get("f1"),
            "new": new.get(name, {}).get("f1"),
        }
        for name in sorted({*old, *new})
    ]
    changed = [row for row in rows if row["old"] != row["new"]]
    return sorted(changed, key=lambda row: -abs((row["new"] or 0) - (row["old"] or 0)))[:MOST_CHANGED]
