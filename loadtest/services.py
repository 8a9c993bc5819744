"""Aisle beside other ways to serve the same checkpoint: the same texts, the same loads, in turn and repeated."""

from __future__ import annotations

import asyncio
import itertools
import json
import shutil
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from aisle.build.build import build
from aisle.build.engine import Engine, load_engine
from aisle.build.gate import Gate, call
from aisle.build.repository import TEMPLATE, latest_version
from aisle.console import say, track
from aisle.errors import ServerError
from aisle.files import write_json
from aisle.loadtest.load import Call, Load, closed, open_loop, percentile
from aisle.loadtest.systems import OURS, PEERS, Peer, Service, aisle, install, peer, transformers_layout
from aisle.preprocess.encode import Encoder
from aisle.train.checkpoint import load_model, read_labels
from aisle.train.evaluate import logits_of

ENGINE = "engine alone"
RATES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 4 / 5)  # offered in an open load, as shares of Aisle's own throughput
REACH = 0.9  # a peer is offered what it can bear: up to this share of its own throughput
CHECKED = 64  # texts on which the systems must agree
TUNED_AT = 32  # callers
FILES, AT_ONCE = 4, 64  # callers with so many texts a call, as files are sent
ALONE = 1024  # texts that the engine alone runs over, and files hold
COLUMNS = {
    "system": "system",
    "load": "load",
    "texts_per_second": "texts/s",
    "p50_ms": "p50, ms",
    "p99_ms": "p99, ms",
    "ratio": "throughput to Aisle's",
    "p99_ratio": "p99 to Aisle's",
    "calls": "calls",
    "failures": "failed",
}
LOADS = {"closed": "{} at once", "files": f"{{}} at once, {AT_ONCE} texts each", "open": "{:g} texts/s"}
SYSTEMS = ("engine", "aisle", *(each.folder for each in PEERS))


@dataclass(frozen=True)
class Plan:
    """Which systems, and how long and often each is measured."""

    systems: Sequence[str] = SYSTEMS
    callers: Sequence[int] = (1, 8, 64)
    seconds: float = 5.0  # of each load and round, at least
    rounds: int = 2
    tune: bool = False  # try all settings of the peers first


def measure(checkpoint: Path, texts: Sequence[str], plan: Plan, work: Path, random_weights: bool) -> dict[str, Any]:
    """Start all systems, check that they agree, and put one load after the other on each in turn, round after round.

    Only the system under load runs; the others are stopped where they are. The open loads' rates follow from Aisle's
    throughput in the first round. Latencies of all rounds are pooled, throughput is the rounds' median.

    Raises:
        InputError: a peer's environment cannot be made.
        ServerError: a system did not start.
    """
    repository, layout = built(checkpoint, work, random_weights), transformers_layout(checkpoint, work / "transformers")
    peers = [each for each in PEERS if each.folder in plan.systems]
    for each in peers:
        install(each, work.parent / "peers")
    tuning = {each.name: tune(each, layout, texts, plan, work) for each in peers} if plan.tune else {}
    expected = _expected(checkpoint, texts[:CHECKED])
    loads: dict[tuple[str, Any], list[Load]] = {}
    with ExitStack() as stack:
        services = []
        if "aisle" in plan.systems:
            services.append(_asleep(stack, aisle(repository, work / "logs" / "aisle.log")))
        for each in peers:
            settings = _settings(each, work)
            log = work / "logs" / f"{each.folder}.log"
            services.append(_asleep(stack, peer(each, settings, layout, work.parent / "peers", log)))
        agreement = {service.name: _agreement(service, texts[:CHECKED], expected) for service in services}
        engine = load_engine(repository / "encoder" / str(latest_version(repository)))
        tokens = Encoder(checkpoint / "tokenizer.json").tokens(texts[:ALONE])

        def record(name: str, kind: Any, load: Load) -> None:
            loads.setdefault((name, kind), []).append(load)

        rates: list[float] = []
        for number in range(plan.rounds):
            name = f"round {number + 1} of {plan.rounds}"

            def put(service: Service, kind: tuple[str, Any], number: int = number) -> None:
                def load(each: Call) -> Awaitable[Load]:
                    some = _from(texts, number)
                    if kind[0] == "files":
                        return _files(each, texts, plan.seconds)
                    if kind[0] == "closed":
                        return closed(each, some, kind[1], plan.seconds)
                    return open_loop(each, some, kind[1], plan.seconds, number)

                record(service.name, kind, _under(service, load))

            for callers in track(plan.callers, f"{name}, closed loads"):
                if "engine" in plan.systems:
                    record(ENGINE, ("closed", callers), _engine(engine, tokens, callers, plan.seconds))
                for service in services:
                    put(service, ("closed", callers))
            for service in services:
                if service.name == OURS:
                    put(service, ("files", FILES))
            peaks = {service.name: _peak(loads, service.name) for service in services}
            if not rates and services:
                rates = [round(share * peaks[services[0].name], 1) for share in RATES]
            for rate in track(rates, f"{name}, open loads"):
                for service in services:
                    first = rate == rates[0]  # something must be compared, be it more than a peer can bear
                    if service.name == OURS or first or rate <= REACH * peaks[service.name]:
                        put(service, ("open", rate))
    rows = _rows(loads)
    return {
        "rows": rows,
        "settings": {service.name: service.settings for service in services if service.peer},
        "agreement": agreement,
        "checked_texts": len(expected),
        "tuning": tuning,
        "seconds": plan.seconds,
        "rounds": plan.rounds,
        **_verdict(rows, peers),
    }


