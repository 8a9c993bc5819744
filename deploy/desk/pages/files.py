"""Files: upload a table, choose its text column, classify it, see the counts, and download the result."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import FileResponse, Response

from aisle.deploy.desk import queue
from aisle.deploy.desk.desk import Desk
from aisle.deploy.desk.errors import Problem
from aisle.deploy.desk.guard import field, form
from aisle.deploy.desk.jobs import Job, Results, Write
from aisle.deploy.desk.store import note
from aisle.errors import InputError
from aisle.preprocess.tables.opening import kind_of_name
from aisle.preprocess.tables.table import FaultyRow, read_rows

LARGEST = 1024  # MiB of an upload
SHOWN_ROWS = 5
SHOWN_ERRORS = 100
MOST_REVIEWED = 5000
COMPRESSED = (".gz", ".bz2", ".zst", ".zip")
# What can be downloaded. The result has the upload's own format if that can be written.
FORMATS = (".csv", ".tsv", ".jsonl", ".json", ".parquet", ".xlsx")


def routes(desk: Desk) -> APIRouter:
    router = APIRouter(prefix="/files")
    desk.jobs.on_finish("classify", lambda job, results: _finish(desk, job, results))

    @router.get("")
    def show(request: Request) -> Response:
        with desk.store.read() as db:
            rows = db.execute(
                "SELECT files.*, jobs.state FROM files LEFT JOIN jobs ON jobs.id = files.job "
                "ORDER BY files.id DESC LIMIT 100"
            ).fetchall()
        return desk.render(request, "files.html", files=rows, largest=LARGEST)

    @router.post("")
    async def upload(request: Request) -> Response:
        name = Path(request.query_params.get("name", "").replace("\\", "/")).name
        if kind_of_name(name) is None:
            raise Problem(
                "{name}: this is no table that can be read. Give CSV, TSV, JSONL, Parquet or .xlsx.", name=name
            )
        file = await _receive(desk, request, name)
        return Response(headers={"HX-Redirect": f"/files/{file}"})

    @router.get("/{file}")
    def show_file(request: Request, file: int) -> Response:
        row = _get(desk, file)
        job = desk.jobs.get(row["job"]) if row["job"] else None
        values: dict[str, Any] = {"file": row, "job": job, "progress": desk.jobs.progress(job.id) if job else {}}
        if job is None:
            values |= {"preview": _preview(desk, row), "formats": FORMATS, "format": _own_format(row["name"])}
        elif job.results:
            values["summary"] = job.results[-1]
        return desk.render(request, "file.html", **values)

    @router.post("/{file}/classify")
    async def classify(request: Request, file: int) -> Response:
        fields = await form(request)
        await run_in_threadpool(_start, desk, request, file, fields)
        return Response(headers={"HX-Redirect": f"/files/{file}"})

    @router.get("/{file}/result")
    def download(file: int) -> Response:
        row = _get(desk, file)
        if not row["output"] or not Path(row["output"]).exists():
            raise Problem("There is no result yet.", 404)
        out = Path(row["output"])
        stem = row["name"].partition(".")[0] or "table"
        return FileResponse(out, filename=f"{stem}-classified{out.suffix}")

    @router.post("/{file}/delete")
    def delete(request: Request, file: int) -> Response:
        """Delete a table and its result. Texts that are in the review queue stay there."""
        row = _get(desk, file)
        if row["job"] and (job := desk.jobs.get(row["job"])) and job.active:
            raise Problem("Stop the job first.", 409)
        with desk.store.write() as db:
            db.execute("DELETE FROM files WHERE id = ?", (file,))
            note(db, desk.person(request), "delete", file=row["name"])
        shutil.rmtree(_folder(desk, file), ignore_errors=True)
        return Response(headers={"HX-Redirect": "/files"})

    return router


async def _receive(desk: Desk, request: Request, name: str) -> int:
    """Write the body of a request to the folder of a new file; return its number.

    Raises:
        Problem: it is too large or empty.
    """
    too_large = Problem("The file is too large: {limit} MiB at most. Use the command line for it.", 413, limit=LARGEST)
    if int(request.headers.get("content-length") or 0) > LARGEST * 2**20:
        raise too_large
    with desk.store.write() as db:  # the number is taken even if the upload fails
        person = desk.person(request)
        row = name, "", person, time.time()
        file = int(db.execute("INSERT INTO files (name, source, person, at) VALUES (?, ?, ?, ?)", row).lastrowid or 0)
    folder = _folder(desk, file)
    source = folder / f"source{_endings(name)}"
    size = 0
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with source.open("wb") as out:
            async for part in request.stream():
                size += len(part)
                if size > LARGEST * 2**20:
                    raise too_large
                await run_in_threadpool(out.write, part)
            out.flush()
            await run_in_threadpool(os.fsync, out.fileno())
        if not size:
            raise Problem("The file is empty.")
    except BaseException:  # also if the browser goes away
        shutil.rmtree(folder, ignore_errors=True)
        with desk.store.write() as db:
            db.execute("DELETE FROM files WHERE id = ?", (file,))
        raise
    with desk.store.write() as db:
        db.execute("UPDATE files SET source = ? WHERE id = ?", (str(source), file))
        note(db, person, "upload", file=name, bytes=size)
    return file


def _endings(name: str) -> str:
    """Return the endings of a name that say its format, such as .csv.gz."""
    endings = Path(name).suffixes
    last = endings[-1].lower()
    return (endings[-2].lower() + last) if last in COMPRESSED and len(endings) > 1 else last


def _own_format(name: str) -> str:
    endings = [each.lower() for each in Path(name).suffixes]
    return next((each for each in reversed(endings) if each in FORMATS), ".csv")


def _get(desk: Desk, file: int) -> Any:
    with desk.store.read() as db:
        row = db.execute("SELECT * FROM files WHERE id = ? AND source != ''", (file,)).fetchone()
    if row is None:
        raise Problem("This file does not exist.", 404)
    return row


def _folder(desk: Desk, file: int) -> Path:
    return desk.options.folder / "files" / str(file)


def _preview(desk: Desk, row: Any) -> dict[str, Any]:
    """Return the first rows of a table, or why it cannot be read."""
    try:
        rows = list(islice(read_rows(Path(row["source"])), SHOWN_ROWS))
    except InputError as error:
        return {"error": _own_name(str(error), row)}
    columns = list(dict.fromkeys(name for each in rows for name in each))
    if not columns:
        return {"error": f"{row['name']}: it has no rows"}
    cells = [[str(each.get(name) if each.get(name) is not None else "")[:200] for name in columns] for each in rows]
    return {"columns": columns, "rows": cells, "likely": _likely(columns, rows)}


def _own_name(message: str, row: Any) -> str:
    """Return a message with the name that the person knows in place of the desk's."""
    return message.replace(row["source"], row["name"])


