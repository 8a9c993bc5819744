"""The process of a job: one `aisle` command, which the kernel stops if the desk is killed."""

from __future__ import annotations

import os
import runpy
import sys

from aisle.processes import end_with_parent

if __name__ == "__main__":
    end_with_parent()
    desk, *words = sys.argv[1:]
    if os.getppid() != int(desk):  # it was killed just before
        sys.exit(1)
    sys.argv = ["aisle", *words]
    runpy.run_module("aisle", run_name="__main__", alter_sys=True)  # as `python -m aisle`
