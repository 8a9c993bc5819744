"""Compare Aisle with other ways to serve the same checkpoint: same texts, same loads, measured in turn."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from aisle.build.build import build
from aisle.build.engine import Engine, load_engine
from aisle.build.gate import Gate, run_engine
from aisle.build.repository import latest_version
from aisle.console import say
from aisle.errors import ServerError
from aisle.files import write_json
from aisle.loadtest.bench.comparison import ENGINE, rows_of, verdict
from aisle.loadtest.bench.interleave import FILE_BATCH, LoadSpec, System, interleave
from aisle.loadtest.bench.systems import OURS, PEERS, Peer, Service, aisle, install, start_peer, transformers_layout
from aisle.loadtest.generator import Call, Load, checked, closed, closed_blocking, open_loop
from aisle.loadtest.processes import all_paused
from aisle.train.core.checkpoint import Checkpoint
from aisle.train.core.predict import logits_of

AGREEMENT_TEXTS = 64  # texts on which the systems' categories are compared with PyTorch's
TUNING_CALLERS = 32
ENGINE_TEXTS = 1024  # texts for the engine alone and for files
SYSTEMS = ("engine", "aisle", *(peer.folder for peer in PEERS))


@dataclass(frozen=True)
class BenchPlan:
    """Which systems are measured, for how long and how often."""

    systems: Sequence[str] = SYSTEMS
    callers: Sequence[int] = (1, 8, 64)
    seconds: float = 3.0  # of each slice, at least
    rounds: int = 7
    tune: bool = False  # try all settings of the peers first


def measure(
    checkpoint: Path, texts: Sequence[str], plan: BenchPlan, work: Path, random_weights: bool
) -> dict[str, Any]:
    """Start all systems, measure their agreement, and measure each under every load in turn, round after round.

    Only the system under load runs: all processes of the others are paused, which is checked after each slice. The
    rates of the open loads are computed from Aisle's throughput in the first round.

    Raises:
        InputError: a peer's environment cannot be made.
        ServerError: a system did not start, or a paused system ran.
    """
    repository, layout = built(checkpoint, work, random_weights), transformers_layout(checkpoint, work / "transformers")
    peers = [peer for peer in PEERS if peer.folder in plan.systems]
    for peer in peers:
        install(peer, work.parent / "peers")
    tuning = {peer.name: tune(peer, layout, texts, plan, work) for peer in peers} if plan.tune else {}
    expected = _expected(checkpoint, texts[:AGREEMENT_TEXTS])
    with ExitStack() as stack:
        group = _start_all(stack, plan, repository, peers, layout, work)
        agreement = {each.name: _agreement(group, each, texts[: len(expected)], expected) for each in group.services}
        systems: list[System] = [ServedSystem(group, each, texts, plan.seconds) for each in group.services]
        if "engine" in plan.systems:
            engine = load_engine(repository / "encoder" / str(latest_version(repository)))
            tokens = Checkpoint(checkpoint).tokenizer.tokens(texts[:ENGINE_TEXTS])
            systems.insert(0, EngineSystem(group, engine, tokens, plan.seconds))
        slices = interleave(systems, plan.callers, plan.rounds, OURS, say)
    return {
        "rows": rows_of(slices),
        "settings": {each.name: each.settings for each in group.services if each.peer},
        "agreement": agreement,
        "checked_texts": len(expected),
        "tuning": tuning,
        "seconds": plan.seconds,
        "rounds": plan.rounds,
        **verdict(slices, [peer.name for peer in peers]),
    }


def _start_all(
    stack: ExitStack, plan: BenchPlan, repository: Path, peers: Sequence[Peer], layout: Path, work: Path
) -> ServiceGroup:
    """Start Aisle, if the plan contains it, and the peers; all are paused."""
    group = ServiceGroup()
    if "aisle" in plan.systems:
        group.start(stack, aisle(repository, work / "logs" / "aisle.log"))
    for peer in peers:
        log = work / "logs" / f"{peer.folder}.log"
        group.start(stack, start_peer(peer, _settings(peer, work), layout, work.parent / "peers", log))
    return group


@dataclass
class ServiceGroup:
    """The services of a run. At most one of them is awake."""

    services: list[Service] = field(default_factory=list)

    def start(self, stack: ExitStack, starting: Any) -> None:
        """Start a service while the others are paused, and pause it."""
        service: Service = stack.enter_context(starting)
        with service.awake():
            self.services.append(service)

    @contextmanager
    def only(self, awake: Service | None) -> Iterator[None]:
        """Let one service run, or none, and check that all others stayed paused.

        Raises:
            ServerError: another service used CPU time.
        """
        with all_paused([each.process.pid for each in self.services if each is not awake]):
            if awake is None:
                yield
                return
            with awake.awake():
                yield

    def run(self, service: Service, load: Callable[[Call], Awaitable[Any]]) -> Any:
        """Wake a service, wait for one answer, and load it."""

        async def run() -> Any:
            async with service.client() as send:
                await send("预热 warm-up")
                return await load(send)

        with self.only(service):
            return asyncio.run(run())


@dataclass(frozen=True)
class ServedSystem:
    """A service, measured by the load generator."""

    group: ServiceGroup
    service: Service
    texts: Sequence[str]
    seconds: float

    @property
    def name(self) -> str:
        return self.service.name

    @property
    def kinds(self) -> Sequence[str]:
        return ("closed", "open") if self.service.peer else ("closed", "files", "open")

    def measure(self, spec: LoadSpec, number: int) -> Load:
        def load(send: Call) -> Awaitable[Load]:
            texts = _texts_from(self.texts, number)
            if spec.kind == "files":
                return _files(send, self.texts, int(spec.size), self.seconds)
            if spec.kind == "closed":
                return closed(send, texts, int(spec.size), self.seconds)
            return open_loop(send, texts, spec.size, self.seconds, number)

        measured: Load = self.group.run(self.service, load)
        return measured


@dataclass(frozen=True)
class EngineSystem:
    """Aisle's engine in this process, without a server; a batch holds as many texts as there are callers."""

    group: ServiceGroup
    engine: Engine
    tokens: Sequence[Sequence[int]]
    seconds: float
    name: str = ENGINE
    kinds: Sequence[str] = ("closed", "files")

    def measure(self, spec: LoadSpec, number: int) -> Load:
        size = FILE_BATCH if spec.kind == "files" else int(spec.size)
        starts = range(0, max(1, len(self.tokens) - size + 1), size)
        batches = [self.tokens[start : start + size] for start in starts]
        with self.group.only(None):
            load = closed_blocking(
                lambda batch: run_engine(self.engine, batch), itertools.cycle(batches), 1, self.seconds
            )
        return replace(checked(load), texts_per_second=load.texts_per_second * len(batches[0]))


