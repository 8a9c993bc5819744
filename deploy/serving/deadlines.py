"""Deadlines of requests. Triton's ensemble passes neither deadline nor cancellation to its steps, so callers send them.

With each request, Aisle's client sends its name, the time of sending and how long it waits (`caller`, `sent_us`,
`wait_us`). Its clock may differ from the server's. So the fastest request of each caller is assumed to have a travel
time of 0, and travel times of other requests are measured relative to it. Other clients may send `wait_us` alone, or
Triton's own `timeout`; both count from the arrival of the request. A request without any of these has no deadline.
"""

from __future__ import annotations

import json
import math
import time
from collections import OrderedDict

MAX_CALLERS = 10_000  # whose clocks are remembered
MAX_NAME_LENGTH = 64  # characters of a caller's name
REMEASURE_SECONDS = 600.0  # a caller's clock is measured again after this time, because clocks drift


class CallerClocks:
    """The offsets of the callers' clocks."""

    def __init__(self) -> None:
        self._smallest: OrderedDict[str, tuple[float, float]] = OrderedDict()  # (smallest apparent age, time measured)

    def timeout(self, parameters: str, timeout_us: int = 0) -> float:
        """Return for how many seconds from now the caller of a request will wait; infinity without a deadline.

        Call this when the request arrives, because time in a queue is not travel time.

        Args:
            parameters: the request's parameters, as JSON.
            timeout_us: Triton's own timeout, which a caller may set; 0 if it is not set.
        """
        sent = json.loads(parameters) if '"wait_us"' in parameters else {}
        wait = sent.get("wait_us", timeout_us)
        if isinstance(wait, bool) or not isinstance(wait, int) or wait <= 0:
            return math.inf
        return wait / 1e6 - self._travel_time(sent.get("caller"), sent.get("sent_us"))

    def _travel_time(self, caller: object, sent: object) -> float:
        """Return a request's travel time in seconds beyond that of its caller's fastest request."""
        if not (isinstance(caller, str) and isinstance(sent, int)) or len(caller) > MAX_NAME_LENGTH:
            return 0.0
        now = time.time()
        age = now - sent / 1e6
        smallest, since = self._smallest.get(caller, (age, now))
        if age < smallest or now - since > REMEASURE_SECONDS:
            smallest, since = age, now
        self._smallest[caller] = smallest, since
        self._smallest.move_to_end(caller)
        if len(self._smallest) > MAX_CALLERS:
            self._smallest.popitem(last=False)
        return age - smallest
