"""Files: upload a table, choose its text column, classify it, see the counts, and download the result."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
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
from aisle.errors import InputError, ServerError
from aisle.preprocess.tables.opening import READING, Reading, kind_of_name
from aisle.preprocess.tables.table import FaultyRow, read_rows
from aisle.train.adapt.labelling_tools import CORRECTION
from aisle.train.adapt.review import to_label

LARGEST = 1024  # MiB of an upload
LONGEST_NAME = 120  # characters
SHOWN_ROWS, LOOKED_AT = 5, 1000  # rows of the preview; rows whose columns can be chosen
SHOWN_ERRORS = 100
MOST_REVIEWED = 5000
TO_LABEL = {"text", "category", "confidence", CORRECTION}  # columns of a table that `aisle` wrote for people to label
COMPRESSED = (".gz", ".bz2", ".zst", ".zip")
# What can be downloaded. The result has the upload's own format if that can be written.
FORMATS = (".csv", ".tsv", ".jsonl", ".json", ".parquet", ".xlsx")


def routes(desk: Desk) -> APIRouter:
    router = APIRouter(prefix="/files")
    desk.jobs.on_results("classify", lambda job, results: _review(desk, job, results))
    desk.jobs.on_finish("classify", lambda job, results: _finish(desk, job, results))

    @router.get("")
    def show(request: Request) -> Response:
        with desk.store.read() as db:
            rows = db.execute(
                "SELECT files.*, jobs.state FROM files LEFT JOIN jobs ON jobs.id = files.job "
                "ORDER BY files.id DESC LIMIT 1000"
            ).fetchall()
        return desk.render(request, "files.html", files=rows, largest=LARGEST)

    @router.post("")
    async def upload(request: Request) -> Response:
        name = Path(request.query_params.get("name", "").replace("\\", "/")).name[-LONGEST_NAME:]
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
        if job and job.error:
            job = replace(job, error=_own_name(job.error, row))
        values: dict[str, Any] = {"file": row, "job": job, "progress": desk.jobs.progress(job.id) if job else {}}
        if job is None or job.state in ("failed", "stopped"):
            values |= {"preview": _preview(row), "formats": FORMATS, "format": _own_format(row["name"])}
        elif job.results:
            values["summary"] = job.results[-1]
        return desk.render(request, "file.html", **values)

    @router.post("/{file}/classify")
    async def classify(request: Request, file: int) -> Response:
        fields = await form(request)
        await run_in_threadpool(_start, desk, request, file, fields)
        return Response(headers={"HX-Redirect": f"/files/{file}"})

    @router.post("/{file}/review")
    async def review(request: Request, file: int) -> Response:
        """Put a table to label, such as the suspects of `aisle clean --label-errors`, into the review queue."""
        await run_in_threadpool(_queue, desk, request, file)
        return Response(headers={"HX-Redirect": "/review"})

    @router.get("/{file}/result")
    def download(file: int) -> Response:
        row = _get(desk, file)
        if not row["output"] or not Path(row["output"]).exists():
            raise Problem("There is no result yet.", 404)
        out = Path(row["output"])
        stem = row["name"].removesuffix(_endings(row["name"])) or "table"
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


def _get(desk: Desk, file: int) -> dict[str, Any]:
    """Return a file's row. Its paths are in the desk's folder as it is now, which may have been moved."""
    with desk.store.read() as db:
        found = db.execute("SELECT * FROM files WHERE id = ? AND source != ''", (file,)).fetchone()
    if found is None:
        raise Problem("This file does not exist.", 404)
    row = dict(found)
    for name in ("source", "output"):
        row[name] = str(_folder(desk, file) / Path(row[name]).name) if row[name] else row[name]
    return row


def _folder(desk: Desk, file: int) -> Path:
    return desk.options.folder / "files" / str(file)


def _preview(row: dict[str, Any]) -> dict[str, Any]:
    """Return the first rows of a table, or why it cannot be read. A table in another encoding is read in that one."""
    encoding = ""
    try:
        rows = _first_rows(row, encoding)
    except InputError as error:
        found = re.search(r"--encoding ([\w-]+)", str(error))
        try:
            rows = _first_rows(row, encoding := found[1]) if found else []
        except InputError:
            found = None
        if not found:
            return {"error": _own_name(str(error), row)}
    columns = list(dict.fromkeys(name for each in rows for name in each))
    if not columns:
        return {"error": f"{row['name']}: it has no rows"}
    cells = [[_shown(each.get(name)) for name in columns] for each in rows[:SHOWN_ROWS]]
    names = [_shown(name) for name in columns]
    likely = _likely(columns, rows)
    given = {"columns": columns, "names": names, "rows": cells, "likely": likely, "encoding": encoding}
    return {**given, "to_label": not encoding and set(columns) >= TO_LABEL}


def _first_rows(row: dict[str, Any], encoding: str) -> list[Any]:
    """Return the first rows of a table in an encoding; "" for its own.

    Raises:
        InputError: it cannot be read.
    """
    token = READING.set(Reading(encoding=encoding))
    try:
        return list(islice(read_rows(Path(row["source"])), LOOKED_AT))
    finally:
        READING.reset(token)


def _shown(value: Any) -> str:
    """Return the beginning of a cell. Half of a pair of surrogates, which JSON can hold, cannot be sent."""
    return str("" if value is None else value)[:200].encode("utf-8", "replace").decode()


def _own_name(message: str, row: dict[str, Any]) -> str:
    """Return a message with the name that the person knows in place of the desk's paths."""
    for path in filter(None, (row["source"], row["output"])):
        message = message.replace(path, row["name"])
    return message


