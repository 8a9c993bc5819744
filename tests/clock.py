"""A clock that passes only where all tasks wait: what a test measures by it is the same on any machine."""

from __future__ import annotations

import asyncio
import selectors
from types import SimpleNamespace
from typing import Any

import pytest


class VirtualClock:
    """The time, in seconds, of event loops and of modules that were given it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def loop(self) -> asyncio.AbstractEventLoop:
        """Return an event loop that, where it would wait, sets this clock forward instead."""
        loop: Any = asyncio.SelectorEventLoop(_Selector(self))
        loop.time = lambda: self.now
        return loop  # type: ignore[no-any-return]

    def take_over(self, patch: pytest.MonkeyPatch, module: Any) -> None:
        """Have `asyncio.run` and a module's `time.perf_counter` go by this clock."""
        patch.setattr(asyncio.events, "new_event_loop", self.loop)
        patch.setattr(
            module,
            "time",
            SimpleNamespace(perf_counter=lambda: self.now, process_time=lambda: self.now),
        )


class _Selector(selectors.DefaultSelector):
    def __init__(self, clock: VirtualClock) -> None:
        super().__init__()
        self._clock = clock

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Return what is ready; `timeout` passes at once. Without one, only another thread can end the wait."""
        if timeout is None:
            return super().select(None)
        self._clock.now += max(0.0, timeout)
        return super().select(0)
