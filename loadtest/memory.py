"""The memory of `aisle serve` and all its descendants over time, under load."""

from __future__ import annotations

import csv
import threading
import time
from pathlib import Path
from typing import Any

from aisle.errors import InputError
from aisle.loadtest.processes import tree

SAMPLE_SECONDS = 5.0
PAGE_BYTES = 4096


class Memory:
    """Samples the resident memory of a process and all its descendants, in MiB, into a CSV file.

    As in RSS, shared pages count in every process that maps them. The slope matters here, not the sum.
    """

    def __init__(self, pid: int, path: Path) -> None:
        """Prepare to watch the process `pid`.

        Raises:
            InputError: there is no such process.
        """
        if not Path(f"/proc/{pid}").exists():
            raise InputError(f"no process {pid}; give the process id of `aisle serve`")
        self._pid = pid
        self._path = path
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self.rows: list[tuple[float, str, float]] = []  # seconds, process, MiB

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("w", newline="") as file:
            csv.writer(file).writerows([("seconds", "process", "mib"), *self.rows])

    def growth(self) -> dict[str, Any]:
        """Return MiB at the end of the first third and at the end, and the growth between them in MiB per hour.

        The first third is ignored: allocators, the response cache and lazily created buffers fill up in it.
        """
        sums: dict[float, float] = {}
        for seconds, _, mib in self.rows:
            sums[seconds] = sums.get(seconds, 0.0) + mib
        times = sorted(sums)
        if len(times) < 3:
            return {}
        first, last = times[len(times) // 3], times[-1]
        hours = (last - first) / 3600
        return {
            "mib_settled": round(sums[first], 1),
            "mib_end": round(sums[last], 1),
            "mib_per_hour": round((sums[last] - sums[first]) / hours, 1),
        }

    def _sample(self) -> None:
        start = time.monotonic()
        while True:
            seconds = round(time.monotonic() - start, 1)
            self.rows += [(seconds, name, mib) for name, mib in _tree(self._pid)]
            if self._stop.wait(SAMPLE_SECONDS):
                return


def _tree(root: int) -> list[tuple[str, float]]:
    """Return name and resident MiB of a process and of all its descendants."""
    sizes = {}
    for pid in sorted(tree(root)):
        try:
            sizes[pid] = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_BYTES / 2**20
        except (OSError, ValueError):
            continue  # the process has ended
    return [(_name(pid), round(mib, 1)) for pid, mib in sizes.items()]


def _name(pid: int) -> str:
    """Return the name of the step that a process runs, such as `encoder`, or else of its program."""
    try:
        arguments = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except OSError:
        return str(pid)
    if len(arguments) > 1 and arguments[1].endswith("/model.py"):
        return Path(arguments[1]).parts[-3]
    return Path(arguments[0]).name
