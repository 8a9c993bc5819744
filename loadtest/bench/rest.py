"""Measure what the REST front costs: the same requests over REST and over gRPC, to the same server."""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import aiohttp

from aisle.client import AsyncClassifier
from aisle.console import track
from aisle.deploy.server.triton import free_ports
from aisle.loadtest.bench import host, systems
from aisle.loadtest.bench.paired import Paired, ratios
from aisle.loadtest.bench.services import built
from aisle.loadtest.generator import Call, Load, checked, closed, percentile
from aisle.loadtest.processes import cpu_seconds, tree
from aisle.report import Page

GRPC, REST = "gRPC", "REST"
SERVED, NONE = "INT8", "none"
BATCH = 64  # texts per request
CALLERS = (1, 8, 32)
SIZE = "4x256"  # of the default model: a distilled one, beside which the front costs more than beside a BERT-base
TIMEOUT = 60.0  # seconds

Slice = dict[str, Any]


def measure(
    checkpoint: Path, texts: Sequence[str], work: Path, seconds: float, rounds: int, random_weights: bool
) -> dict[str, Any]:
    """Measure both protocols in turn under each load, in slices of `seconds`, round after round.

    This is done with two engines: that of the checkpoint, and one that computes nothing, beside which the cost of the
    front is as large as it can be. Both protocols use the same client process.

    Raises:
        ServerError: a server did not start, or a call failed.
    """
    repository = built(checkpoint, work / "rest", random_weights)
    rows, compared = [], []
    for engine, starting in ((SERVED, _served(repository, work)), (NONE, _without_engine(checkpoint, texts, work))):
        with starting as (url, pid), front(url, work / "rest.log") as (address, front_pid):
            targets, pids = {GRPC: url, REST: address}, {"server": pid, "front": front_pid}
            slices = _in_turn(targets, pids, texts, seconds, rounds)
        rows += [_median(engine, *key, found) for key, found in slices.items()]
        for callers in CALLERS:
            ratio = ratios(*([each["texts_per_second"] for each in slices[system, callers]] for system in (REST, GRPC)))
            if ratio:
                compared.append({"engine": engine, "callers": callers, **ratio.as_dict()})
    return {"rows": rows, "ratios": compared, "seconds": seconds, "rounds": rounds}


def _in_turn(
    targets: dict[str, str], pids: dict[str, int], texts: Sequence[str], seconds: float, rounds: int
) -> dict[tuple[str, int], list[Slice]]:
    found: defaultdict[tuple[str, int], list[Slice]] = defaultdict(list)
    for number in track(range(rounds), "gRPC and REST, in turn", rounds):
        for callers in CALLERS:
            for system in (GRPC, REST) if number % 2 else (REST, GRPC):
                found[system, callers].append(run(system, targets[system], pids, texts, callers, seconds))
    return found


@contextmanager
def _served(repository: Path, work: Path) -> Iterator[tuple[str, int]]:
    """Serve the checkpoint's engine; yield gRPC's address and the server's process."""
    with systems.aisle(repository, work / "logs" / "aisle.log") as service:
        yield f"127.0.0.1:{service.port}", service.process.pid


@contextmanager
def _without_engine(checkpoint: Path, texts: Sequence[str], work: Path) -> Iterator[tuple[str, int]]:
    with host.aisle(checkpoint, texts, work) as service:
        yield service.url, service.pid


@contextmanager
def front(url: str, log: Path) -> Iterator[tuple[str, int]]:
    """Run `aisle rest` for a server; yield its address and its process.

    Raises:
        ServerError: it did not start.
    """
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "aisle", "rest", "--url", url, "--port", str(port)]
    with systems.running("the REST front", command, f"http://127.0.0.1:{port}/v1/health", log) as process:
        yield f"http://127.0.0.1:{port}/v1/classify", process.pid


