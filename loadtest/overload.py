"""What a server does with more than it can serve: an open loop, whose callers come whether or not others wait."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from aisle.client import AsyncClassifier, ClassifierError, Overloaded
from aisle.errors import InputError
from aisle.preprocess.clean import TextError, prepare
from aisle.preprocess.table import read_labelled

CAPACITY_CALLERS = 64  # enough to fill every batch
CLIENTS = 16  # each holds some calls back, as it should; strangers do not wait for each other


@dataclass
class Phase:
    """What became of the calls of one phase: seconds of the answered ones, and counts of the others."""

    answered: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    failed: int = 0
    seconds: float = 0.0
    cores: float = 0.0  # that sending took, of this process

    def figures(self) -> dict[str, Any]:
        def p99(times: list[float]) -> float | None:
            return round(float(np.percentile(times, 99)) * 1e3, 1) if times else None

        return {
            "sent_per_second": round((len(self.answered) + len(self.refused) + self.failed) / self.seconds, 1),
            "texts_per_second": round(len(self.answered) / self.seconds, 1),
            "p50_ms": round(float(np.median(self.answered)) * 1e3, 1) if self.answered else None,
            "p99_ms": p99(self.answered),
            "refused": len(self.refused),
            "refused_p99_ms": p99(self.refused),
            "failed": self.failed,
            "sender_cores": round(self.cores, 2),
        }


def overload(data: Path, text_column: str, url: str, times: float, seconds: int) -> dict[str, Any]:
    """Measure one caller, one beside a file, as many as fill the server, `times` that rate, and one; `seconds` each.

    Every text is sent once more with another ending, so that the response cache does not answer it. Where
    `sent_per_second` of the overload stays below `offered_per_second`, this process is the slow one, and its latencies
    say nothing of the server. On the server's own machine, `sender_cores` are what the sending takes from it.

    Raises:
        InputError: the table has no text that can be classified.
        ClassifierError: no server answers.
    """
    texts = [text for text, _ in read_labelled(data, text_column, text_column) if text and _usable(text)]
    if not texts:
        raise InputError(f"{data} has no text that can be classified")
    random.Random(0).shuffle(texts)  # in a table sorted by category each phase would get texts of other lengths
    return asyncio.run(_overload(texts, url, times, seconds))


async def _overload(texts: list[str], url: str, times: float, seconds: int) -> dict[str, Any]:
    numbers = itertools.count(time.time_ns() // 1000)
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(AsyncClassifier(url, retries=0)) for _ in range(CLIENTS)]
        await clients[0].classify(["warm-up"])

        def new() -> str:
            number = next(numbers)
            return f"{texts[number % len(texts)]} {number}"

        async def call(phase: Phase, client: AsyncClassifier = clients[0]) -> None:
            start = time.perf_counter()
            try:
                await client.classify([new()])
                phase.answered.append(time.perf_counter() - start)
            except Overloaded:
                phase.refused.append(time.perf_counter() - start)
            except ClassifierError:
                phase.failed += 1

        def end(phase: Phase, start: float, work: float) -> Phase:
            phase.seconds = time.perf_counter() - start
            phase.cores = (time.process_time() - work) / phase.seconds
            return phase

        async def closed(callers: int) -> Phase:
            """Each caller asks again as soon as it has its answer."""
            phase, start, work = Phase(), time.perf_counter(), time.process_time()

            async def ask() -> None:
                while time.perf_counter() - start < seconds:
                    await call(phase)

            await asyncio.gather(*(ask() for _ in range(callers)))
            return end(phase, start, work)

        async def open_loop(rate: float) -> Phase:
            """Callers come at a steady rate, as on a street."""
            phase, start, work, tasks = Phase(), time.perf_counter(), time.process_time(), set()
            for number in itertools.count():
                late = start + number / rate - time.perf_counter()
                if number / rate > seconds:
                    break
                if late > 0 or number % 16 == 0:
                    await asyncio.sleep(max(0.0, late))
                task = asyncio.create_task(call(phase, clients[number % CLIENTS]))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            end(phase, start, work)
            await asyncio.gather(*tasks)
            return phase

        async def file() -> None:
            async with (
                AsyncClassifier(url) as client,
                aclosing(client.stream(new() for _ in itertools.count())) as rows,
            ):
                async for _ in rows:
                    pass

        unloaded = await closed(1)
        bulk = asyncio.create_task(file())
        beside = await closed(1)
        bulk.cancel()
        await asyncio.wait([bulk])
        capacity = await closed(CAPACITY_CALLERS)
        rate = times * len(capacity.answered) / capacity.seconds
        over = await open_loop(rate)
        after = await closed(1)
    return {
        "offered_per_second": round(rate, 1),
        "unloaded": unloaded.figures(),
        "beside_file": beside.figures(),
        "capacity": capacity.figures(),
        "overload": over.figures(),
        "after": after.figures(),
    }


def _usable(text: str) -> bool:
    try:
        prepare(text)
    except TextError:
        return False
    return True
