"""Classify a whole file: in order, in constant memory, and resumable. A bad row does not affect others."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

from aisle.client.classifier import Classifier
from aisle.client.protocol import Failure, Prediction
from aisle.client.taxonomy import ADDED, Counterpart, mapped
from aisle.client.wire import Wanted
from aisle.errors import InputError
from aisle.preprocess.fields import columns_of
from aisle.preprocess.labels import BAR
from aisle.preprocess.tables import columnar
from aisle.preprocess.tables.databases import Database
from aisle.preprocess.tables.opening import STDIO, Reading, kind_of, local, reading
from aisle.preprocess.tables.place import shown
from aisle.preprocess.tables.shard import Shard
from aisle.preprocess.tables.sheets import require_fit
from aisle.preprocess.tables.table import (
    SURPLUS,
    FaultyRow,
    Row,
    fingerprint,
    header_of,
    missing_column,
    read_range,
    read_rows,
    to_send,
)
from aisle.preprocess.tables.upsert import check_columns, portions, target_of
from aisle.preprocess.tables.writing import output_kind, refuse_same, remove_unfinished, replacing, write_edited
from aisle.preprocess.values import TextError
from aisle.preprocess.vocabulary import MANY_UNKNOWN

try:
    import fcntl
except ImportError:  # on Windows, where two runs on one output are not detected
    fcntl = None  # type: ignore[assignment]

Track = Callable[[Iterable[Any], int], Iterable[Any]]


class Progress(NamedTuple):
    """The state of an earlier run: the number of answered rows, and the model that answered last."""

    rows: int
    version: int | None  # None if no row has an answer
    model: str  # its fingerprint; empty if that is not known


class _Models:
    """The models of the versions that answer. They are fetched again when another version answers."""

    def __init__(self, classifier: Classifier) -> None:
        self._classifier = classifier
        self._known, self.have_decisions, self.fields, self.multi_label, self.attributes = classifier.models(bulk=True)

    def of(self, version: int) -> str:
        """Return the fingerprint of a version's model; empty if the server does not tell."""
        if version not in self._known:
            self._known = {version: "", **self._classifier.models(bulk=True).fingerprints, **self._known}
        return self._known[version]


