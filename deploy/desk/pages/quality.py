"""Quality: figures by category, confusions down to their texts, suspected labels, drift, and versions."""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from aisle.build.repository import MANIFEST, MODELS, gate_note, gate_state, read_report, versions
from aisle.deploy.desk import languages
from aisle.deploy.desk.charts import Translate, calibration_chart, course_chart
from aisle.deploy.desk.desk import Desk
from aisle.deploy.desk.errors import Problem
from aisle.deploy.desk.jobs import Results, Write
from aisle.deploy.desk.pages.models import columns, refuse_second, sources
from aisle.deploy.server.release import Release
from aisle.errors import InputError

# What the table of categories can be sorted by: its heading, and whether the largest comes first.
SORTS = {
    "precision": ("Precision", False),
    "recall": ("Recall", False),
    "f1": ("F1", False),
    "confidence": ("Confidence", False),
    "rows": ("Rows", True),
}
SHADES = 10  # of the confusions
LARGEST_PART = 30  # categories of a matrix that has not all of them
CONFUSIONS = 20  # that are listed
DOUBTED = 50  # texts whose label is doubted
HISTORY = 60  # measurements of drift


def routes(desk: Desk) -> APIRouter:
    router = APIRouter(prefix="/quality")
    desk.jobs.on_finish("doubtful", lambda _, results: _remove_cleaned(results))
    _add_pages(router, desk)
    _add_charts(router, desk)
    _add_buttons(router, desk)
    return router


def _add_pages(router: APIRouter, desk: Desk) -> None:
    @router.get("")
    def show(request: Request, sort: str = "f1") -> Response:
        order = sort if sort in SORTS else "f1"
        return desk.render(request, "quality.html", sort=order, sorts=SORTS, **_page(desk, order))

    @router.get("/errors")
    def show_errors(request: Request, actual: str, predicted: str) -> Response:
        groups = _result(desk, "evaluate")["errors"]
        found = next((each for each in groups if (each["actual"], each["predicted"]) == (actual, predicted)), None)
        if found is None:
            raise Problem("The last measurement has no texts of this confusion.", 404)
        return desk.render(request, "quality_errors.html", group=found)


def _add_charts(router: APIRouter, desk: Desk) -> None:
    def translated(request: Request) -> Translate:
        language = desk.language(request)
        return lambda text: languages.translate(language, text)

    @router.get("/calibration.svg")
    def calibration(request: Request) -> Response:
        return _image(calibration_chart(_result(desk, "evaluate")["calibration"]["bins"], translated(request)))

    @router.get("/drift.svg")
    def course(request: Request) -> Response:
        """The windows of time of the last measurement."""
        windows = _result(desk, "drift")["windows"]
        return _image(course_chart(windows, [each["from"] for each in windows], translated(request)))

    @router.get("/drift-history.svg")
    def history(request: Request) -> Response:
        """All measurements."""
        rows = _drift_history(desk)
        dates = [f"{datetime.fromtimestamp(each['at']):%Y-%m-%d %H:%M}" for each in rows]
        return _image(course_chart([each["values"] for each in rows], dates, translated(request)))


def _add_buttons(router: APIRouter, desk: Desk) -> None:
    @router.post("/measure")
    def measure(request: Request) -> Response:
        words = ["evaluate", *sources(desk), "--held-out", *columns(desk)]
        return _start(desk, request, "evaluate", [words])

    @router.post("/drift")
    def drift(request: Request) -> Response:
        if desk.checkpoint is None or desk.options.log is None:
            raise Problem("Start the desk with --checkpoint and --log for this.", 409)
        words = ["drift", str(desk.checkpoint), str(desk.options.log), "--text-column", desk.options.text_column]
        return _start(desk, request, "drift", [words])

    @router.post("/doubtful")
    def doubtful(request: Request) -> Response:
        """Look for wrong labels: texts with two labels, and labels that the model contradicts with confidence."""
        checkpoint, data = sources(desk)
        out = desk.options.folder.resolve() / "jobs-data" / "cleaned.jsonl"
        out.parent.mkdir(parents=True, exist_ok=True)
        cleaning = ["clean", data, "-o", str(out), *columns(desk)]
        return _start(desk, request, "doubtful", [cleaning, ["evaluate", checkpoint, data, *columns(desk)]])


def _start(desk: Desk, request: Request, kind: str, commands: list[list[str]]) -> Response:
    with desk.store.write() as db:
        refuse_second(db, kind)
        desk.jobs.add(db, kind, commands, desk.person(request))
    return Response(headers={"HX-Redirect": "/quality"})


def _remove_cleaned(results: Results) -> Write:
    """Remove the table that `aisle clean` wrote; only its report is shown."""

    def write(_: sqlite3.Connection) -> None:
        for name in ("output", "report"):
            Path(results[0][name]).unlink(missing_ok=True)
        Path(results[0]["report"]).with_suffix(".json").unlink(missing_ok=True)

    return write


def _result(desk: Desk, kind: str) -> dict[str, Any]:
    """Return the newest result of a kind of job.

    Raises:
        Problem: there is none.
    """
    job = desk.jobs.last(kind, state="done")
    if job is None or not job.results:
        raise Problem("Nothing is measured yet.", 404)
    return job.results[0]


def _image(svg: bytes) -> Response:
    return Response(svg, media_type="image/svg+xml")