def _likely(columns: list[str], rows: list[dict[str, Any]]) -> str:
    """Return the column that holds texts, by its name or else by its length."""
    named = [name for name in columns if re.search(r"text|title|标题|名称|文本|review|name", name.lower())]
    return max(named or columns, key=lambda name: sum(len(str(row.get(name) or "")) for row in rows))


def _start(desk: Desk, request: Request, file: int, fields: dict[str, list[str]]) -> None:
    """Add the job that classifies a file.

    Raises:
        Problem: it is running or done, or a field is wrong.
    """
    with contextlib.suppress(ServerError):  # the job waits for a server that does not answer
        desk.check_one_category()
    row = _get(desk, file)
    ending, preview = field(fields, "format"), _preview(row)
    if ending not in FORMATS:
        raise Problem("Choose a format for the result.")
    column = _column(preview.get("columns", []), field(fields, "column"))
    reviewed = _reviewed(fields)
    folder = _folder(desk, file)
    out = folder / f"result{ending}"
    words = ["classify", row["source"], "-o", str(out), "--text-column", column, "--top-k", "2"]
    words += ["--url", desk.options.url]
    if preview["encoding"]:
        words += ["--encoding", preview["encoding"]]
    with desk.store.write() as db:
        before = db.execute("SELECT job FROM files WHERE id = ?", (file,)).fetchone()["job"]
        if before is not None and (job := desk.jobs.get(before)) and (job.active or job.state == "done"):
            raise Problem("This file is being classified already.", 409)
        if (column, str(out)) != (row["text_column"], row["output"]):  # else it resumes
            for each in folder.glob("result*"):
                each.unlink()
        detail = {"file": row["name"], "number": file, "reviewed": reviewed}
        added = desk.jobs.add(db, "classify", [words], desk.person(request), **detail)
        values = added, column, str(out), file
        db.execute("UPDATE files SET job = ?, text_column = ?, output = ? WHERE id = ?", values)


def _queue(desk: Desk, request: Request, file: int) -> None:
    """Put the rows of a table to label into the review queue, in their order and before all others.

    Raises:
        Problem: it is no such table, or a row cannot be read.
    """
    row = _get(desk, file)
    if not _preview(row).get("to_label"):
        raise Problem("This is no table to label.")
    try:
        rows = list(islice(to_label(Path(row["source"])), MOST_REVIEWED))
    except InputError as error:
        raise Problem("{detail}", detail=_own_name(str(error), row)) from None
    with desk.store.write() as db:
        queued = queue.add(db, file, rows, ranked=True)
        db.execute("UPDATE files SET queued = queued + ? WHERE id = ?", (queued, file))
        note(db, desk.person(request), "queue", file=row["name"], texts=queued)


def _column(columns: list[str], number: str) -> str:
    """Return the column with a number: a browser would change spaces and line breaks in a name.

    Raises:
        Problem: there is none.
    """
    if not re.fullmatch(r"[0-9]{1,9}", number) or int(number) >= len(columns):
        raise Problem("The table has no column {name}.", name=number)
    return columns[int(number)]


def _reviewed(fields: dict[str, list[str]]) -> int:
    """Return how many texts are to be reviewed.

    Raises:
        Problem: it is no number, or too large.
    """
    wanted = field(fields, "reviewed") or "0"
    if not re.fullmatch(r"[0-9]{1,9}", wanted) or int(wanted) > MOST_REVIEWED:
        raise Problem("Give a number of texts from 0 to {most}.", most=MOST_REVIEWED)
    return int(wanted)


def _review(desk: Desk, job: Job, results: Results) -> list[str]:
    """Return the command that chooses the texts to review from the result."""
    if not job.detail["reviewed"]:
        return []
    row = _get(desk, job.detail["number"])
    column = results[0]["renamed"].get(row["text_column"], row["text_column"])
    chosen = str(_folder(desk, row["id"]) / "review.jsonl")
    return ["review", row["output"], "-o", chosen, "--rows", str(job.detail["reviewed"]), "--text-column", column]


def _finish(desk: Desk, job: Job, results: Results) -> Write:
    """Count what was classified, and put the chosen texts into the review queue."""
    row = _get(desk, job.detail["number"])
    chosen = _folder(desk, row["id"]) / "review.jsonl"
    rows = list(read_rows(chosen)) if len(results) > 1 and "error" not in results[1] else []
    column = results[0]["renamed"].get(row["text_column"], row["text_column"])
    results.append(summary(read_rows(Path(row["output"])), column))

    def write(db: Any) -> None:
        queued = queue.add(db, row["id"], rows)
        db.execute("UPDATE files SET queued = ? WHERE id = ?", (queued, row["id"]))

    return write


def clean_up(desk: Desk) -> None:
    """Remove the uploads that were under way when the desk was killed."""
    with desk.store.write() as db:
        for row in db.execute("SELECT id FROM files WHERE source = ''").fetchall():
            shutil.rmtree(_folder(desk, row["id"]), ignore_errors=True)
        db.execute("DELETE FROM files WHERE source = ''")


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
                errors.append({"row": number, "text": _shown(row.get(text_column)), "error": str(error)})
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