def classify_file(
    classifier: Classifier,
    source: Path,
    out: Path,
    text_column: str,
    top_k: int | None,
    track: Track = lambda rows, _: rows,
    *,
    decisions: bool | None = None,
    shard: Shard | None = None,
    attributes: bool = False,
    taxonomy: Mapping[str, Counterpart] | None = None,
    keys: Sequence[str] = (),
    since: str | None = None,
) -> dict[str, Any]:
    """Write the rows of `source` to `out`, each with its category and confidence, or with an error.

    Of a multi-label model, a row gets all categories that reach their thresholds, unless there is a `top_k`: as lists
    in JSON and Parquet, otherwise separated by `|`.

    If `MANY_UNKNOWN` or more of a text's tokens are unknown to the model, its row gets a warning too.

    Answers are first written to the journal `out` + ``.partial``, a JSONL file that starts with a description of the
    job and is locked. A run that was stopped resumes from there, if the same model answers.

    `source` and `out` can be addresses of tables of databases. There, a row replaces the one with the same key: all in
    one transaction or, with `since`, in the order of its column, some at a time, so that a run that was stopped
    resumes from the greatest value that `out` has.

    Args:
        track: wraps the stream of answers, to show progress; its second argument is their number.
        decisions: write the decisions; by default as the run that this one resumes or, in a new run, if the model has
            them.
        shard: classify this share of the rows alone, and write its part file beside `out`. All shards together hold
            each row once, in order.
        attributes: write each attribute of the model too, and its confidence.
        taxonomy: write the counterpart of each category too.
        keys: the columns that tell the rows of a database apart.
        since: read only the rows whose value of this column is the greatest in `out` or more, or is missing.

    Raises:
        InputError: the file cannot be read, `top_k` is out of range, the model lacks the decisions, the journal belongs
            to another job, another run is writing it, or the disk is full.
        Unavailable, ClassifierError: the server failed. The next run resumes from the answers so far.
    """
    kind = output_kind(source, out)  # fails early if the name cannot be written
    out = shard.part_of(out) if shard else out
    refuse_same(source, out)
    start = time.perf_counter()
    target = target_of(source, out, keys, since, shard)
    columns, total = scan_source(source, text_column, out if kind == "xlsx" else None, shard)
    columns = [name for name in columns if not target or name != SURPLUS]  # a table of a database has its columns
    part = shard.rows(total) if shard else range(total)
    models = _Models(classifier)
    check_fields(text_column, columns, models.fields)
    decided = _wants_decisions(models, out) if decisions is None else decisions
    wanted = Wanted(top_k, decided, attributes=attributes)
    # Fails early if the server is unreachable, or has too few categories or not what is asked for.
    classifier.probe(top_k, decisions=wanted.decisions, attributes=attributes, bulk=True)
    sets = models.multi_label and top_k is None
    added = _set_types(kind) if sets else _added_types(wanted, models.attributes)
    if taxonomy:
        added = {**dict.fromkeys(ADDED, added["category"]), **added}
    names = _renames(columns, added)
    edit = _Edit(source, columns, added, names, kind, _set_columns if sets else _answer_columns, taxonomy or {})
    resumed = 0
    try:
        if target:
            check_columns(source, columns, names, keys, since)
            answers = track(_answers(classifier, source, text_column, wanted, part), total)
            versions, found = _fill(target, edit, iter(answers), models, total, list(keys), since)
        else:
            with _open_journal(out) as (path, journal):
                remove_unfinished(out)
                done = _resume(journal, path, _job(source, text_column, wanted, sets, shard))
                rest, resumed = part[done.rows :], done.rows
                answers = track(_answers(classifier, source, text_column, wanted, rest), len(rest))
                versions = _record(answers, journal, path, done, models, edit.columns_of_answer)
                with replacing(out) as writing:
                    found = edit.write(path, writing, part if shard else None)
                path.unlink()
    except OSError as error:
        message = f"cannot write {out}: {error.strerror or error}; correct that and run the command again: it resumes"
        raise InputError(message) from None
    seconds = time.perf_counter() - start
    return {
        "rows": len(part),
        **({"shard": str(shard), "first_row": part.start + 1, "source_rows": total} if shard else {}),
        "resumed_from": resumed,
        "errors": found["error"],
        "warnings": found["warning"],
        **({"unmapped": found["unmapped"]} if taxonomy else {}),
        "versions": {str(version): rows for version, rows in sorted(versions.items())},
        "renamed": names,
        "multi_label": models.multi_label,
        "seconds": round(seconds, 3),
        "texts_per_second": round((len(part) - resumed) / seconds, 1),
        "output": shown(out),
    }


def _fill(
    target: Database,
    edit: _Edit,
    answers: Iterator[Prediction | Failure],
    models: _Models,
    total: int,
    keys: list[str],
    since: str | None,
) -> tuple[Counter[int], Counter[str]]:
    """Write all rows to a table of a database; return the versions that answered, and the errors and warnings.

    Without `since` all rows are written at once: a part of them could not be told from all.
    """
    versions, found = Counter[int](), Counter[str]()
    for portion in portions(total, target.rows_at_once if since else max(total, 1)):
        with tempfile.TemporaryDirectory(prefix="aisle-classify-") as folder:
            path, rows = Path(folder, "answers"), Path(folder, "rows.parquet")
            with path.open("wb") as journal:
                journal.write(b"{}\n")
                some = itertools.islice(answers, len(portion))
                versions += _record(some, journal, path, Progress(0, None, ""), models, edit.columns_of_answer)
            found += edit.write(path, rows, portion)
            target.write(rows, keys, since)
    return versions, found


