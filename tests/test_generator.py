"""The load generator keeps its schedule, measures from it, and counts correctly."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections import Counter
from collections.abc import Iterator

import pytest

from aisle.errors import ServerError
from aisle.loadtest.generator import (
    WARM_UP,
    checked,
    closed,
    closed_blocking,
    open_loop,
    percentile,
    schedule,
    streamed,
)
from aisle.loadtest.locust.zipf import zipf

from .clock import VirtualClock

TEXTS = [f"text {i}" for i in range(500)]


def test_percentile_is_the_nearest_rank() -> None:
    latencies = [float(i) for i in range(1000, 0, -1)]
    assert [percentile(latencies, p) for p in (50, 95, 99, 99.9, 100)] == [500, 950, 990, 999, 1000]
    assert percentile([7.0], 99) == 7


def test_schedule_is_a_poisson_process() -> None:
    times = schedule(200, 50)
    assert times == schedule(200, 50)
    assert times != schedule(200, 50, seed=1)
    assert times == sorted(times)
    assert len(times) == pytest.approx(10_000, rel=0.05)
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert sum(gap > 1 / 200 for gap in gaps) / len(gaps) == pytest.approx(0.368, abs=0.03)  # 1 / e


def test_open_loop_sends_on_time_while_the_service_stalls(clock: VirtualClock) -> None:
    """A service that stalls still gets all calls, and their full waiting time counts."""
    sent: list[float] = []

    async def run() -> None:
        begin, opens = clock.now, clock.now + WARM_UP + 0.8

        async def stalled(text: str) -> None:
            sent.append(clock.now - begin)
            await asyncio.sleep(max(0.0, opens - clock.now))

        load = await open_loop(stalled, iter(TEXTS), 100, 0.6)
        due = [at for at in schedule(100, WARM_UP + 0.6) if at >= WARM_UP]
        assert sent == pytest.approx(schedule(100, WARM_UP + 0.6))
        # All were answered at one time, after the load's end.
        assert sorted(load.latencies) == pytest.approx(sorted(opens - begin - at for at in due))
        assert load.offered == 100
        assert load.texts_per_second == pytest.approx(len(due) / 0.8)

    asyncio.run(run())


def test_open_loop_counts_from_the_scheduled_time_when_the_sender_stalls(clock: VirtualClock) -> None:
    async def run() -> None:
        calls = itertools.count()

        async def blocking(text: str) -> None:
            if next(calls) == 120:
                clock.now += 0.3  # the whole process stands still: calls due meanwhile are sent late

        load = await open_loop(blocking, iter(TEXTS), 100, 1.0)
        # At 100 per second, some 30 calls were due in the 0.3 s; measured from sending, only one would show the delay.
        assert sum(latency > 0.05 for latency in load.latencies) > 10

    asyncio.run(run())


def test_failures_are_counted_and_have_no_latency(clock: VirtualClock) -> None:
    async def run() -> None:
        calls = itertools.count()

        async def flaky(text: str) -> None:
            await asyncio.sleep(0.001)
            if next(calls) % 4 == 0:
                raise ConnectionError

        load = await closed(flaky, itertools.cycle(TEXTS), 4, 0.2)
        assert load.failures == pytest.approx(len(load.latencies) / 3, abs=1)
        assert load.failures > 20
        load = await open_loop(flaky, iter(TEXTS), 100, 0.5)
        assert load.failures > 5
        assert load.failures + len(load.latencies) == sum(at >= WARM_UP for at in schedule(100, WARM_UP + 0.5))

    asyncio.run(run())


def test_closed_loop_keeps_as_many_calls_under_way_as_there_are_callers(clock: VirtualClock) -> None:
    async def run() -> None:
        under_way: list[int] = [0]
        seen: Counter[int] = Counter()

        async def batched(text: str) -> None:
            under_way[0] += 1
            seen[under_way[0]] += 1
            await asyncio.sleep(0.02)
            under_way[0] -= 1

        load = await closed(batched, itertools.cycle(TEXTS), 8, 0.2)
        assert max(seen) == 8
        assert len(load.latencies) % 8 == 0  # whole rounds
        assert load.texts_per_second * percentile(load.latencies, 50) == pytest.approx(8)  # Little's law

    asyncio.run(run())


class Refused(Exception):
    pass


def test_refusals_are_neither_answers_nor_failures(clock: VirtualClock) -> None:
    calls = itertools.count()

    def outcome() -> None:
        number = next(calls)
        if number % 4 == 1:
            raise Refused
        if number % 4 == 3:
            raise ConnectionError("lost")

    async def call(text: str) -> None:
        await asyncio.sleep(0.001)
        outcome()

    def blocking(text: str) -> None:
        clock.now += 0.001
        outcome()

    for load in (
        asyncio.run(closed(call, itertools.cycle(TEXTS), 4, 0.2, Refused)),
        asyncio.run(open_loop(call, iter(TEXTS), 100, 0.5, refusal=Refused)),
        closed_blocking(blocking, itertools.cycle(TEXTS), 4, 0.05, Refused),
    ):
        assert len(load.latencies) == pytest.approx(2 * len(load.refusals), abs=4)
        assert load.failures == pytest.approx(len(load.refusals), abs=4)
        assert str(load.error) == "lost"
        with pytest.raises(ServerError, match=r"\d+ calls failed; the first: lost"):
            checked(load)
        assert load.sent_per_second > load.texts_per_second


@pytest.mark.parametrize("callers", [1, 6])
def test_blocking_callers_keep_as_many_calls_under_way(callers: int) -> None:
    under_way, most, lock, started = 0, 0, threading.Lock(), itertools.count()
    together = threading.Barrier(callers, timeout=60)

    def texts() -> Iterator[str]:  # a generator: threads must not run it at the same time
        yield from itertools.cycle(TEXTS)

    def call(text: str) -> None:
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
            first = next(started) < callers
        if first:
            together.wait()  # which only as many calls at once can pass
        time.sleep(0.01)
        with lock:
            under_way -= 1

    load = closed_blocking(call, texts(), callers, 0.1)
    assert most == callers
    assert load.failures == 0
    assert len(load.latencies) % callers == 0  # whole rounds
    assert min(load.latencies) >= 0.01
    assert load.texts_per_second <= callers / 0.01 * 1.2


def test_a_stream_counts_whole_requests_and_completes_those_under_way() -> None:
    starts: set[int] = set()
    read, given = itertools.count(), itertools.count()

    def stream(texts: Iterator[int]) -> Iterator[int]:
        """Answer in groups of 8."""
        first = True
        while request := list(itertools.islice(texts, 8)):
            if first:
                starts.add(request[0])
            first = False
            time.sleep(0.01)
            for text in request:
                next(read)
                yield text
                next(given)

    load = streamed(stream, range(100), 2, 0.1, 8, failed=lambda answer: answer == 50)
    assert 0 < load.texts_per_second <= 2 * 8 / 0.01 * 1.2
    assert load.failures >= 1
    assert starts == {0, 50}  # each caller starts at another text
    assert next(read) == next(given)  # all that was sent was answered
    assert not load.latencies
    with pytest.raises(ConnectionError):
        streamed(broken_stream, range(100), 1, 0.1, 8)


def broken_stream(texts: Iterator[int]) -> Iterator[int]:
    yield next(texts)
    raise ConnectionError


def test_zipf() -> None:
    drawn = list(itertools.islice(zipf(TEXTS, 3), 20_000))
    assert drawn[:100] == list(itertools.islice(zipf(TEXTS, 3), 100))
    counts = [count for _, count in Counter(drawn).most_common()]
    assert counts[0] / counts[9] == pytest.approx(10, rel=0.3)
    uniform = Counter(itertools.islice(zipf(TEXTS, 3, exponent=0.0), 20_000))
    assert max(uniform.values()) < 80


@pytest.mark.usefixtures("clock")
def test_a_load_with_only_refusals_waits_for_an_answer() -> None:
    calls = itertools.count()

    async def call(text: str) -> None:
        await asyncio.sleep(0.001)
        if next(calls) < 200:
            raise Refused

    load = asyncio.run(closed(call, itertools.cycle(TEXTS), 4, 0.01, Refused))
    assert load.latencies
    assert len(load.refusals) > 150