def built(checkpoint: Path, work: Path, random_weights: bool) -> Path:
    """Return a repository with the checkpoint's INT8 engine.

    Random weights skip the gate, because their predictions are near ties; the agreement is measured and reported.
    """
    repository = work / "model_repository"
    build(checkpoint, repository, "openvino", "int8", gate=Gate(0.0, 1.0) if random_weights else None)
    return repository


def tune(peer: Peer, layout: Path, texts: Sequence[str], plan: BenchPlan, work: Path) -> list[dict[str, Any]]:
    """Measure a peer with each of its settings and save the best for later runs. Those that do not start count as 0."""
    found = []
    for settings in peer.settings:
        log = work / "logs" / f"{peer.folder}-tuning.log"
        try:
            with start_peer(peer, settings, layout, work.parent / "peers", log) as service:
                speed = (
                    ServiceGroup()
                    .run(service, lambda send: closed(send, _texts_from(texts, 0), TUNING_CALLERS, plan.seconds))
                    .texts_per_second
                )
        except ServerError as error:
            say(str(error))
            speed = 0.0
        say(f"{peer.name}, {settings}: {speed:.1f} texts/s")
        found.append({"settings": settings, "texts_per_second": speed})
    best = max(found, key=lambda each: each["texts_per_second"])
    write_json(work / f"{peer.folder}.json", best["settings"])
    return found


def _settings(peer: Peer, work: Path) -> dict[str, Any]:
    """Return the best settings of an earlier tuning on this machine, or else the first."""
    try:
        tuned: dict[str, Any] = json.loads((work / f"{peer.folder}.json").read_text("utf-8"))
    except (OSError, ValueError):
        return peer.settings[0]
    return tuned if tuned in peer.settings else peer.settings[0]


def _texts_from(texts: Sequence[str], number: int) -> Iterator[str]:
    """Yield the texts endlessly. Each round starts at another text, the same for all systems."""
    start = number * len(texts) // 7 % len(texts)
    return itertools.islice(itertools.cycle(texts), start, None)


def _expected(checkpoint: Path, texts: Sequence[str]) -> list[str]:
    """Return the category that PyTorch in fp32 gives each text."""
    source = Checkpoint(checkpoint)
    logits = logits_of(source.model, source.tokenizer.tokens(texts), "running the checkpoint in PyTorch")
    return [source.labels[number] for number in logits.argmax(1)]


def _agreement(group: ServiceGroup, service: Service, texts: Sequence[str], expected: Sequence[str]) -> float:
    """Return the share of texts that get the expected category; the concurrent calls also warm up the service."""

    async def ask(send: Call) -> Sequence[object]:
        return await asyncio.gather(*map(send, texts))

    answers = group.run(service, ask)
    return float(np.mean([answer == category for answer, category in zip(answers, expected, strict=True)]))


async def _files(send: Call, texts: Sequence[str], callers: int, seconds: float) -> Load:
    """Send the engine's texts in full requests, as for files, so that the cost of single calls does not count."""
    files = texts[:ENGINE_TEXTS]
    batches = [list(files[start : start + FILE_BATCH]) for start in range(0, len(files), FILE_BATCH)]
    full = [batch for batch in batches if len(batch) == FILE_BATCH] or batches
    load = await closed(send, itertools.cycle(full), callers, seconds)
    return replace(load, texts_per_second=load.texts_per_second * len(full[0]))
