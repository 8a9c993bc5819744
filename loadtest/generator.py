"""The load generator: closed and open loads, asyncio and blocking callers, streams; and the percentile.

It imports nothing outside the standard library and Aisle's errors, so a client in any environment can run it.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from aisle.errors import ServerError

T = TypeVar("T")
Call = Callable[[Any], Awaitable[object]]  # sends the content of one call and returns the answer
BlockingCall = Callable[[Any], object]
Refusal = type[Exception] | tuple[()]  # the exception types of a refused call; () if no call is refused
WARM_UP = 1.0  # seconds at the start of an open load that are not counted
GRACE = 60.0  # seconds after the end of an open load in which answers still count; later ones are failures


@dataclass(frozen=True)
class Load:
    """The result of a load: what its callers measured in the counted time. Times are in seconds."""

    latencies: Sequence[float]  # of the answered calls
    failures: int
    texts_per_second: float  # answered calls per second; multiply by the number of texts in a call
    offered: float | None = None  # calls per second that an open load schedules
    refusals: Sequence[float] = ()  # times until calls were refused; refusals do not count as failures
    sent_per_second: float = 0.0  # below `offered` if this process cannot keep the schedule
    cores: float = 0.0  # CPU seconds per second that this process used
    error: Exception | None = None  # the exception of the first failed call
    sent: int = 0  # all calls sent (for a stream: all texts), the uncounted ones included


def checked(load: Load) -> Load:
    """Return the load if none of its calls failed.

    Raises:
        ServerError: a call failed.
    """
    if load.failures:
        reason = f"; the first: {load.error}" if load.error else ""
        raise ServerError(f"{load.failures} calls failed{reason}") from load.error
    return load


def percentile(latencies: Iterable[float], percent: float) -> float:
    """Return the lowest latency that `percent` % of the calls did not exceed (nearest rank); NaN for no calls."""
    return percentile_of_counts(Counter(latencies), percent)


def percentile_of_counts(counts: Mapping[float, int], percent: float) -> float:
    """Return the same percentile of a histogram that maps each latency to its number of calls."""
    rank = percent / 100 * sum(counts.values()) - 1e-9  # a tolerance for rounding: 99.9 % of 1000 is 999
    seen = 0
    for latency in sorted(counts):
        seen += counts[latency]
        if seen >= rank:
            return latency
    return math.nan


class _Tally:
    """Counts the outcomes of calls, and the CPU time of this process."""

    def __init__(self, refusal: Refusal) -> None:
        self.latencies: list[float] = []
        self.refusals: list[float] = []
        self.failures = 0
        self.error: Exception | None = None
        self.sent = 0
        self._refusal = refusal
        self._start, self._cpu = time.perf_counter(), time.process_time()

    def add(self, latency: float, error: Exception | None) -> None:
        if error is None:
            self.latencies.append(latency)
        elif isinstance(error, self._refusal):
            self.refusals.append(latency)
        else:
            self.failures += 1
            self.error = self.error or error

    def load(self, seconds: float, sent_per_second: float | None = None, offered: float | None = None) -> Load:
        """Return the result; `seconds` is the counted time."""
        if sent_per_second is None:
            sent_per_second = (len(self.latencies) + len(self.refusals) + self.failures) / seconds
        return Load(
            self.latencies,
            self.failures,
            len(self.latencies) / seconds,
            offered,
            self.refusals,
            sent_per_second,
            (time.process_time() - self._cpu) / (time.perf_counter() - self._start),
            self.error,
            self.sent,
        )


class _ClosedWindow:
    """Decides which calls of a closed load count. Thread-safe.

    A round is as many answers as there are callers. Counting starts after the first round, when every caller has sent a
    call. It ends with the first full round after `seconds`, because a service that batches answers in bursts.
    """

    def __init__(self, callers: int, seconds: float, refusal: Refusal) -> None:
        self.over = False
        self._callers, self._seconds = callers, seconds
        self._tally = _Tally(refusal)
        self._begin = self._end = 0.0
        self._lock = threading.Lock()

    def add(self, start: float, error: Exception | None) -> None:
        """Record that a call that started at `start` has just ended."""
        with self._lock:
            now = time.perf_counter()
            self._tally.sent += 1
            if self.over:
                return
            if self._begin:
                self._tally.add(now - start, error)
            full_round = self._tally.sent % self._callers == 0
            if full_round and not self._begin:
                self._begin = now
            elif full_round and now - self._begin >= self._seconds + self._extra_seconds():
                self._end, self.over = now, True

    def _extra_seconds(self) -> float:
        """Return the extra time to wait for a first answer if all calls so far were refused."""
        return GRACE if self._tally.refusals and not self._tally.latencies else 0.0

    def load(self) -> Load:
        return self._tally.load(self._end - self._begin)


async def closed(call: Call, texts: Iterator[Any], callers: int, seconds: float, refusal: Refusal = ()) -> Load:
    """Run a closed load: each of `callers` callers sends its next text as soon as its last one is answered.

    The load counts for `seconds`, or longer if a round of answers takes longer. `texts` must be endless.
    """
    window = _ClosedWindow(callers, seconds, refusal)

    async def caller() -> None:
        while not window.over:
            start, error = time.perf_counter(), None
            try:
                await call(next(texts))
            except Exception as caught:  # any exception of the client is a failure; the caller continues
                error = caught
                await asyncio.sleep(0)  # a call that fails at once must not block the event loop
            window.add(start, error)

    await asyncio.gather(*(caller() for _ in range(callers)))
    return window.load()


def closed_blocking(
    call: BlockingCall, texts: Iterator[Any], callers: int, seconds: float, refusal: Refusal = ()
) -> Load:
    """Run a closed load with a blocking call. Each caller is a thread; a single caller runs in this thread."""
    window, lock = _ClosedWindow(callers, seconds, refusal), threading.Lock()

    def caller(_: int = 0) -> None:
        while not window.over:
            with lock:  # threads cannot share a generator without a lock
                text = next(texts)
            start, error = time.perf_counter(), None
            try:
                call(text)
            except Exception as caught:
                error = caught
            window.add(start, error)

    if callers == 1:
        caller()
    else:
        with ThreadPoolExecutor(callers) as pool:
            list(pool.map(caller, range(callers)))
    return window.load()


def streamed(
    stream: Callable[[Iterator[T]], Iterable[object]],
    texts: Sequence[T],
    callers: int,
    seconds: float,
    batch: int,
    failed: Callable[[object], bool] = lambda answer: False,
) -> Load:
    """Run a load of streams: each of `callers` threads sends endless texts through its own stream, as for a file.

    Each thread counts from its first answer to the first answer of a request after `seconds`. A request holds `batch`
    texts, and only complete requests count. A stream has throughput but no latencies.
    """
    tallies = [_StreamTally(seconds, batch, failed) for _ in range(callers)]
    start, cpu = time.perf_counter(), time.process_time()

    def caller(number: int) -> None:
        tally = tallies[number]
        own = itertools.islice(itertools.cycle(texts), number * len(texts) // callers, None)
        for answer in stream(itertools.takewhile(lambda _: not tally.over, own)):
            tally.add(answer)  # after the end, only the requests under way are completed

    with ThreadPoolExecutor(callers) as pool:
        list(pool.map(caller, range(callers)))
    rate = sum(tally.answered_per_second for tally in tallies)
    cores = (time.process_time() - cpu) / (time.perf_counter() - start)
    failures, sent = sum(tally.failures for tally in tallies), sum(tally.sent for tally in tallies)
    return Load((), failures, rate, sent_per_second=rate, cores=cores, sent=sent)


class _StreamTally:
    """Counts the answers of one stream."""

    def __init__(self, seconds: float, batch: int, failed: Callable[[object], bool]) -> None:
        self.over = False
        self.failures = 0
        self.sent = 0
        self.answered_per_second = 0.0
        self._seconds, self._batch, self._failed = seconds, batch, failed
        self._begin = 0.0
        self._seen = 0

    def add(self, answer: object) -> None:
        self.sent += 1
        if self.over:
            return
        if self._seen % self._batch == 0:
            now = time.perf_counter()
            self._begin = self._begin or now
            if now - self._begin >= self._seconds and self._seen:
                self.answered_per_second = (self._seen - self.failures) / (now - self._begin)
                self.over = True
                return
        self._seen += 1
        self.failures += self._failed(answer)


def schedule(rate: float, seconds: float, seed: int = 0) -> list[float]:
    """Return the times, in seconds from the start, at which independent callers would call: a Poisson process."""
    rng, at, times = random.Random(seed), 0.0, []
    while (at := at + rng.expovariate(rate)) < seconds:
        times.append(at)
    return times


async def open_loop(
    call: Call, texts: Iterator[Any], rate: float, seconds: float, seed: int = 0, refusal: Refusal = ()
) -> Load:
    """Send texts at their scheduled times, whether or not earlier ones are answered.

    Latency counts from the scheduled time, so the delay of a text that is sent late, because the service or this
    process was slow, is included (see Gil Tene's "coordinated omission"). The first `WARM_UP` seconds do not count.
    """
    times = schedule(rate, WARM_UP + seconds, seed)
    tally = _Tally(refusal)
    tally.sent = len(times)
    start = time.perf_counter()
    last_answer = last_sent = WARM_UP

    async def send(due: float, text: Any) -> None:
        nonlocal last_answer
        error = None
        try:
            await call(text)
        except Exception as caught:
            error = caught
        now = time.perf_counter() - start
        if due >= WARM_UP:
            tally.add(now - due, error)
            last_answer = max(last_answer, now if error is None else 0.0)

    under_way: set[asyncio.Task[None]] = set()
    for due in times:
        await asyncio.sleep(max(0.0, start + due - time.perf_counter()))  # even 0 s lets the event loop read answers
        last_sent = max(last_sent, time.perf_counter() - start)
        task = asyncio.create_task(send(due, next(texts)))
        under_way.add(task)
        task.add_done_callback(under_way.discard)
    unanswered = await _wait_for(under_way)
    tally.failures += unanswered
    counted = max(seconds, last_answer - WARM_UP)  # answers may arrive after the end of the load
    sent = sum(due >= WARM_UP for due in times) / max(seconds, last_sent - WARM_UP)
    return tally.load(counted, sent, rate)


async def _wait_for(under_way: set[asyncio.Task[None]]) -> int:
    """Wait for the calls under way; cancel and count the calls without an answer within `GRACE`."""
    if not under_way:
        return 0
    _, late = await asyncio.wait(set(under_way), timeout=GRACE)
    for task in late:
        task.cancel()
    return len(late)