def _likely(columns: list[str], rows: list[dict[str, Any]]) -> str:
    """Return the column that holds texts, by its name or else by its length."""
    named = [name for name in columns if re.search(r"text|title|标题|名称|文本|review|name", name.lower())]
    return max(named or columns, key=lambda name: sum(len(str(row.get(name) or "")) for row in rows))


def _start(desk: Desk, request: Request, file: int, fields: dict[str, list[str]]) -> None:
    """Add the job that classifies a file.

    Raises:
        Problem: it is running already, or a field is wrong.
    """
    row = _get(desk, file)
    column, ending = field(fields, "column"), field(fields, "format")
    if ending not in FORMATS:
        raise Problem("Choose a format for the result.")
    if column not in _preview(desk, row).get("columns", ()):
        raise Problem("The table has no column {name}.", name=column)
    try:
        reviewed = int(field(fields, "reviewed") or 0)
    except ValueError:
        reviewed = -1
    if not 0 <= reviewed <= MOST_REVIEWED:
        raise Problem("Give a number of texts from 0 to {most}.", most=MOST_REVIEWED)
    source, out = Path(row["source"]), _folder(desk, file) / f"result{ending}"
    chosen = _folder(desk, file) / "review.jsonl"
    commands = [
        ["classify", str(source), "-o", str(out), "--text-column", column, "--top-k", "2", "--url", desk.options.url]
    ]
    if reviewed:
        commands.append(["review", str(out), "-o", str(chosen), "--rows", str(reviewed), "--text-column", column])
    with desk.store.write() as db:
        if db.execute("SELECT job FROM files WHERE id = ?", (file,)).fetchone()["job"] is not None:
            raise Problem("This file is being classified already.", 409)
        job = desk.jobs.add(db, "classify", commands, desk.person(request), file=row["name"])
        values = job, column, str(out), file
        db.execute("UPDATE files SET job = ?, text_column = ?, output = ? WHERE id = ?", values)


def _finish(desk: Desk, job: Job, results: Results) -> Write:
    """Count what was classified, and put the chosen texts into the review queue."""
    with desk.store.read() as db:
        row = db.execute("SELECT * FROM files WHERE job = ?", (job.id,)).fetchone()
    renamed = results[0]["renamed"]
    results.append(summary(read_rows(Path(row["output"])), renamed.get(row["text_column"], row["text_column"])))
    chosen = _folder(desk, row["id"]) / "review.jsonl"
    rows = list(read_rows(chosen)) if len(job.commands) > 1 else []

    def write(db: Any) -> None:
        queued = queue.add(db, row["id"], rows)
        db.execute("UPDATE files SET queued = ? WHERE id = ?", (queued, row["id"]))

    return write


def summary(rows: Iterator[Any], text_column: str) -> dict[str, Any]:
    """Return the counts of a classified table: by category and by decision, and the first errors with their rows."""
    categories: Counter[str] = Counter()
    decisions: Counter[str] = Counter()
    errors: list[dict[str, Any]] = []
    total = failed = 0
    for number, row in enumerate(rows, start=1):
        total += 1
        if error := row.fault if isinstance(row, FaultyRow) else row.get("error"):
            failed += 1
            if len(errors) < SHOWN_ERRORS:
                errors.append({"row": number, "text": str(row.get(text_column) or "")[:200], "error": str(error)})
            continue
        categories[str(row["category"])] += 1
        if row.get("decision"):
            decisions[str(row["decision"])] += 1
    return {
        "rows": total,
        "failed": failed,
        "categories": dict(categories.most_common()),
        "decisions": dict(decisions.most_common()),
        "errors": errors,
    }
