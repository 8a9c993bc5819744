"""The bench of services: interleaved slices, paired ratios with intervals, and no other service running."""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from aisle.errors import ServerError
from aisle.loadtest import processes
from aisle.loadtest.bench import services, systems
from aisle.loadtest.bench.comparison import ENGINE, display_rows, rows_of, summary, verdict
from aisle.loadtest.bench.interleave import LoadSpec, Slices, System, interleave
from aisle.loadtest.bench.paired import interval_rank, paired, ratios
from aisle.loadtest.bench.systems import OURS
from aisle.loadtest.generator import Load


class Machine:
    """A machine whose speed varies between slices; it records what ran when."""

    def __init__(self, speed: Callable[[int], float]) -> None:
        self.speed = speed
        self.ran: list[tuple[str, str, int]] = []


class FakeSystem:
    """A system of a known speed on a machine of unknown speed."""

    def __init__(self, machine: Machine, name: str, speed: float, kinds: Sequence[str] = ("closed", "open")) -> None:
        self.machine, self.name, self.speed, self.kinds = machine, name, speed, kinds

    def measure(self, spec: LoadSpec, number: int) -> Load:
        speed = self.speed * self.machine.speed(len(self.machine.ran))
        self.machine.ran.append((self.name, str(spec), number))
        rate = min(spec.size, speed) if spec.kind == "open" else speed
        return Load([1 / speed, 2 / speed], 0, rate)


def fakes(speed: Callable[[int], float]) -> tuple[Machine, list[System]]:
    machine = Machine(speed)
    return machine, [
        FakeSystem(machine, ENGINE, 125, ("closed", "files")),
        FakeSystem(machine, OURS, 100, ("closed", "files", "open")),
        FakeSystem(machine, "peer", 40),
    ]


def swaying(slice_number: int) -> float:
    """Half as fast for some minutes, and back: slowly, compared with the sequence of slices."""
    return 0.5 if slice_number // 24 % 2 else 1.0


def run(speed: Callable[[int], float], rounds: int) -> tuple[Machine, Slices]:
    machine, fake = fakes(speed)
    return machine, interleave(fake, (1, 8), rounds, OURS, lambda _: None)


def test_systems_take_turns_and_none_is_always_first() -> None:
    machine, slices = run(lambda _: 1.0, 6)
    for number in range(6):
        closed = [name for name, load, n in machine.ran if n == number and load == "8 at once"]
        assert sorted(closed) == sorted([ENGINE, OURS, "peer"])
    starts = [next(name for name, load, n in machine.ran if n == number and load == "8 at once") for number in range(3)]
    assert len(set(starts)) == 3
    loads = [(load, n) for _, load, n in machine.ran]
    assert len([key for key, _ in itertools.groupby(loads)]) == len(set(loads))  # a load's slices are neighbours
    assert {len(each) for each in slices.loads.values()} == {6}


def test_a_peer_gets_open_loads_up_to_its_capacity() -> None:
    _, slices = run(lambda _: 1.0, 2)
    rates = {
        name: [spec.size for n, spec in slices.loads if n == name and spec.kind == "open"] for name in (OURS, "peer")
    }
    assert rates[OURS] == [6.2, 12.5, 25.0, 50.0, 80.0]
    assert rates["peer"] == [6.2, 12.5, 25.0]
    assert not [spec for name, spec in slices.loads if name == ENGINE and spec.kind == "open"]


def test_ratios_are_right_if_the_machines_speed_varies() -> None:
    _, slices = run(swaying, 12)
    speeds = slices.texts_per_second(OURS, LoadSpec("closed", 8))
    assert max(speeds) == 2 * min(speeds)  # the speed did vary
    found = verdict(slices, ["peer"])
    assert found["times_as_fast"]["peer"]["median"] == pytest.approx(2.5)
    assert found["times_as_fast"]["peer"]["conclusive"]
    assert found["share_of_engine"]["median"] == pytest.approx(0.8)
    assert found["share_of_engine_files"]["median"] == pytest.approx(0.8)
    text = " ".join(summary(found))
    assert "Aisle's throughput is 2.5 × that of peer" in text
    assert "80% of the engine alone" in text
    rows = {(row["system"], row["load"]): row for row in display_rows({"rows": rows_of(slices)})}
    assert rows["peer", "8 at once"]["ratio"].startswith("0.4 (")
    assert rows[OURS, "8 at once"]["ratio"].startswith("1 (")


@pytest.mark.parametrize("noise", [0.0, 0.8])
def test_a_wide_spread_allows_no_conclusion(noise: float) -> None:
    rng = random.Random(1)
    _, slices = run(lambda _: 1 + rng.uniform(-noise, noise), 7)
    found = verdict(slices, ["peer"])
    wide = noise > 0
    assert found["times_as_fast"]["peer"]["conclusive"] is not wide
    assert found["share_of_engine"]["conclusive"] is not wide
    assert any(line.startswith("No conclusion. Aisle's throughput against peer") for line in summary(found)) is wide
    assert ("undecided (" in str(display_rows({"rows": rows_of(slices)}))) is wide
    assert bool(found["undecided_p99"]) is wide


