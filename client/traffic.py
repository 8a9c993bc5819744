"""The traffic log: what was answered and how surely, for `aisle drift` and `aisle review`; no texts unless asked.

A JSON object a line:

    {"time": "2026-11-24T08:18:42Z", "category": "水果", "confidence": 0.9312, "length": 12}   an answer
    {"time": "2026-11-24T08:19:03Z", "texts": 1000, "words": {"17": 2, "59120": 14, …}}         the words of many

Of the words there are only counts over many texts together, by bucket (`aisle.preprocess.vocabulary`): enough to tell
how many are new to any checkpoint, then or later, and no text can be put together from them. A line of hashes for each
text would not do: characters and words are few, so whoever knows the salt, as a reader of the log must, can look them
up. For the same reason there is no hash of a whole text.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from aisle.client.protocol import Prediction
from aisle.errors import InputError
from aisle.preprocess.clean import TextError, prepare
from aisle.preprocess.vocabulary import count

TEXTS = 1000  # whose words are counted together
LEAST = 100  # with fewer, the counts would tell too much of each; they are not written


class TrafficLog:
    """Appends a line for each answer. One instance may be shared by threads and clients, one file by processes.

    with TrafficLog(Path("traffic.jsonl")) as log, Classifier("localhost:8001", log=log) as classifier:
        ...
    """

    def __init__(self, path: Path, keep_text: bool = False) -> None:
        """Open the log; what is there stays.

        Args:
            path: a .jsonl file; only its owner can read it if it is new.
            keep_text: keep the texts too, cleaned, and without the personal data that can be recognized.

        Raises:
            InputError: the file cannot be written, or is not named .jsonl.
        """
        if path.suffix.lower() != ".jsonl":
            raise InputError(f"{path}: a traffic log is JSON lines; name it .jsonl")
        try:
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror}") from None
        self._path = path
        self._keep_text = keep_text
        self._lock = threading.Lock()
        self._texts = 0
        self._words: Counter[int] = Counter()
        self._failed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        with self._lock:
            if self._texts >= LEAST:
                self._write([self._counts(_now())])
            os.close(self._file)

    def record(self, texts: Sequence[str | bytes], predictions: Sequence[Prediction]) -> None:
        """Append the answers to some texts. A full disk loses lines, never answers: it is a warning, once."""
        now = _now()
        rows, cleaned = [], []
        for raw, prediction in zip(texts, predictions, strict=True):
            try:
                text = prepare(raw)
            except TextError:  # a server of another version took it
                continue
            row: dict[str, Any] = {"time": now, "category": prediction.category}
            row["confidence"] = round(prediction.confidence, 6)
            if len(prediction.categories) > 1:
                row |= {"category_2": prediction.categories[1], "confidence_2": round(prediction.confidences[1], 6)}
            row["length"] = len(text)
            if self._keep_text:
                row["text"] = text
            rows.append(row)
            cleaned.append(text)
        words = count(cleaned)
        with self._lock:
            self._texts += len(cleaned)
            self._words += words
            if self._texts >= TEXTS:
                rows.append(self._counts(now))
            self._write(rows)

    def _counts(self, now: str) -> dict[str, Any]:
        row = {"time": now, "texts": self._texts, "words": dict(sorted(self._words.items()))}
        self._texts, self._words = 0, Counter()
        return row

    def _write(self, rows: list[dict[str, Any]]) -> None:
        """Write rows in one call, so that the lines of several processes do not run into each other."""
        data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        try:
            os.write(self._file, data)
        except OSError as error:
            if not self._failed:
                logging.getLogger(__name__).warning("cannot write %s: %s", self._path, error.strerror)
            self._failed = True


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