def run(system: str, target: str, pids: dict[str, int], texts: Sequence[str], callers: int, seconds: float) -> Slice:
    """Send requests for a while; return the throughput, the latency, and the CPU time of each process per text.

    Args:
        target: gRPC's HOST:PORT, or the URL of REST.
        pids: the processes whose CPU time counts, with their descendants, by name.
    """
    before, own = _cpu(pids), time.process_time()
    load = asyncio.run(_load(system, target, texts, callers, seconds))
    used = {**_cpu(pids), "client": time.process_time()}
    before["client"] = own
    count = BATCH * load.sent
    return {
        "texts_per_second": BATCH * load.texts_per_second,
        "p50_ms": 1e3 * percentile(load.latencies, 50),
        "cpu_us": {name: 1e6 * (value - before.get(name, 0.0)) / count for name, value in used.items()},
    }


def _cpu(pids: dict[str, int]) -> dict[str, float]:
    """Return the CPU seconds that each process and its descendants have used."""
    return {name: sum(map(cpu_seconds, tree(pid))) for name, pid in pids.items()}


async def _load(system: str, target: str, texts: Sequence[str], callers: int, seconds: float) -> Load:
    batches = [[*texts[start : start + BATCH]] for start in range(0, len(texts) - BATCH + 1, BATCH)]
    if system == GRPC:
        async with AsyncClassifier(target, timeout=TIMEOUT) as classifier:
            return checked(await closed(classifier.classify, itertools.cycle(batches), callers, seconds))
    connector, limit = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(TIMEOUT)
    async with aiohttp.ClientSession(connector=connector, timeout=limit, raise_for_status=True) as session:
        return checked(await closed(_post(session, target), itertools.cycle(batches), callers, seconds))


def _post(session: aiohttp.ClientSession, url: str) -> Call:
    """Return a call that sends texts and reads the answers. As over gRPC, encoding is part of the client's cost."""

    async def post(texts: list[str]) -> object:
        body = json.dumps({"texts": texts}, ensure_ascii=False).encode()
        async with session.post(url, data=body, headers={"Content-Type": "application/json"}) as answer:
            return json.loads(await answer.read())

    return post


def _median(engine: str, system: str, callers: int, slices: Sequence[Slice]) -> dict[str, Any]:
    speeds = [each["texts_per_second"] for each in slices]
    return {
        "engine": engine,
        "system": system,
        "callers": callers,
        "texts_per_second": median(speeds),
        "spread": [min(speeds), max(speeds)],
        "p50_ms": median(each["p50_ms"] for each in slices),
        "cpu_us": {name: round(median(each["cpu_us"][name] for each in slices), 1) for name in slices[0]["cpu_us"]},
    }


COLUMNS = {
    "engine": "engine",
    "system": "protocol",
    "callers": "callers",
    "texts_per_second": "texts/s",
    "p50_ms": "p50, ms",
    "cpu": "CPU per text, µs",
}


def display_rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows for a table."""
    return [{**row, "cpu": ", ".join(f"{k} {v:.1f}" for k, v in row["cpu_us"].items())} for row in found["rows"]]


def summary(found: dict[str, Any]) -> list[str]:
    """Return a line for each load."""
    lines = []
    for row in found["ratios"]:
        engine, callers = row["engine"], row["callers"]
        ratio = Paired(**{key: value for key, value in row.items() if key not in ("engine", "callers")})
        lines.append(f"{engine}, {callers} callers: REST has {ratio} of gRPC's throughput")
    return lines


def add_to(page: Page, found: dict[str, Any]) -> None:
    page.heading("REST")
    page.text(
        f"Requests of {BATCH} texts over gRPC and through the REST front, which sends them on over gRPC; once to an "
        f"engine that computes nothing. Medians of {found['rounds']} rounds of {found['seconds']:g} s, in turn. The "
        "client is one process: grpc.aio, and aiohttp with connections kept alive. It encodes requests and decodes "
        "answers. The answer cache is off."
    )
    page.records(COLUMNS, display_rows(found))
    for line in summary(found):
        page.text(f"{line}.")