def test_too_few_rounds_allow_no_conclusion() -> None:
    _, slices = run(lambda _: 1.0, 5)
    found = verdict(slices, ["peer"])
    assert not found["times_as_fast"]["peer"]["conclusive"]
    assert found["times_as_fast"]["peer"]["median"] == 2.5
    assert found["undecided_p99"]
    assert not found["lower_p99_elsewhere"]
    assert all(line.startswith(("No conclusion.", "No peer's p99 is known")) for line in summary(found))


def test_a_peer_with_a_lower_p99_is_named() -> None:
    machine = Machine(lambda _: 1.0)
    quick = FakeSystem(machine, "quick", 200)
    slices = interleave([FakeSystem(machine, OURS, 100), quick], (1,), 6, OURS, lambda _: None)
    found = verdict(slices, ["quick"])
    assert "quick, 1 at once" in found["lower_p99_elsewhere"]
    assert not found["undecided_p99"]


def test_the_interval_is_that_of_the_sign_test() -> None:
    # Of the tables of the sign test (95 %, two-sided).
    assert [interval_rank(count) for count in (5, 6, 8, 9, 12, 15, 20, 25)] == [0, 1, 1, 2, 3, 4, 6, 8]
    each = paired([9.0, 10.0, 10.2, 10.4, 9.8, 10.1, 9.9, 30.0, 1.0])
    assert each is not None
    assert (each.median, each.low, each.high) == (10.0, 9.0, 10.4)  # one outlier on each side does not widen it
    assert each.conclusive
    assert each.below(11) is True
    assert each.below(10) is None
    assert each.below(8) is False
    assert paired([]) is None
    assert ratios([1.0, 2.0], [2.0, 0.0]) == paired([0.5])


BUSY = """
import os, subprocess, sys, time
if len(sys.argv) == 1:  # a child in a session of its own, as Triton is one of `aisle serve`
    subprocess.Popen([sys.executable, __file__, "child"], start_new_session=True)
while True:
    pass
"""


@contextmanager
def busy(folder: Path) -> Iterator[systems.Service]:
    """Run two busy processes, one of them in another session."""
    script = folder / "busy.py"
    script.write_text(BUSY)
    process = subprocess.Popen([sys.executable, str(script)], start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        while len(processes.tree(process.pid)) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        yield systems.Service(f"busy {process.pid}", process, 0)
    finally:
        for pid in processes.tree(process.pid):
            os.kill(pid, signal.SIGKILL)
        process.wait()


def spent(service: systems.Service) -> dict[int, float]:
    return {pid: processes.cpu_seconds(pid) for pid in processes.tree(service.process.pid)}


def wait_until_running(service: systems.Service) -> None:
    """Wait until each process of a service has taken CPU time from now on."""
    before, deadline = spent(service), time.monotonic() + 60
    while any(seconds <= before[pid] for pid, seconds in spent(service).items()):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_paused_services_do_not_run(tmp_path: Path) -> None:
    """All processes of a paused service are stopped while another service runs, including those in other sessions."""
    with busy(tmp_path) as first, busy(tmp_path) as second:
        group = services.ServiceGroup([first, second])
        for service in group.services:
            assert len(spent(service)) == 2
            with service.awake():
                wait_until_running(service)
        paused = spent(first)
        with group.only(second):
            wait_until_running(second)
        assert spent(first) == paused
        paused |= spent(second)
        with group.only(None):
            time.sleep(0.05)
        assert {**spent(first), **spent(second)} == paused


def test_a_paused_service_that_runs_is_an_error(tmp_path: Path) -> None:
    with busy(tmp_path) as service, busy(tmp_path) as other:
        group = services.ServiceGroup([service, other])
        for each in group.services:
            processes.pause(each.process.pid)
        with pytest.raises(ServerError, match="ran while another system was measured"):
            measure_beside(group, other, service)


def measure_beside(group: services.ServiceGroup, measured: systems.Service, disturbing: systems.Service) -> None:
    with group.only(measured):
        processes.resume(disturbing.process.pid)
        wait_until_running(disturbing)


def test_a_process_that_cannot_be_paused_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(processes, "PAUSE_SECONDS", 0.0)
    kill: Any = lambda pid, number: None  # noqa: E731  the signal has no effect
    with busy(tmp_path) as service, monkeypatch.context() as patched:
        patched.setattr(os, "kill", kill)
        with pytest.raises(ServerError, match="did not pause"):
            processes.pause(service.process.pid)
