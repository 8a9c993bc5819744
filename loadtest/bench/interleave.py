"""Measure all systems under the same loads in turn, in short slices, over many rounds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Protocol

from aisle.loadtest.generator import Load

FILE_CALLERS, FILE_BATCH = 4, 64  # callers, and texts per call, for files
RATES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 4 / 5)  # of the open loads, as shares of Aisle's closed throughput
MAX_LOAD = 0.9  # a peer gets only open loads up to this share of its own closed throughput


@dataclass(frozen=True)
class LoadSpec:
    """One load: `size` is the number of callers, or the calls per second of an open load."""

    kind: str  # "closed", "files" or "open"
    size: float

    def __str__(self) -> str:
        if self.kind == "open":
            return f"{self.size:g} texts/s"
        return f"{self.size:g} at once" + (f", {FILE_BATCH} texts each" if self.kind == "files" else "")


class System(Protocol):
    """A system to measure. It runs only in its own slices."""

    @property
    def name(self) -> str: ...

    @property
    def kinds(self) -> Sequence[str]:
        """The kinds of load that it supports."""
        ...

    def measure(self, spec: LoadSpec, number: int) -> Load:
        """Resume the system, load it for one slice of round `number`, and pause it again."""
        ...


@dataclass
class Slices:
    """The slices of all rounds, by system and load. All have the same number of rounds."""

    loads: dict[tuple[str, LoadSpec], list[Load]] = field(default_factory=dict)

    def add(self, system: str, spec: LoadSpec, load: Load) -> None:
        self.loads.setdefault((system, spec), []).append(load)

    def texts_per_second(self, system: str, spec: LoadSpec) -> list[float]:
        """Return the throughput of each round, or [] if the system was not measured under the load."""
        return [load.texts_per_second for load in self.loads.get((system, spec), ())]

    def best(self, system: str) -> list[float]:
        """Return the best closed throughput of each round; [] for an unknown system."""
        closed = [
            self.texts_per_second(system, spec) for name, spec in self.loads if name == system and spec.kind == "closed"
        ]
        return [max(each) for each in zip(*closed, strict=True)]


def interleave(
    systems: Sequence[System], callers: Sequence[int], rounds: int, ours: str, progress: Callable[[str], None]
) -> Slices:
    """Measure every system under every load in each round.

    Under each load the systems are measured one directly after the other. Each round starts with another system, so
    that none is always first. The rates of the open loads are computed from the first round. All later rounds repeat
    the slices of the first one, so that all figures can be paired by round.
    """
    slices = Slices()
    closed = [(spec, system) for spec in closed_loads(callers) for system in systems if spec.kind in system.kinds]
    opened: list[tuple[LoadSpec, System]] = []

    def measure(plan: Sequence[tuple[LoadSpec, System]], number: int) -> None:
        for spec, group in by_load(plan):
            progress(f"round {number + 1} of {rounds}: {spec}")
            first = number % len(group)
            for system in (*group[first:], *group[:first]):
                slices.add(system.name, spec, system.measure(spec, number))

    for number in range(rounds):
        measure(closed, number)
        opened = opened or open_loads(systems, slices, ours)
        measure(opened, number)
    return slices


def closed_loads(callers: Sequence[int]) -> list[LoadSpec]:
    return [*(LoadSpec("closed", count) for count in callers), LoadSpec("files", FILE_CALLERS)]


def open_loads(systems: Sequence[System], slices: Slices, ours: str) -> list[tuple[LoadSpec, System]]:
    """Return the open loads, and the systems that get each.

    Rates are shares of Aisle's throughput, or of the first system's if Aisle is not measured. A peer always gets the
    lowest rate, so that there is a comparison, and the other rates up to `MAX_LOAD`.
    """
    receivers = [system for system in systems if "open" in system.kinds]
    if not receivers:
        return []
    peaks = {system.name: median(slices.best(system.name)) for system in receivers}
    peak = peaks.get(ours, peaks[receivers[0].name])
    rates = list(dict.fromkeys(max(0.1, round(share * peak, 1)) for share in RATES))
    return [
        (LoadSpec("open", rate), system)
        for rate in rates
        for system in receivers
        if system.name == ours or rate in (rates[0], *(r for r in rates if r <= MAX_LOAD * peaks[system.name]))
    ]


def by_load(plan: Sequence[tuple[LoadSpec, System]]) -> Iterator[tuple[LoadSpec, list[System]]]:
    """Group the slices of a round by their load, in order."""
    for spec in dict.fromkeys(spec for spec, _ in plan):
        yield spec, [system for each, system in plan if each == spec]
