"""The processes of a server: list them, read their CPU time, pause and resume them."""

from __future__ import annotations

import os
import signal
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from aisle.errors import ServerError

TICKS = os.sysconf("SC_CLK_TCK")
PAUSE_SECONDS = 10.0  # a process must pause within this time
STOPPED, ENDED = "T", "ZX"  # states of a thread in /proc


def tree(root: int) -> set[int]:
    """Return a process and all its descendants, including those in other sessions."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ValueError):  # the process has ended
            parents[int(folder.name)] = int(_stat(folder)[1])
    found, size = {root} & parents.keys(), 0
    while len(found) > size:
        size = len(found)
        found |= {pid for pid, parent in parents.items() if parent in found}
    return found


def cpu_seconds(pid: int) -> float:
    """Return the CPU seconds that a process has used, in user mode and in the kernel.

    Raises:
        OSError: there is no such process.
    """
    fields = _stat(Path(f"/proc/{pid}"))
    return (int(fields[11]) + int(fields[12])) / TICKS


def cpu_of_steps(root: int) -> dict[str, float]:
    """Return the CPU seconds that Triton itself and the processes of each model have used, by name.

    Args:
        root: Triton's process, or one that started it.
    """
    found = defaultdict(float, {"triton": 0.0})
    for pid in tree(root):
        with suppress(OSError, IndexError):  # the process has ended
            program, *arguments = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
            if Path(program).name == "tritonserver":
                found["triton"] += cpu_seconds(pid)
            elif arguments and Path(arguments[0]).name == "model.py":  # …/MODEL/VERSION/model.py
                found[Path(arguments[0]).parts[-3]] += cpu_seconds(pid)
    return found


def pause(root: int) -> None:
    """Pause a process and all its descendants, and wait until every thread has stopped.

    Each process gets SIGSTOP, which cannot be blocked. Its threads are then not scheduled: it uses no CPU time and no
    memory bandwidth, and only keeps its memory. A signal to the process group would not reach Triton, which runs in
    its own session. Parents stop first, so that they cannot start new processes meanwhile.

    Raises:
        ServerError: a thread did not stop, for example in an uninterruptible system call.
    """
    deadline = time.monotonic() + PAUSE_SECONDS
    while running := [pid for pid in sorted(tree(root)) if not _is_stopped(pid)]:
        for pid in running:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
        if time.monotonic() > deadline:
            raise ServerError(f"the processes {running} did not pause within {PAUSE_SECONDS:.0f} s")
        time.sleep(0.002)


def resume(root: int) -> None:
    """Let a process and all its descendants run again, children first, so that no parent finds a stopped child."""
    for pid in sorted(tree(root), reverse=True):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


@contextmanager
def awake(root: int) -> Iterator[None]:
    """Let a paused process and all its descendants run within the context.

    Raises:
        ServerError: a process cannot be paused again.
    """
    resume(root)
    try:
        yield
    finally:
        pause(root)


@contextmanager
def all_paused(roots: list[int]) -> Iterator[None]:
    """Check that none of these paused processes ran within the context.

    Raises:
        ServerError: a process used CPU time.
    """
    before = {pid: cpu_seconds(pid) for root in roots for pid in tree(root) if not _ended(pid)}
    yield
    after = {pid: cpu_seconds(pid) for pid in before if not _ended(pid)}
    if busy := [pid for pid, seconds in after.items() if seconds > before[pid]]:
        raise ServerError(
            f"the processes {busy} ran while another system was measured; do not resume them during the run"
        )


def _stat(folder: Path) -> list[str]:
    """Return the fields of /proc/PID/stat that follow the process name, which may hold spaces."""
    return (folder / "stat").read_text().rpartition(")")[2].split()


def _is_stopped(pid: int) -> bool:
    """Return whether every thread of a process has stopped or ended."""
    try:
        states = [_stat(thread)[0] for thread in Path(f"/proc/{pid}/task").iterdir()]
    except OSError:
        return not Path(f"/proc/{pid}").exists() or _ended(pid)
    return all(state in STOPPED + ENDED for state in states)


def _ended(pid: int) -> bool:
    try:
        return _stat(Path(f"/proc/{pid}"))[0] in ENDED
    except OSError:
        return True
