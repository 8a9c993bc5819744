"""List Triton's Python processes in Linux's /proc."""

from __future__ import annotations

import contextlib
from pathlib import Path

from aisle.build.repository import PYTHON_MODELS
from aisle.deploy.server.served_repository import ENSEMBLES

Step = tuple[str, int]  # a model and its version


def step_processes(triton: int) -> dict[int, Step]:
    """Return the running Python processes of Triton: process id to the model and version that it runs."""
    found = {}
    for children in Path(f"/proc/{triton}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for pid in map(int, children.read_text().split()):
                with contextlib.suppress(OSError, IndexError, ValueError):
                    state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
                    model = Path(Path(f"/proc/{pid}/cmdline").read_text().split("\0")[1])  # …/MODEL/VERSION/model.py
                    if state != "Z" and model.parts[-3] in (*PYTHON_MODELS, *ENSEMBLES):
                        found[pid] = (model.parts[-3], int(model.parts[-2]))
    return found
