"""End the encoder's process when its GPU is lost, because every later batch would fail too."""

from __future__ import annotations

import os
import sys

from aisle.build.cuda_runtime import is_fatal


def end_if_lost(error: BaseException) -> None:
    """End this process if the error means that it has lost its GPU. `aisle serve` then starts a new process."""
    if not is_fatal(error):
        return
    print(f"this process has lost its GPU: {error}; it ends and is restarted", file=sys.stderr, flush=True)
    os._exit(1)  # Triton's stub catches SystemExit