def _wants_decisions(models: _Models, out: Path) -> bool:
    """Return whether the journal of an earlier run has decisions; without a journal, whether the models have them."""
    try:
        with _journal_of(out).open("rb") as file:
            return json.loads(file.readline()).get("decisions", False) is True
    except (OSError, ValueError, AttributeError):  # there is no earlier run, or its journal is damaged
        return models.have_decisions


def _journal_of(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def _job(source: Path, text_column: str, wanted: Wanted, sets: bool, shard: Shard | None) -> dict[str, Any]:
    """Return what the answers depend on. A journal of another job is refused."""
    job: dict[str, Any] = {"source": source.name, "sha256": fingerprint(source), "text_column": text_column}
    job |= {"top_k": wanted.top_k or 1, "form": "answers"}  # the journal of an older release holds whole rows
    if shard:
        job["shard"] = str(shard)
    if sets:
        job["sets"] = True
    if wanted.decisions:
        job["decisions"] = True
    if wanted.attributes:
        job["attributes"] = True
    return job if reading() == Reading() else {**job, "reading": repr(reading())}


@contextlib.contextmanager
def _open_journal(out: Path) -> Iterator[tuple[Path, IO[bytes]]]:
    """Open the journal of an output, for this run alone; for standard output, it is a temporary file."""
    with contextlib.ExitStack() as stack:
        if out == STDIO:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="aisle-classify-"))
            path = Path(folder, "answers")
        else:
            out.parent.mkdir(parents=True, exist_ok=True)
            path = _journal_of(out)
        yield path, stack.enter_context(_locked(path))


def _record(
    answers: Iterable[Prediction | Failure],
    journal: IO[bytes],
    path: Path,
    done: Progress,
    models: _Models,
    columns_of_answer: Callable[[Prediction | Failure], Row],
) -> Counter[int]:
    """Write answers to the journal; return the number of answers of each version of the model."""
    versions: Counter[int] = Counter()
    for answer in answers:
        row = columns_of_answer(answer)
        if isinstance(answer, Prediction):
            row["model"] = models.of(answer.version)
            if not versions:
                _check_model(answer.version, row["model"], done, path)
            versions[answer.version] += 1
        journal.write(json.dumps(row).encode() + b"\n")
    journal.flush()
    return versions


class _Edit(NamedTuple):
    """How answers are added to the rows of a source."""

    source: Path
    columns: list[str]
    added: Mapping[str, type]
    names: Mapping[str, str]  # new names of the source's columns
    kind: str  # the format to write
    columns_of_answer: Callable[[Prediction | Failure], Row]
    taxonomy: Mapping[str, Counterpart]

    def write(self, journal: Path, out: Path, part: range | None) -> Counter[str]:
        """Write the rows, or a part of them, with the answers of a journal; return the errors and warnings."""
        found: Counter[str] = Counter()
        edits = partial(_edits, journal, self.added, found, self.taxonomy)
        write_edited(self.source, out, edits, self.columns, self.added, self.names, self.kind, part)
        return found


def _edits(
    path: Path, added: Mapping[str, type], found: Counter[str], taxonomy: Mapping[str, Counterpart]
) -> Iterator[Row]:
    """Yield the new columns of each row, and count errors, warnings and rows without a counterpart in a taxonomy."""
    found.clear()  # this is called twice for Parquet
    for row in _read_journal(path):
        found.update(name for name in ("error", "warning") if row.get(name) is not None)
        if taxonomy and row.get("category"):
            row |= mapped(row["category"], taxonomy)
            found["unmapped"] += not row["taxonomy"]
        yield {name: _in_type(row.get(name), kind) for name, kind in added.items()}


def _in_type(value: Any, kind: type) -> Any:
    """Return a value of the journal for a column; a list becomes one text where a column cannot hold lists."""
    return BAR.join(map(str, value)) if isinstance(value, list) and kind is str else value


