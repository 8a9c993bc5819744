"""Requests whose callers have left: Triton's ensemble tells its steps neither deadline nor cancellation, callers do.

With each request a caller sends who it is, when it sent and how long it waits. Its clock need not be the server's: the
one of its requests that seems to have travelled least did so in next to no time; the others are held against that one.
"""

from __future__ import annotations

import json
import time
from collections import OrderedDict

REMEMBERED = 10_000  # callers
LONGEST = 64  # characters of a caller's name
AGAIN = 600.0  # seconds after which a caller's clock is compared anew: clocks drift


class Callers:
    """What is known of the callers' clocks."""

    def __init__(self) -> None:
        self._least: OrderedDict[str, tuple[float, float]] = OrderedDict()  # (age that seemed least, since when)

    def gone(self, parameters: str) -> bool:
        """Tell whether the sender of a request has stopped waiting for it.

        Args:
            parameters: the request's, as JSON; without all of `caller`, `sent_us` and `wait_us` nobody has left.
        """
        if '"caller"' not in parameters:
            return False
        told = json.loads(parameters)
        caller, sent, wait = (told.get(name) for name in ("caller", "sent_us", "wait_us"))
        if not (isinstance(caller, str) and isinstance(sent, int) and isinstance(wait, int)) or len(caller) > LONGEST:
            return False
        now = time.time()
        age = now - sent / 1e6
        least, since = self._least.get(caller, (age, now))
        if age < least or now - since > AGAIN:
            least, since = age, now
        self._least[caller] = least, since
        self._least.move_to_end(caller)
        if len(self._least) > REMEMBERED:
            self._least.popitem(last=False)
        return age - least > wait / 1e6
