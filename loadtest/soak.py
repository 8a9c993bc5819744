"""Memory of a server over time: of every process below `aisle serve`, while load runs."""

from __future__ import annotations

import csv
import threading
import time
from pathlib import Path
from typing import Any

from aisle.errors import InputError

SAMPLE_SECONDS = 5.0
PAGE = 4096


class Memory:
    """Samples the resident memory, in MiB, of a process and all below it, into a CSV file.

    Shared pages count in each process that maps them (as RSS does): what matters here is the slope, not the sum.
    """

    def __init__(self, pid: int, path: Path) -> None:
        """Name the process.

        Raises:
            InputError: there is none of that number.
        """
        if not Path(f"/proc/{pid}").exists():
            raise InputError(f"no process {pid}; give that of `aisle serve`")
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
        """Return MiB at the end of the first third and at the end, and the growth between them in MiB an hour.

        The first third is left out: allocators, the response cache and lazily made buffers fill up in it.
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
    """Return name and resident MiB of a process and of all below it."""
    parents, sizes = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            sizes[int(folder.name)] = int((folder / "statm").read_text().split()[1]) * PAGE / 2**20
        except (OSError, ValueError):
            continue  # it ended meanwhile
    found, size = {root}, 0
    while len(found) > size:
        size = len(found)
        found |= {pid for pid, parent in parents.items() if parent in found}
    return [(_name(pid), round(sizes[pid], 1)) for pid in sorted(found) if pid in sizes]


def _name(pid: int) -> str:
    """Return `encoder` for a step's process, else what the program is called."""
    try:
        arguments = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except OSError:
        return str(pid)
    if len(arguments) > 1 and arguments[1].endswith("/model.py"):
        return Path(arguments[1]).parts[-3]
    return Path(arguments[0]).name
