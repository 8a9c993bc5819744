"""Review: choose the texts that a person should label, by active learning."""

from __future__ import annotations

import contextlib
import heapq
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from aisle.client import Classifier, Failure
from aisle.client.bulk import check_fields
from aisle.console import track
from aisle.errors import InputError
from aisle.preprocess.clean import content_key, prepare
from aisle.preprocess.fields import columns_of
from aisle.preprocess.labels import BAR
from aisle.preprocess.near import PERMUTATIONS, Signer
from aisle.preprocess.tables.table import FaultyRow, Row, checked, missing_column, read_rows, to_send, value_of
from aisle.preprocess.tables.writing import output_kind, refuse_same, replacing, write_rows
from aisle.preprocess.values import TextError
from aisle.train.adapt.labelling_tools import CORRECTION, TOOLS

COLUMNS = ["text", "category", "confidence", "category_2", "confidence_2", CORRECTION]
NEAR = 0.5  # Jaccard similarity of near duplicates; cleaning, which must not lose texts, uses 0.8
NO_TEXT = "no text"
POOL = 20  # candidates for each row that is written


class Candidate(NamedTuple):
    margin: float  # between the two most probable categories
    order: int  # of its first occurrence
    row: Row  # of COLUMNS


def review(
    source: Path, out: Path, *, rows: int, url: str = "", text_column: str = "text", tool: str | None = None
) -> dict[str, Any]:
    """Write a table of texts to label, with the model's two top categories and an empty column for the correct one.

    It chooses the texts with the smallest margin between the two most probable categories (Scheffer et al. 2001; in
    Bahri et al. 2022, "Is margin all you need?", no method is better over many tasks). It skips near duplicates, and
    takes the predicted categories in turn.

    Args:
        source: a traffic log with texts, an output of `aisle classify`, or, with `url`, any table of texts.
        url: host:port of a server that classifies the texts.
        tool: a labelling tool of `TOOLS`; the output is then its JSON.

    Raises:
        InputError: the source cannot be read or has no texts or categories, or the output's format is unknown.
        ServerError: the server failed.
    """
    kind = output_kind(source, out)
    if tool and kind != "json":
        raise InputError(f"{tool} reads JSON: write a file whose name ends with .json instead of {out}")
    refuse_same(source, out)
    skipped: Counter[str] = Counter()
    if url:
        answered = _classify(source, url, text_column, skipped)
    else:
        answered = _logged(track(read_rows(source), "reading"), source, text_column, skipped)
    pool = heapq.nsmallest(POOL * rows, _candidates(answered, skipped))
    if not pool and skipped.keys() == {NO_TEXT}:
        raise InputError(f"{source} has no texts; log with --keep-text, or give a table of texts and --url")
    if not pool:
        why = ", ".join(f"{n} {reason}" for reason, n in skipped.items()) or "it has no rows"
        raise InputError(f"{source}: no text to review ({why})")
    chosen = choose(pool, rows)
    try:
        with replacing(out) as writing:
            written = [TOOLS[tool](each.row) if tool else each.row for each in chosen]
            write_rows(writing, lambda: iter(written), list(written[0]) if tool else COLUMNS, kind)
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror}") from None
    return {
        "source": str(source),
        "output": str(out),
        "rows": len(chosen),
        "skipped": dict(skipped),
        "categories": dict(Counter(each.row["category"] for each in chosen).most_common()),
        "largest_margin": max(each.margin for each in chosen),
    }


def choose(pool: list[Candidate], rows: int) -> list[Candidate]:
    """Choose candidates without near duplicates: the least certain of each category, in turn."""
    sign = Signer()
    queues: dict[str, deque[Candidate]] = defaultdict(deque)
    for each in pool:
        queues[each.row["category"]].append(each)
    turns = deque(queues.values())
    chosen: list[Candidate] = []
    signatures = np.empty((min(rows, len(pool)), PERMUTATIONS), np.uint32)
    while turns and len(chosen) < rows:
        queue = turns.popleft()
        while queue:
            each = queue.popleft()
            signature = sign(each.row["text"])
            if ((signatures[: len(chosen)] == signature).mean(axis=1) >= NEAR).any():
                continue
            signatures[len(chosen)] = signature
            chosen.append(each)
            turns.append(queue)
            break
    return sorted(chosen)


