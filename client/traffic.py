"""The traffic log: categories and confidences of answers, for `aisle drift` and `aisle review`. Texts are optional.

Each line is a JSON object:

    {"time": "2026-11-24T08:18:42Z", "category": "水果", "confidence": 0.9312, "length": 12}   one answer
    {"time": "2026-11-24T08:19:03Z", "texts": 1000, "words": {"17": 2, "59120": 14, …}}         words of many texts

Words are counted over many texts together, by bucket (`aisle.preprocess.vocabulary`). The counts show how many words
are new to a checkpoint, and no text can be rebuilt from them. Hashes of the words of each text would not be safe: there
are few words, so a reader of the log, who must know the salt, could find them by trying. For the same reason the log
holds no hash of a whole text.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import threading
import weakref
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from aisle.client.protocol import Prediction
from aisle.errors import InputError
from aisle.preprocess.clean import prepare
from aisle.preprocess.values import TextError
from aisle.preprocess.vocabulary import count

TEXTS = 1000  # texts whose words are counted together
LEAST = 100  # counts over fewer texts are not written, because they would reveal too much of each text
_logs: weakref.WeakSet[TrafficLog] = weakref.WeakSet()


class TrafficLog:
    """Appends a line for each answer. Threads and clients may share an instance, and processes may share a file.

    with TrafficLog(Path("traffic.jsonl")) as log, Classifier("localhost:8001", log=log) as classifier:
        ...
    """

    def __init__(self, path: Path, keep_text: bool = False) -> None:
        """Open the log for appending.

        Args:
            path: a .jsonl file. A new file can be read by its owner only.
            keep_text: log the texts too, cleaned and with recognized personal data replaced.

        Raises:
            InputError: the file cannot be written, or is not named .jsonl.
        """
        if path.suffix.lower() != ".jsonl":
            raise InputError(f"{path}: a traffic log holds JSON lines; name it .jsonl")
        try:
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror}") from None
        self.path = path
        self._keep_text = keep_text
        self._failed = False
        self._begin()
        _logs.add(self)

    def _begin(self) -> None:
        """Reset the lock and the counts, at the start and in a child process, whose parent writes its own counts."""
        self._lock = threading.Lock()
        self._texts = 0
        self._words: Counter[int] = Counter()

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
        """Append the answers to some texts. If writing fails, lines are lost and a warning is logged once."""
        now = _now()
        rows, cleaned = [], []
        for raw, prediction in zip(texts, predictions, strict=True):
            try:
                text = prepare(raw)
            except TextError:  # a server of another version accepted it
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
        """Write rows in one call, so that lines of several processes are not mixed."""
        data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        try:
            written = os.write(self._file, data)
            if written < len(data):
                self._cut(data[:written])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            if not self._failed:
                logging.getLogger(__name__).warning("cannot write %s: %s", self.path, error.strerror)
            self._failed = True

    def _cut(self, written: bytes) -> None:
        """Remove an incomplete last line, which no command could read, unless another process has written after it."""
        end = os.lseek(self._file, 0, os.SEEK_CUR)
        if os.fstat(self._file).st_size == end:
            os.ftruncate(self._file, end - len(written) + written.rfind(b"\n") + 1)


def _after_fork_in_child() -> None:
    for log in _logs:
        log._begin()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
