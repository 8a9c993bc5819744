"""Structured logs: all that this process and the server below it write to stderr, one JSON object a line."""

from __future__ import annotations

import atexit
import json
import os
import re
import sys
import threading
from contextlib import suppress
from datetime import UTC, datetime
from typing import IO

# Triton's own lines: level, time (MMDD hh:mm:ss.ssssss, UTC), process, file:line] "message, escaped as in JSON".
TRITON = re.compile(r"(?P<level>[IWEF])\d{4} \d\d:\d\d:\d\d\.\d+ \d+ (?P<source>\S+:\d+)\] (?P<message>.*)")
# OpenTelemetry's inside Triton.
EXPORTER = re.compile(r"\[(?P<level>\w)\w*\] File: \S*/(?P<source>\S+:\d+) ?(?P<message>.*)")
LEVELS = {"I": "info", "W": "warning", "E": "error", "F": "fatal", "D": "debug"}


def as_json(line: str) -> str:
    """Return one line of log as a JSON object: `time` (UTC), `level`, `source` and `message`.

    What is in no form known here, as a traceback or a library's warning, keeps its words under the source "stderr".
    The time is that of reading: Triton's default form tells no year, and its ISO8601 form no fractions of a second.
    """
    found = TRITON.fullmatch(line) or EXPORTER.fullmatch(line)
    level, source, message = found.group("level", "source", "message") if found else ("I", "stderr", line)
    if message.startswith('"'):
        with suppress(ValueError):  # in quotes, and yet no JSON: it stays as it is
            message = json.loads(message)
    time = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    entry = {"time": time, "level": LEVELS.get(level, "info"), "source": source, "message": message}
    return json.dumps(entry, ensure_ascii=False)


def stderr_as_json() -> None:
    """From here to its end, let this process and its children write JSON lines to what stderr is now."""
    original = os.fdopen(os.dup(2), "w", encoding="utf-8")
    reading, writing = os.pipe()
    os.dup2(writing, 2)  # inherited by the children, as stderr always is
    os.close(writing)
    writer = threading.Thread(target=_copy, args=(os.fdopen(reading, "rb"), original), daemon=True)
    writer.start()

    def finish() -> None:
        sys.stderr.flush()
        os.dup2(original.fileno(), 2)  # the last writing end but those of the children, which have ended
        writer.join(5)

    atexit.register(finish)


def _copy(lines: IO[bytes], to: IO[str]) -> None:
    for line in lines:
        text = line.decode("utf-8", "replace").rstrip("\n")
        if text.strip():
            to.write(as_json(text) + "\n")
            to.flush()
