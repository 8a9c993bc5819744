"""Review: the texts that labels would teach the model most, for a person to label."""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from aisle.client import Classifier, Failure
from aisle.console import track
from aisle.errors import InputError
from aisle.preprocess.clean import TextError, content_key, prepare
from aisle.preprocess.near import PERMUTATIONS, Signer
from aisle.preprocess.table import Row, as_text, file_format, read_rows, require, write_rows

CORRECTION = "correct_category"  # the column that people fill in
COLUMNS = ["text", "category", "confidence", "category_2", "confidence_2", CORRECTION]
NEAR = 0.5  # Jaccard similarity from which one of two texts is enough; cleaning, which must not lose any, takes 0.8
NO_TEXT = "no text"
POOL = 20  # times as many of the least certain texts are chosen from


class Candidate(NamedTuple):
    margin: float  # between the two most probable categories
    order: int  # of its first occurrence
    row: Row  # of COLUMNS


def review(source: Path, out: Path, *, rows: int, url: str = "", text_column: str = "text") -> dict[str, Any]:
    """Write the texts to label to a table, with the model's two best guesses and an empty column for the right one.

    Chosen are the texts with the smallest margin between the two most probable categories (Scheffer et al. 2001; in
    Bahri et al. 2022, "Is margin all you need?", nothing beats it over many tasks), none nearly equal to another, in
    turn for each predicted category.

    Args:
        source: a traffic log that keeps texts, what `aisle classify -o` wrote, or, with `url`, any table of texts.
        url: host:port of a server to ask.

    Raises:
        InputError: the source cannot be read, keeps no texts or no categories, or the output's kind is unknown.
        ServerError: the server failed.
    """
    file_format(out)
    if out.resolve() == source.resolve():
        raise InputError(f"{out} is the input; choose another output")
    skipped: Counter[str] = Counter()
    answered = _ask(source, url, text_column, skipped) if url else _logged(source, text_column, skipped)
    pool = heapq.nsmallest(POOL * rows, _candidates(answered, skipped))
    if not pool and skipped.keys() == {NO_TEXT}:
        raise InputError(f"{source} keeps no texts; log with --keep-text, or give a table of texts and --url")
    if not pool:
        why = ", ".join(f"{n} {reason}" for reason, n in skipped.items()) or "it has no rows"
        raise InputError(f"{source}: no text to review ({why})")
    chosen = choose(pool, rows)
    writing = out.with_name(f".{out.name}.writing{''.join(out.suffixes)}")
    try:
        write_rows(writing, lambda: (each.row for each in chosen), COLUMNS)
        writing.replace(out)
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
    """Choose from candidates, least certain first: each category in turn, nothing nearly equal to what was chosen."""
    sign = Signer()
    queues: dict[str, deque[Candidate]] = defaultdict(deque)
    for each in pool:
        queues[each.row["category"]].append(each)
    turns = deque(queues.values())
    chosen: list[Candidate] = []
    signatures = np.empty((rows, PERMUTATIONS), np.uint32)
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


def _candidates(rows: Iterable[Row], skipped: Counter[str]) -> Iterator[Candidate]:
    """Yield each text once, as it was answered first."""
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
        first, second = row["confidence"], row.get("confidence_2")
        # Without a second category, all that is left of the probability may be one other's.
        margin = first - (1 - first if second is None else second)
        yield Candidate(margin, order, {**row, "text": text, CORRECTION: ""})


def _logged(source: Path, text_column: str, skipped: Counter[str]) -> Iterator[Row]:
    """Yield the answered rows of a log."""
    first = True
    for number, row in enumerate(track(read_rows(source), "reading"), start=1):
        if "words" in row and "category" not in row:  # counts of a traffic log
            continue
        if first and not {"category", "confidence"} <= row.keys():
            raise InputError(f"{source} has no columns 'category' and 'confidence'; ask a server for them with --url")
        if first and "length" not in row:  # a traffic log has that, and texts only if asked to
            require(row, [text_column], source)
        first = False
        if row.get(text_column) is None or row.get("category") in (None, ""):
            skipped[NO_TEXT if row.get(text_column) is None else "not answered"] += 1
            continue
        try:
            confidence = float(row.get("confidence"))  # type: ignore[arg-type]
            second = row.get("confidence_2")
            second = None if second in (None, "") else float(second)
        except (TypeError, ValueError):
            raise InputError(f"{source}, row {number}: a confidence is no number; classify the table anew") from None
        yield {
            "text": as_text(row[text_column]),
            "category": str(row["category"]),
            "confidence": confidence,
            "category_2": row.get("category_2") or "",
            "confidence_2": second,
        }


def _ask(source: Path, url: str, text_column: str, skipped: Counter[str]) -> Iterator[Row]:
    """Yield the rows of a table as a server answers them."""
    texts: deque[str | None] = deque()

    def read() -> Iterator[str | None]:
        for number, row in enumerate(read_rows(source), start=1):
            if number == 1:
                require(row, [text_column], source)
            text = as_text(row.get(text_column))
            texts.append(text)
            yield text

    with Classifier.from_environment(url) as classifier:
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