def _page(desk: Desk, sort: str) -> dict[str, Any]:
    done = {kind: desk.jobs.last(kind, state="done") for kind in ("evaluate", "drift", "doubtful")}
    last = [desk.jobs.last(kind) for kind in done]
    shown = [job for job in last if job and job.state != "done"]
    values: dict[str, Any] = {
        "checkpoint": desk.checkpoint,
        "jobs": [{"job": job, "progress": desk.jobs.progress(job.id)} for job in shown],
        "done": done,
        "versions": _versions(desk.options.repository),
        "left_out": _left_out(desk.checkpoint),
    }
    if (job := done["evaluate"]) and job.results:
        values |= {"result": job.results[0], "categories": _categories(job.results[0], sort)}
        values |= {"matrix": _matrix(job.results[0]), "confusions": job.results[0]["errors"][:CONFUSIONS]}
    if (job := done["drift"]) and job.results:
        values |= {"drift": job.results[0], "rules": _rules(), "drift_history": _drift_history(desk)}
    if (job := done["doubtful"]) and job.results:
        values |= {"cleaned": job.results[0], "doubted": _doubted(job.results[1]["errors"])}
    return values


def _categories(result: dict[str, Any], sort: str) -> list[dict[str, Any]]:
    """Return the figures of each category, sorted; those without a figure come last."""
    confidence = result["confidence_by_category"]
    rows = [
        {"name": name, "rows": each["support"], "confidence": confidence.get(name)}
        | {figure: each[figure] for figure in ("precision", "recall", "f1")}
        for name, each in result["per_class"].items()
    ]
    sign = -1 if SORTS[sort][1] else 1
    return sorted(rows, key=lambda row: (row[sort] is None, sign * (row[sort] or 0), row["name"]))


def _matrix(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of the confusion matrix. Of many categories, it has those with the most confusions."""
    names, counts = _counts(result)
    listed = {(each["actual"], each["predicted"]) for each in result["errors"]}
    return [
        {
            "name": name,
            "cells": [
                {
                    "predicted": predicted,
                    "rows": counts.get((name, predicted), 0),
                    "shade": _shade(counts.get((name, predicted), 0), result["per_class"][name]["support"]),
                    "linked": (name, predicted) in listed,
                }
                for predicted in names
            ],
        }
        for name in names
    ]


def _counts(result: dict[str, Any]) -> tuple[list[str], dict[tuple[str, str], int]]:
    """Return the categories of the matrix, and its counts by label and answer."""
    if found := result["confusion"]:
        names = found["categories"]
        pairs = ((name, predicted) for name in names for predicted in names)
        return names, dict(zip(pairs, (count for row in found["counts"] for count in row), strict=True))
    involved: Counter[str] = Counter()
    counts = {}
    for each in result["errors"]:
        counts[each["actual"], each["predicted"]] = each["rows"]
        involved.update({each["actual"]: each["rows"], each["predicted"]: each["rows"]})
    names = sorted(name for name, _ in involved.most_common(LARGEST_PART))
    right = {name: result["per_class"][name] for name in names}
    return names, counts | {(name, name): round(each["recall"] * each["support"]) for name, each in right.items()}


def _shade(rows: int, of: int) -> int:
    return min(SHADES - 1, int(SHADES * rows / max(1, of)))


def _doubted(groups: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the texts whose label the model contradicts, the most confident first."""
    texts = [{**group, **example} for group in groups for example in group["examples"]]
    return sorted(texts, key=lambda each: -each["confidence"])[:DOUBTED]


def _left_out(checkpoint: Path | None) -> dict[str, Any] | None:
    """Return the rows that training left out because equal texts had different labels; None if it does not say."""
    if checkpoint is None:
        return None
    try:
        cleaning = json.loads((checkpoint / "training.json").read_text("utf-8"))["data"]["cleaning"]
        reason = "conflicting labels"
        return {"rows": int(cleaning["dropped"].get(reason, 0)), "first": list(cleaning["examples"].get(reason, ()))}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def _rules() -> dict[str, Any]:
    from aisle.train.adapt.drift_statistics import RULES  # with scipy, which takes a second to import

    return dict(RULES)


def _drift_history(desk: Desk) -> list[dict[str, Any]]:
    """Return the measurements of drift, oldest first, each with its date, verdict and values."""
    query = "SELECT ended, result FROM jobs WHERE kind = 'drift' AND state = 'done' ORDER BY id DESC LIMIT ?"
    with desk.store.read() as db:
        found = [(row["ended"], json.loads(row["result"])[0]) for row in db.execute(query, (HISTORY,))]
    return [
        {
            "at": at,
            "rows": result["rows"],
            "retrain": result["retrain"],
            "values": {name: each["value"] for name, each in result["measures"].items()},
        }
        for at, result in reversed(found)
    ]


def _versions(repository: Path) -> list[dict[str, Any]]:
    """Return the built versions, newest first, with their figures or what is wrong with them."""
    try:
        release: Release | None = Release.load(repository)
    except InputError:
        release = None
    found = []
    for number in reversed(versions(repository)):
        state = "live" if release and number == release.live else ""
        state = "previous" if release and number == release.previous else state
        manifest = repository / MODELS[-1] / str(number) / MANIFEST
        row: dict[str, Any] = {"number": number, "state": state, "error": "", "at": manifest.stat().st_mtime}
        try:
            report = read_report(repository, number)
            row |= {"report": report, "gate": gate_state(report), "note": gate_note(report)}
        except InputError as error:
            row["error"] = str(error)
        found.append(row)
    return found