def _answers(
    classifier: Classifier, source: Path, text_column: str, wanted: Wanted, rows: range
) -> Iterator[Prediction | Failure]:
    """Yield an answer for each of the `rows`, from 0. Rows that cannot be used are not sent."""
    faults: deque[Failure | None] = deque()

    def texts() -> Iterator[str | bytes | None]:
        for row in read_range(source, rows):
            text, fault = usable(row, text_column)
            faults.append(fault)
            yield text

    stream = classifier.stream(texts(), wanted.top_k, decisions=wanted.decisions, attributes=wanted.attributes)
    for answer in stream:
        yield faults.popleft() or answer


def usable(row: Row, text_column: str) -> tuple[Any, Failure | None]:
    """Return what to send for a row, None if it has no text, and why it cannot be sent."""
    if isinstance(row, FaultyRow):
        return None, Failure(row.fault)
    try:
        return to_send(row, text_column), None
    except TextError as error:
        return None, Failure(str(error))


def _check_model(version: int, model: str, before: Progress, path: Path) -> None:
    """Refuse to resume with another model than the one that answered last."""
    if before.version is None or (version, model) == before[1:]:
        return
    if version != before.version:
        now = f"was answered by version {before.version} of the model, and version {version} answers now"
    elif before.model and model:
        now = f"was answered by another model, which is version {version} too"
    elif before.model:
        now = f"names the model that answered, and this server does not tell which model its version {version} is"
    else:
        now = "does not name the model that answered: an earlier Aisle wrote it, or its server did not tell"
    raise InputError(f"{path} {now}; delete it to start again")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[IO[bytes]]:
    """Open a journal and lock it.

    Raises:
        InputError: another run has locked it.
    """
    while True:
        file = path.open("a+b")
        with file:
            try:
                if fcntl is not None:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"another run is writing {path}; wait for it, or choose another output") from None
            # Another run may have removed the file just before the lock.
            if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                continue
            yield file
            return


def _resume(file: IO[bytes], path: Path, job: dict[str, Any]) -> Progress:
    """Return the progress of the last run, and cut off an incomplete last line."""
    lines = end = 0
    head = answered = b""
    file.seek(0)
    for line in file:
        if not line.endswith(b"\n"):
            break
        head = head or line
        if b'"version": ' in line:  # not the row of an error
            answered = line
        lines += 1
        end += len(line)
    file.truncate(end)
    if not lines:
        file.write(json.dumps(job).encode() + b"\n")
        file.flush()
        return Progress(0, None, "")
    try:
        same = json.loads(head) == job
        last = json.loads(answered or "{}")
        found = Progress(lines - 1, last.get("version"), last.get("model", ""))
    except (ValueError, AttributeError):
        same = False
    if not same:
        raise InputError(f"{path} belongs to another job, or its source has changed; delete it to start again")
    return found