def margin(first: float, second: float | None) -> float:
    """Return the margin between the two most probable categories.

    Without a second one, one other category is assumed to have the rest of the probability.
    """
    return first - (1 - first if second is None else second)


def _candidates(rows: Iterable[Row], skipped: Counter[str]) -> Iterator[Candidate]:
    """Yield each text once, with its first prediction."""
    seen: set[bytes] = set()
    for order, row in enumerate(rows):
        try:
            text = prepare(row["text"])
        except TextError as error:
            skipped[error.reason] += 1
            continue
        key = content_key(text)
        if key in seen:
            skipped["duplicate"] += 1
            continue
        seen.add(key)
        yield Candidate(
            margin(row["confidence"], row.get("confidence_2")), order, {**row, "text": text, CORRECTION: ""}
        )


def to_label(source: Path) -> Iterator[Row]:
    """Yield the rows of a table to label that has `COLUMNS`, in its order, with the confidences as numbers.

    Rows without a usable text are left out.

    Raises:
        InputError: the table cannot be read, lacks a column, or a confidence is not a number.
    """
    skipped: Counter[str] = Counter()
    for row in _logged(read_rows(source), source, "text", skipped):
        with contextlib.suppress(TextError):
            yield {**row, "text": prepare(row["text"])}


def _logged(rows: Iterable[Row], source: Path, text_column: str, skipped: Counter[str]) -> Iterator[Row]:
    """Yield the answered rows of a log."""
    first = True
    for number, row in enumerate(rows, start=1):
        if "words" in row and "category" not in row:  # counts of a traffic log
            continue
        if isinstance(row, FaultyRow):
            skipped[row.reason] += 1
            continue
        if first and not {"category", "confidence"} <= row.keys():
            raise InputError(f"{source} has no columns 'category' and 'confidence'; classify it with --url")
        if row.get("category") in (None, ""):
            skipped["not answered"] += 1
            continue
        # A traffic log has a length; texts are optional.
        if first and not {"length", *columns_of(text_column)} & row.keys():
            raise missing_column(source, text_column, list(row))
        first = False
        if (text := value_of(row, text_column)) is None:
            skipped[NO_TEXT] += 1
            continue
        try:
            confidence = float(row.get("confidence"))  # type: ignore[arg-type]
            second = row.get("confidence_2")
            second = None if second in (None, "") else float(second)
        except (TypeError, ValueError):
            problem = f"{source}, row {number}: a confidence is not a number; classify the table again"
            if isinstance(row["category"], list) or BAR in str(row.get("confidence")):
                problem = f"{source}, row {number}: several categories; aisle review needs one per text"
            raise InputError(problem) from None
        yield {
            "text": text,
            "category": str(row["category"]),
            "confidence": confidence,
            "category_2": row.get("category_2") or "",
            "confidence_2": second,
        }


def _classify(source: Path, url: str, text_column: str, skipped: Counter[str]) -> Iterator[Row]:
    """Yield the rows of a table with the categories of a server."""
    texts: deque[str | None] = deque()
    rows = checked(read_rows(source), [text_column], source)
    beginning = list(islice(rows, 1))  # an unreadable table is refused before the server is called

    def read() -> Iterator[str | None]:
        for row in chain(beginning, rows):
            text = value_of(row, text_column)
            if isinstance(row, FaultyRow) or not (text is None or isinstance(text, str)):
                skipped[row.reason if isinstance(row, FaultyRow) else "not text"] += 1
                continue
            texts.append(text)
            yield to_send(row, text_column)

    with Classifier.from_environment(url) as classifier:
        models = classifier.models(bulk=True)
        if models.multi_label:
            raise InputError("the server's model is multi-label; aisle review needs one that gives a text one category")
        check_fields(text_column, [*beginning[0]] if beginning else [], models.fields)
        for answer in track(classifier.stream(read(), top_k=2), "classifying"):
            text = texts.popleft()
            if isinstance(answer, Failure):
                skipped["refused"] += 1
                continue
            yield {
                "text": text,
                "category": answer.category,
                "confidence": answer.confidence,
                "category_2": answer.categories[1],
                "confidence_2": answer.confidences[1],
            }
