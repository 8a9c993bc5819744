"""The process of a job: one `aisle` command, which the kernel stops if the desk is killed."""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys

if __name__ == "__main__":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    desk, *words = sys.argv[1:]
    if os.getppid() != int(desk):  # it was killed just before
        sys.exit(1)
    sys.argv = ["aisle", *words]
    runpy.run_module("aisle", run_name="__main__", alter_sys=True)  # as `python -m aisle`
