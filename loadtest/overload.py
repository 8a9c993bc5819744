"""Measure how a server behaves when it gets more requests than it can serve, in an open load."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, aclosing
from pathlib import Path
from typing import Any

from aisle.client import AsyncClassifier, Overloaded
from aisle.errors import InputError, ServerError
from aisle.loadtest.generator import Load, closed, open_loop, percentile
from aisle.preprocess.clean import prepare
from aisle.preprocess.tables.table import read_labelled
from aisle.preprocess.values import TextError

CAPACITY_CALLERS = 64  # enough to fill every batch
CLIENTS = 16  # each client limits its own calls under way, so a single client would not be an open load


def overload(data: Path, text_column: str, url: str, times: float, seconds: int) -> dict[str, Any]:
    """Measure five phases of `seconds` each.

    The phases are: one caller; one caller beside a file; enough callers to fill the server; an open load of `times`
    that throughput; and one caller again. Latencies of the open load count from the scheduled times of the calls.

    Each text gets a new ending, so the response cache does not answer it. If `sent_per_second` of the overload is below
    `offered_per_second`, this process is too slow, and the latencies include its own delay. `sender_cores` is the CPU
    time of sending; if sender and server share a machine, the server has that much less.

    Raises:
        InputError: the table has no text that can be classified.
        ClassifierError: no server answers.
        ServerError: no call of the callers that fill the server was answered.
    """
    texts = [text for text, _ in read_labelled(data, text_column, text_column) if text and _usable(text)]
    if not texts:
        raise InputError(f"{data} has no text that can be classified")
    random.Random(0).shuffle(texts)  # in a table sorted by category, the phases would get texts of different lengths
    return asyncio.run(_phases(texts, url, times, seconds))


async def _phases(texts: Sequence[str], url: str, times: float, seconds: int) -> dict[str, Any]:
    numbered = _numbered(texts)
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(AsyncClassifier(url, retries=0)) for _ in range(CLIENTS)]
        await clients[0].classify(["warm-up"])
        in_turn = itertools.cycle(clients)

        async def call(text: str) -> None:
            await clients[0].classify([text])

        async def call_in_turn(text: str) -> None:
            await next(in_turn).classify([text])

        async def callers(count: int) -> Load:
            return await closed(call, numbered, count, seconds, Overloaded)

        unloaded = await callers(1)
        file = asyncio.create_task(_send_file(url, numbered))
        beside = await callers(1)
        file.cancel()
        await asyncio.wait([file])
        capacity = await callers(CAPACITY_CALLERS)
        if not capacity.latencies:
            raise ServerError(f"no call of {CAPACITY_CALLERS} callers was answered; is the server up?")
        rate = times * capacity.texts_per_second
        over = await open_loop(call_in_turn, numbered, rate, seconds, refusal=Overloaded)
        after = await callers(1)
    phases = {"unloaded": unloaded, "beside_file": beside, "capacity": capacity, "overload": over, "after": after}
    return {"offered_per_second": round(rate, 1), **{name: figures(load) for name, load in phases.items()}}


def _numbered(texts: Sequence[str]) -> Iterator[str]:
    """Yield the texts endlessly, each time with another ending."""
    for number in itertools.count(time.time_ns() // 1000):
        yield f"{texts[number % len(texts)]} {number}"


async def _send_file(url: str, texts: Iterator[str]) -> None:
    """Stream texts, as for a file, until cancelled."""
    async with AsyncClassifier(url) as client, aclosing(client.stream(texts)) as rows:
        async for _ in rows:
            pass


def figures(load: Load) -> dict[str, Any]:
    """Return the figures of a phase; latencies are None if no call was answered (or refused)."""

    def milliseconds(times: Sequence[float], percent: float) -> float | None:
        return round(1e3 * percentile(times, percent), 1) if times else None

    return {
        "sent_per_second": round(load.sent_per_second, 1),
        "texts_per_second": round(load.texts_per_second, 1),
        "p50_ms": milliseconds(load.latencies, 50),
        "p99_ms": milliseconds(load.latencies, 99),
        "refused": len(load.refusals),
        "refused_p99_ms": milliseconds(load.refusals, 99),
        "failed": load.failures,
        "sender_cores": round(load.cores, 2),
    }


def _usable(text: str) -> bool:
    try:
        prepare(text)
    except TextError:
        return False
    return True
