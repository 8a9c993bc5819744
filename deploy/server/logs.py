"""Structured logs: everything that this process and its server write to stderr, as one JSON object per line."""

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

from aisle.deploy.server.instances import has_gpu

# Triton's own lines: level, time (MMDD hh:mm:ss.ssssss, UTC), process, file:line] "message, escaped as in JSON".
TRITON = re.compile(r"(?P<level>[IWEF])\d{4} \d\d:\d\d:\d\d\.\d+ \d+ (?P<source>\S+:\d+)\] (?P<message>.*)")
# Lines of the OpenTelemetry exporter in Triton.
EXPORTER = re.compile(r"\[(?P<level>\w)\w*\] File: \S*/(?P<source>\S+:\d+) ?(?P<message>.*)")
NO_GPU = re.compile(
    rb"CUDA driver version is insufficient|CudaDriverHelper has not been|CUDA memory pool disabled"
    rb"|Failed to initialize NVML|DCGM unable to start"
)
LEVELS = {"I": "info", "W": "warning", "E": "error", "F": "fatal", "D": "debug"}


def as_json(line: str) -> str:
    """Return a log line as a JSON object: `time` (UTC), `level`, `source` and `message`.

    A line in an unknown format, such as a traceback or a library's warning, becomes the message of source "stderr".
    The time is that of reading: Triton's default format has no year, and its ISO8601 format no fractions of a second.
    """
    found = TRITON.fullmatch(line) or EXPORTER.fullmatch(line)
    level, source, message = found.group("level", "source", "message") if found else ("I", "stderr", line)
    if message.startswith('"'):
        with suppress(ValueError):  # in quotes, but not JSON: it stays unchanged
            message = json.loads(message)
    time = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    entry = {"time": time, "level": LEVELS.get(level, "info"), "source": source, "message": message}
    return json.dumps(entry, ensure_ascii=False)


def stderr_as_json() -> None:
    """From now on, write the stderr of this process and its children as JSON lines to the present stderr."""
    original = os.fdopen(os.dup(2), "w", encoding="utf-8")
    reading, writing = os.pipe()
    os.dup2(writing, 2)  # children inherit it
    os.close(writing)
    writer = threading.Thread(target=_copy, args=(os.fdopen(reading, "rb"), original), daemon=True)
    writer.start()

    def finish() -> None:
        sys.stderr.flush()
        os.dup2(original.fileno(), 2)  # closes the last writing end: the children have ended
        writer.join(5)

    atexit.register(finish)


class TritonLog:
    """Forwards what Triton writes to `descriptor`, and notices if Triton fails to lock its shared memory.

    Triton logs a missing GPU as an error several times, although on a CPU nothing is wrong. So without a GPU, its
    errors about CUDA are dropped.
    """

    def __init__(self, to: int) -> None:
        """Start the thread that forwards.

        Args:
            to: the file descriptor that gets the lines.
        """
        self.lock_failed = False  # whether Triton failed to lock its shared memory
        self._to = to
        self._has_gpu = has_gpu()
        reading, self.descriptor = os.pipe()
        self._thread = threading.Thread(target=self._forward, args=(reading,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Read the remaining lines after all writers have ended; wait at most five seconds."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
            self._thread.join(5)

    def _forward(self, reading: int) -> None:
        with os.fdopen(reading, "rb") as lines:
            for line in lines:
                self.lock_failed |= b"lock_exception" in line
                if self._has_gpu or not NO_GPU.search(line):
                    with suppress(OSError):  # the reader has gone; Triton must not wait for it
                        os.write(self._to, line)


def _copy(lines: IO[bytes], to: IO[str]) -> None:
    for line in lines:
        text = line.decode("utf-8", "replace").rstrip("\n")
        if text.strip():
            to.write(as_json(text) + "\n")
            to.flush()
