"""gRPC and fork: a child opens new channels, and neither uses, closes nor frees those of its parent.

Closing an inherited channel would wait for threads that the child does not have. gRPC's asyncio needs a thread of the
process that started it, so the child of a process that has used it cannot use it.
"""

from __future__ import annotations

import os
import weakref
from typing import Any

from aisle.client.protocol import ClassifierError

_open: weakref.WeakSet[Any] = weakref.WeakSet()
_inherited: list[Any] = []  # never freed
_asyncio_process: int | None = None  # the process that first used gRPC's asyncio


def register_channel(channel: Any) -> Any:
    """Note that a new channel belongs to this process, and return it."""
    _open.add(channel)
    return channel


def claim_asyncio() -> None:
    """Note that this process uses gRPC's asyncio.

    Raises:
        ClassifierError: the parent process used it before the fork.
    """
    global _asyncio_process
    if _asyncio_process is None:
        _asyncio_process = os.getpid()
    if _asyncio_process != os.getpid():
        message = "an AsyncClassifier was used before this process was forked, and gRPC's asyncio does not support that"
        raise ClassifierError("", f"{message}; use it only in the children, or start them with spawn")


def _after_fork_in_child() -> None:
    _inherited.extend(_open)
    _open.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
