"""The load generator: keeps its schedule, counts from it, and counts right."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter

import pytest

from aisle.loadtest.load import WARM_UP, closed, open_loop, percentile, schedule
from aisle.loadtest.zipf import zipf

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


def test_open_loop_sends_on_time_whatever_the_service_does() -> None:
    """A service that answers nothing for a while still gets all calls, and each call's wait counts in full."""
    loop_times: list[float] = []

    async def run() -> None:
        opens = asyncio.get_running_loop().time() + WARM_UP + 0.8

        async def stalled(text: str) -> None:
            loop_times.append(asyncio.get_running_loop().time())
            await asyncio.sleep(max(0.0, opens - asyncio.get_running_loop().time()))

        load = await open_loop(stalled, iter(TEXTS), 100, 0.6)
        due = [at for at in schedule(100, WARM_UP + 0.6) if at >= WARM_UP]
        assert len(loop_times) == len(schedule(100, WARM_UP + 0.6))
        assert len(load.latencies) == len(due)
        assert load.offered == 100
        # All were answered at one time, after the load's end.
        assert max(load.latencies) - min(load.latencies) == pytest.approx(due[-1] - due[0], abs=0.05)
        assert load.texts_per_second <= len(due) / 0.75

    asyncio.run(run())


def test_open_loop_counts_from_the_scheduled_time_where_the_sender_itself_is_held_up() -> None:
    import time

    async def run() -> None:
        calls = itertools.count()

        async def blocking(text: str) -> None:
            if next(calls) == 120:
                time.sleep(0.3)  # the whole process stands still: calls due meanwhile are sent late

        load = await open_loop(blocking, iter(TEXTS), 100, 1.0)
        # At 100 a second, some 30 calls were due in the 0.3 s; at most the blocking one would show it otherwise.
        assert sum(latency > 0.05 for latency in load.latencies) > 10

    asyncio.run(run())


def test_failures_are_counted_and_have_no_latency() -> None:
    async def run() -> None:
        calls = itertools.count()

        async def flaky(text: str) -> None:
            await asyncio.sleep(0.001)
            if next(calls) % 4 == 0:
                raise ConnectionError

        load = await closed(flaky, itertools.cycle(TEXTS), 4, 0.2)
        assert load.failures == pytest.approx(len(load.latencies) / 3, rel=0.2)
        load = await open_loop(flaky, iter(TEXTS), 100, 0.5)
        assert load.failures > 5
        assert load.failures + len(load.latencies) == sum(at >= WARM_UP for at in schedule(100, WARM_UP + 0.5))

    asyncio.run(run())


def test_closed_loop_keeps_as_many_calls_under_way_as_there_are_callers() -> None:
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
        assert load.texts_per_second * percentile(load.latencies, 50) == pytest.approx(8, rel=0.5)  # Little's law

    asyncio.run(run())


def test_zipf() -> None:
    drawn = list(itertools.islice(zipf(TEXTS, 3), 20_000))
    assert drawn[:100] == list(itertools.islice(zipf(TEXTS, 3), 100))
    counts = [count for _, count in Counter(drawn).most_common()]
    assert counts[0] / counts[9] == pytest.approx(10, rel=0.3)
    uniform = Counter(itertools.islice(zipf(TEXTS, 3, exponent=0.0), 20_000))
    assert max(uniform.values()) < 80
