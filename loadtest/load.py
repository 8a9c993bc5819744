"""Load on a service, closed or open, and what its callers saw."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

Call = Callable[[Any], Awaitable[object]]  # what one call carries, a text or some, to its answer
WARM_UP = 1.0  # seconds at the start of an open load that do not count
PATIENCE = 60.0  # seconds after an open load's end in which answers still count; later ones are failures


@dataclass(frozen=True)
class Load:
    """What the callers saw while it counted; times in seconds."""

    latencies: Sequence[float]  # of the calls that were answered
    failures: int
    texts_per_second: float  # answered
    offered: float | None = None  # calls a second, in an open load


def percentile(latencies: Sequence[float], percent: float) -> float:
    """Return the least latency that `percent` of the calls did not exceed (nearest rank); NaN where there is none."""
    if not latencies:
        return math.nan
    rank = math.ceil(percent * len(latencies) / 100 - 1e-9)  # 99.9 % of 1000 are 999, whatever floats make of it
    return sorted(latencies)[max(rank, 1) - 1]


async def closed(call: Call, texts: Iterator[Any], callers: int, seconds: float) -> Load:
    """Have `callers` callers each send a text as soon as the last one is answered.

    It counts from when so many answers have come as there are callers, so that all are under way, for `seconds` or as
    long as it takes: whole rounds of so many answers as there are callers, since a service that batches answers in
    clumps.
    """
    ends: list[float] = []  # of all calls, as they come
    latencies: list[float] = []
    failures = 0
    begin = end = 0.0

    async def caller() -> None:
        nonlocal begin, end, failures
        while not end:
            start = time.perf_counter()
            failed = False
            try:
                await call(next(texts))
            except Exception:  # whatever the client raises is a failure; the caller goes on
                failed = True
                await asyncio.sleep(0)  # a call that fails at once must not keep the loop to itself
            now = time.perf_counter()
            if end:
                return  # it only waits for what is under way
            ends.append(now)
            if begin:
                failures += failed
                if not failed:
                    latencies.append(now - start)
            whole = len(ends) % callers == 0
            if not begin and whole:
                begin = now
            elif whole and now - begin >= seconds:
                end = now

    await asyncio.gather(*(caller() for _ in range(callers)))
    return Load(latencies, failures, len(latencies) / (end - begin))


def schedule(rate: float, seconds: float, seed: int = 0) -> list[float]:
    """Return the times, in seconds from the start, at which independent callers would call: a Poisson process."""
    rng, at, times = random.Random(seed), 0.0, []
    while (at := at + rng.expovariate(rate)) < seconds:
        times.append(at)
    return times


async def open_loop(call: Call, texts: Iterator[Any], rate: float, seconds: float, seed: int = 0) -> Load:
    """Send texts at their scheduled times, whether or not earlier ones are answered.

    Latency counts from the scheduled time: a text that is sent late because the service, or this process, held things
    up has waited all the same (Tene's "coordinated omission"). The first `WARM_UP` seconds do not count.
    """
    latencies: list[float] = []
    failures = 0
    last = WARM_UP
    start = time.perf_counter()

    async def send(due: float, text: Any) -> None:
        nonlocal failures, last
        try:
            await call(text)
        except Exception:
            failures += due >= WARM_UP
            return
        now = time.perf_counter() - start
        if due >= WARM_UP:
            latencies.append(now - due)
            last = max(last, now)

    under_way: set[asyncio.Task[None]] = set()
    for due in schedule(rate, WARM_UP + seconds, seed):
        if (early := start + due - time.perf_counter()) > 0:
            await asyncio.sleep(early)
        task = asyncio.create_task(send(due, next(texts)))
        under_way.add(task)
        task.add_done_callback(under_way.discard)
    late: set[asyncio.Task[None]] = set()
    if under_way:
        _, late = await asyncio.wait(set(under_way), timeout=PATIENCE)
        for task in late:
            task.cancel()
    counted = max(seconds, last - WARM_UP)  # answers that came after the end took longer than the load did
    return Load(latencies, failures + len(late), len(latencies) / counted, rate)
