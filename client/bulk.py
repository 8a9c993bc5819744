"""Classify a whole file: in order, in constant memory, resumable, one bad row spoiling nothing."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from aisle.client.classifier import Classifier
from aisle.client.protocol import Failure, Prediction
from aisle.errors import InputError
from aisle.preprocess.table import Row, as_text, file_format, fingerprint, read_rows, write_rows

Track = Callable[[Iterable[Any], int], Iterable[Any]]


def classify_file(
    classifier: Classifier,
    source: Path,
    out: Path,
    text_column: str,
    top_k: int,
    track: Track = lambda rows, _: rows,
) -> dict[str, Any]:
    """Write the rows of `source` to `out`, each with its category and confidence, or with an error.

    Answers are first written to `out` + ``.partial``, a JSONL file whose head names the job.
    A run that was stopped goes on from there.

    Args:
        track: wraps the stream of rows, of which it is told the number, to show progress.

    Raises:
        InputError: the file cannot be read, `top_k` is out of range, the partial file is another job's, or the disk is
            full.
        Unavailable, ClassifierError: the server failed; in either case what was answered is kept for the next run.
    """
    file_format(out)  # a name that cannot be written is better known now
    start = time.perf_counter()
    columns, total = _survey(source, text_column)
    classifier.probe(top_k, patient=True)  # so is a server that cannot be reached, or has fewer categories
    partial = out.with_name(out.name + ".partial")
    job = {"source": source.name, "sha256": fingerprint(source), "text_column": text_column, "top_k": top_k}
    done = _resume(partial, job)

    for_texts, for_output = itertools.tee(itertools.islice(read_rows(source), done, None))
    texts = (as_text(row.get(text_column)) for row in for_texts)
    added = _added_columns(top_k)
    answered = 0
    errors = 0

    def rows() -> Iterator[Row]:
        nonlocal errors
        errors = 0  # Parquet takes two passes
        for row in _journal(partial):
            errors += row["error"] is not None
            yield row

    try:
        with partial.open("ab") as journal:
            for row, answer in track(zip(for_output, classifier.stream(texts, top_k), strict=True), total - done):
                answered += 1
                line = {**_aside(row, added), **_answer_columns(answer)}
                journal.write(json.dumps(line, default=str).encode() + b"\n")
        finished = out.with_name(f".{out.name}.writing{''.join(out.suffixes)}")
        write_rows(finished, rows, [*_aside(dict.fromkeys(columns), added), *added])
        finished.replace(out)
    except OSError as error:
        message = f"cannot write {out}: {error.strerror or error}; mend that and run it again: it goes on where it was"
        raise InputError(message) from None
    partial.unlink()
    seconds = time.perf_counter() - start
    return {
        "rows": done + answered,
        "resumed_from": done,
        "errors": errors,
        "seconds": round(seconds, 3),
        "texts_per_second": round(answered / seconds, 1),
        "output": str(out),
    }


def _resume(partial: Path, job: dict[str, Any]) -> int:
    """Return how many rows are answered, after cutting off a line that was being written when the last run stopped."""
    if not partial.exists():
        partial.write_text(json.dumps(job) + "\n")
        return 0
    with partial.open("r+b") as file:
        lines = end = 0
        head = b""
        for line in file:
            if not line.endswith(b"\n"):
                break
            head = head or line
            lines += 1
            end += len(line)
        file.truncate(end)
    if not lines:
        partial.unlink()
        return _resume(partial, job)
    if json.loads(head) != job:
        raise InputError(f"{partial} belongs to another job or another state of its source; delete it to start anew")
    return lines - 1


def _journal(partial: Path) -> Iterator[Row]:
    with partial.open("rb") as file:
        next(file)
        for line in file:
            yield json.loads(line)


def _survey(source: Path, text_column: str) -> tuple[list[str], int]:
    """Return the columns of the source, in the order of their first occurrence, and how many rows it has."""
    columns: dict[str, None] = {}
    total = 0
    for row in read_rows(source):
        total += 1
        if row.keys() - columns.keys():
            columns.update(dict.fromkeys(row))
    if total and text_column not in columns:
        raise InputError(f"{source}: no column {text_column!r}; it has: {', '.join(columns)}")
    return list(columns), total


def _aside(row: Row, added: list[str]) -> Row:
    """Rename the source's own columns that would be overwritten, as `category` to `source_category`."""
    return {f"source_{name}" if name in added else name: value for name, value in row.items()}


def _names(rank: int) -> tuple[str, str]:
    return ("category", "confidence") if rank == 1 else (f"category_{rank}", f"confidence_{rank}")


def _added_columns(top_k: int) -> list[str]:
    return [name for rank in range(1, top_k + 1) for name in _names(rank)] + ["error"]


def _answer_columns(answer: Prediction | Failure) -> Row:
    if isinstance(answer, Failure):
        return {"category": None, "confidence": None, "error": answer.message}
    row: Row = {}
    for rank, pair in enumerate(zip(answer.categories, answer.confidences, strict=True), start=1):
        row.update(zip(_names(rank), pair, strict=True))
    row["error"] = None
    return row
