"""Threads that send answers, so that the engine does not wait for them.

Sending an answer is a blocking round trip to Triton. Most of it runs without Python's global lock.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

Item = TypeVar("Item")
THREADS = 4


class Senders(Generic[Item]):
    """Sends items from several threads, in no particular order."""

    def __init__(self, send: Callable[[Item], None], capacity: int, threads: int = THREADS) -> None:
        """Start the threads.

        Args:
            send: sends one item. Its errors are dropped, because there is no other way to reach the caller.
            capacity: number of items that may wait to be sent. `put` blocks until there is room.
            threads: number of sending threads.
        """
        self._send, self._threads = send, threads
        self._pool = ThreadPoolExecutor(threads, "sender")
        self._room = threading.BoundedSemaphore(max(capacity, threads))
        self._capacity = max(capacity, threads)

    def put(self, items: Sequence[Item]) -> None:
        """Queue items, divided among the threads. Return when all are queued, before they are sent."""
        for start in range(0, len(items), self._capacity):
            part = items[start : start + self._capacity]
            for share in (part[i :: self._threads] for i in range(min(self._threads, len(part)))):
                for _ in share:
                    self._room.acquire()
                self._pool.submit(self._send_all, share)

    def close(self) -> None:
        """Send all queued items, then end the threads."""
        self._pool.shutdown()

    def _send_all(self, items: Sequence[Item]) -> None:
        for item in items:
            with contextlib.suppress(Exception):  # an item that cannot be sent must not delay the others
                self._send(item)
            self._room.release()