def built(checkpoint: Path, work: Path, random_weights: bool) -> Path:
    """Return a repository with the checkpoint's INT8 engine and this version's own code and configuration.

    Random weights are not held to the gate: they answer near ties. The systems' agreement is measured and reported.
    """
    repository = work / "model_repository"
    shutil.copytree(TEMPLATE, repository, dirs_exist_ok=True, ignore=shutil.ignore_patterns("[0-9]*", "__pycache__"))
    build(checkpoint, repository, "openvino", "int8", gate=Gate(0.0, 1.0) if random_weights else None)
    return repository


def tune(which: Peer, layout: Path, texts: Sequence[str], plan: Plan, work: Path) -> list[dict[str, Any]]:
    """Measure a peer in each of its settings and keep the best for runs to come; one that does not start counts 0."""
    found = []
    for settings in which.settings:
        log = work / "logs" / f"{which.folder}-tuning.log"
        try:
            with peer(which, settings, layout, work.parent / "peers", log) as service:
                speed = _under(
                    service, lambda each: closed(each, _from(texts, 0), TUNED_AT, plan.seconds)
                ).texts_per_second
        except ServerError as error:
            say(str(error))
            speed = 0.0
        say(f"{which.name}, {settings}: {speed:.1f} texts/s")
        found.append({"settings": settings, "texts_per_second": speed})
    best = max(found, key=lambda each: each["texts_per_second"])
    write_json(work / f"{which.folder}.json", best["settings"])
    return found


def _settings(which: Peer, work: Path) -> dict[str, Any]:
    """Return the settings that tuning found here, or else the first."""
    try:
        tuned: dict[str, Any] = json.loads((work / f"{which.folder}.json").read_text("utf-8"))
    except (OSError, ValueError):
        return which.settings[0]
    return tuned if tuned in which.settings else which.settings[0]


def _asleep(stack: ExitStack, starting: Any) -> Service:
    service: Service = stack.enter_context(starting)
    with service.awake():
        pass
    return service


def _under(service: Service, load: Callable[[Call], Awaitable[Any]]) -> Any:
    """Wake a service and put a load on it."""

    async def run() -> Any:
        async with service.client() as each:
            await each("预热 warm-up")
            return await load(each)

    with service.awake():
        return asyncio.run(run())


def _from(texts: Sequence[str], number: int) -> Iterator[str]:
    """Return the texts from another place on in each round, the same for all systems."""
    start = number * len(texts) // 7
    return itertools.islice(itertools.cycle(texts), start, None)


def _expected(checkpoint: Path, texts: Sequence[str]) -> list[str]:
    tokens = Encoder(checkpoint / "tokenizer.json").tokens(texts)
    names = read_labels(checkpoint)
    return [names[number] for number in logits_of(load_model(checkpoint), tokens, "asking PyTorch").argmax(1)]


def _agreement(service: Service, texts: Sequence[str], expected: Sequence[str]) -> float:
    """Return the share of texts that get the category that PyTorch in fp32 gives; all callers at once warm it up."""

    async def ask(each: Call) -> Sequence[object]:
        return await asyncio.gather(*map(each, texts))

    answers = _under(service, ask)
    return float(np.mean([answer == category for answer, category in zip(answers, expected, strict=True)]))