def _read_journal(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        next(file)
        for line in file:
            yield json.loads(line)


def check_fields(text_column: str, columns: Sequence[str], fields: Sequence[str] | None) -> None:
    """Check that a table's text columns are the fields that the server's model reads.

    A table that has none of them may have one column of plain texts.

    Args:
        columns: all columns of the table.
        fields: of the model; None if the versions that answer differ, so that only the server can check.

    Raises:
        InputError: they are not.
    """
    given = columns_of(text_column)
    known = [name for name in fields or () if name in columns]
    if fields is None or (len(given) == 1 and not known) or ({*given} == {*known} and known[0] == fields[0]):
        return
    if not fields:
        raise InputError(f"--text-column {text_column}: the server's model reads one column; give one")
    options = " ".join(f"--text-column {name}" for name in (known if known[:1] == [fields[0]] else fields))
    raise InputError(f"the server's model reads {', '.join(fields)}; give {options}, as the columns are called")


def scan_source(
    source: Path, text_column: str, sheet: Path | None, shard: Shard | None = None
) -> tuple[list[str], int]:
    """Return the columns of the source, in the order of their first occurrence, and its number of rows.

    Of a Parquet file, only the rows of the `shard` are read. Another file is read to its end, to count its rows.

    Raises:
        InputError: the text column is missing, or the spreadsheet `sheet` cannot hold the rows.
    """
    columns: dict[str, None] = {}
    total, rows = 0, read_rows(source)
    if shard and kind_of(source) == "parquet":
        names, total = columnar.size_of(source, local(source))
        columns, rows = dict.fromkeys(names), read_range(source, shard.rows(total))
    read = 0
    for row in rows:
        read += 1
        if row.keys() - columns.keys():
            columns.update(dict.fromkeys(row))
        if sheet is not None:
            for value in row.values():
                require_fit(value, sheet, read)
    total = total or read
    if not total and (kind := kind_of(source)) in ("csv", "tsv", "parquet"):  # the rows do not tell the columns
        names = header_of(source) if kind != "parquet" else columnar.size_of(source, local(source))[0]
        columns.update(dict.fromkeys(names))
    lacking = next((name for name in columns_of(text_column) if name not in columns), None)
    if columns and lacking is not None:
        raise missing_column(source, lacking, list(columns))
    return list(columns), total


def _renames(columns: list[str], added: Iterable[str]) -> dict[str, str]:
    """Return new names for the source's columns that would be overwritten, such as `source_category`."""
    taken = {*columns, *added}
    names = {}
    for name in columns:
        if name in added:
            wanted = f"source_{name}"
            new = next(each for n in itertools.count(1) if (each := wanted if n == 1 else f"{wanted}_{n}") not in taken)
            taken.add(new)
            names[name] = new
    return names


def _names(rank: int) -> tuple[str, str]:
    return ("category", "confidence") if rank == 1 else (f"category_{rank}", f"confidence_{rank}")


def _added_types(wanted: Wanted, attributes: Sequence[str]) -> dict[str, type]:
    """Return the added columns with their types.

    Args:
        attributes: that the model has.
    """
    types: dict[str, type] = {}
    for rank in range(1, (wanted.top_k or 1) + 1):
        types |= dict(zip(_names(rank), (str, float), strict=True))
    if wanted.decisions:
        types |= {"decision": str, "decided": str}
    for name in attributes if wanted.attributes else ():
        types |= {name: str, f"{name}_confidence": float}
    return types | {"warning": str, "error": str}


def _set_types(kind: str) -> dict[str, type]:
    """Return the added columns with their types, for a file of sets of categories."""
    lists = kind in ("jsonl", "json", "parquet")
    category, confidence = (list[str], list[float]) if lists else (str, str)
    return {"category": category, "confidence": confidence, "warning": str, "error": str}


def _set_columns(answer: Prediction | Failure) -> Row:
    row = _answer_columns(answer)
    if isinstance(answer, Failure):
        return row
    kept = {name: row[name] for name in ("warning", "error", "version")}
    return {"category": answer.categories, "confidence": answer.confidences, **kept}


def _answer_columns(answer: Prediction | Failure) -> Row:
    if isinstance(answer, Failure):
        return {"category": None, "confidence": None, "warning": None, "error": answer.message}
    row: Row = {}
    for rank, pair in enumerate(zip(answer.categories, answer.confidences, strict=True), start=1):
        row.update(zip(_names(rank), pair, strict=True))
    if answer.decision is not None:
        row |= {"decision": answer.decision, "decided": answer.decided or None}
    for name, (value, confidence) in (answer.attributes or {}).items():
        row |= {name: value, f"{name}_confidence": confidence}
    many = answer.unknown >= MANY_UNKNOWN
    row["warning"] = f"the model does not know {answer.unknown:.0%} of this text" if many else None
    return row | {"error": None, "version": answer.version}