def _engine(engine: Engine, tokens: Sequence[Sequence[int]], batch: int, seconds: float) -> Load:
    """Run the engine that Aisle serves on batches of so many texts, without a server."""
    call(engine, tokens[:batch])
    batches = itertools.cycle([tokens[i : i + batch] for i in range(0, len(tokens) - batch + 1, batch)])
    latencies: list[float] = []
    start = end = time.perf_counter()
    while end - start < seconds:
        before = end
        call(engine, next(batches))
        end = time.perf_counter()
        latencies.append(end - before)
    return Load(latencies, 0, len(latencies) * batch / (end - start))


async def _files(each: Call, texts: Sequence[str], seconds: float) -> Load:
    """Send the engine's own texts as files are sent; the server's share of the engine is without the cost of calls."""
    batches = [list(texts[i : i + AT_ONCE]) for i in range(0, min(ALONE, len(texts)), AT_ONCE)]
    load = await closed(each, itertools.cycle([b for b in batches if len(b) == AT_ONCE] or batches), FILES, seconds)
    return replace(load, texts_per_second=load.texts_per_second * len(batches[0]))


def _peak(loads: dict[tuple[str, Any], list[Load]], name: str) -> float:
    return max(
        median(load.texts_per_second for load in each)
        for (system, kind), each in loads.items()
        if system == name and kind[0] == "closed"
    )


def _rows(loads: dict[tuple[str, Any], list[Load]]) -> list[dict[str, Any]]:
    """Return one row a system and load, each with its ratios to Aisle under the same load."""
    rows: list[dict[str, Any]] = []
    for (name, (kind, much)), each in loads.items():
        latencies = [latency for load in each for latency in load.latencies]
        rows.append(
            {
                "system": name,
                "kind": kind,
                "callers": None if kind == "open" else much,
                "rate": much if kind == "open" else None,
                "load": LOADS[kind].format(much),
                "texts_per_second": median(load.texts_per_second for load in each),
                "p50_ms": _milliseconds(latencies, 50),
                "p99_ms": _milliseconds(latencies, 99),
                "calls": len(latencies),
                "failures": sum(load.failures for load in each),
            }
        )
    ours = {row["load"]: row for row in rows if row["system"] == OURS}
    for row in rows:
        beside = ours.get(row["load"])
        answered = beside and beside["texts_per_second"]
        row["ratio"] = row["texts_per_second"] / beside["texts_per_second"] if beside and answered else None
        comparable = beside and row["p99_ms"] is not None and beside["p99_ms"]
        row["p99_ratio"] = row["p99_ms"] / beside["p99_ms"] if beside and comparable else None
    return sorted(rows, key=lambda row: (row["kind"], row["callers"] or row["rate"]))


def _milliseconds(latencies: Sequence[float], percent: float) -> float | None:
    return 1e3 * percentile(latencies, percent) if latencies else None


def _verdict(rows: Sequence[dict[str, Any]], peers: Sequence[Peer]) -> dict[str, Any]:
    """Return Aisle's best closed throughput by each peer's, where a peer's p99 is lower, and what the server adds."""
    best: dict[str, float] = {}
    at: dict[tuple[str, str], dict[str, Any]] = {(row["system"], row["load"]): row for row in rows}
    for row in rows:
        if row["kind"] == "closed":
            best[row["system"]] = max(best.get(row["system"], 0.0), row["texts_per_second"])
    loads = [row["load"] for row in rows if row["system"] == ENGINE and (OURS, row["load"]) in at]
    files = [row["texts_per_second"] for row in rows if row["kind"] == "files"]
    return {
        "best": best,
        "times_as_fast": {each.name: best[OURS] / best[each.name] for each in peers if OURS in best},
        "lower_p99_elsewhere": [
            f"{row['system']}, {row['load']}"
            for row in rows
            if row["system"] not in (OURS, ENGINE) and row["p99_ratio"] is not None and row["p99_ratio"] < 1
        ],
        "share_of_engine": best[OURS] / best[ENGINE] if OURS in best and ENGINE in best else None,
        "share_of_engine_files": max(files) / best[ENGINE] if files and ENGINE in best else None,
        "added_ms": at[OURS, loads[0]]["p50_ms"] - at[ENGINE, loads[0]]["p50_ms"] if loads else None,
    }
