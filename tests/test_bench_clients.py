"""The clients of the benches use the load generator, here against a fake server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aisle.errors import ServerError
from aisle.loadtest.bench import host, rest
from aisle.loadtest.bench.gpu.measure import latencies_of, throughput
from tests.conftest import aisle
from tests.fake import fake_server

TEXTS = [f"苹果 {number}" for number in range(200)]


@pytest.mark.parametrize("kind", ["files", "calls"])
def test_a_client_process_of_the_gpu_bench(kind: str, tmp_path: Path) -> None:
    (tmp_path / "texts.json").write_text(json.dumps(TEXTS), "utf-8")
    with fake_server() as fake:
        settings = {"url": fake.url, "texts": str(tmp_path / "texts.json"), "kind": kind, "callers": 4, "seconds": 0.3}
        command = [
            sys.executable,
            "-m",
            "aisle.loadtest.bench.gpu.client",
            json.dumps({**settings, "begin": 0, "first": 50}),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["texts_per_second"] > 0
    assert found["failures"] == 0
    assert bool(found["latencies"]) is (kind == "calls")


def test_workloads_of_the_host_bench() -> None:
    """Each workload reports its requests, their rate, and the CPU time of the server's processes and of the client."""
    with fake_server() as fake:
        service = host.Service("fake", fake.url, os.getpid())
        for workload in host.workloads(TEXTS, 0.2):
            if "h2load" in workload.name:
                continue  # measures at least a second, without warm-up
            row = workload.run(service)
            assert row["requests"] > 0
            assert row["per_second"] > 0
            assert row["cpu_us"].keys() >= {"triton", "client"}
            assert ("p50_ms" in row) is (workload.name == "one call at a time")


def test_a_failed_call_ends_the_host_bench() -> None:
    def behave(method: str, context: Any) -> None:
        if method == "ModelInfer" and len(fake.calls) > 1:
            raise RuntimeError("broken")

    with fake_server() as fake:
        fake.behave = behave
        lone = host.workloads(TEXTS, 0.1)[0]
        with pytest.raises(ServerError, match="calls failed; the first"):
            lone.run(host.Service("fake", fake.url, os.getpid()))


def test_figures_of_an_engine_come_from_the_generator() -> None:
    batches = [(np.arange(8), np.array([4, 4]))] * 3
    threads: set[int] = set()
    both = threading.Barrier(2, timeout=60)

    def run(batch: object) -> None:
        if threading.get_ident() not in threads:
            threads.add(threading.get_ident())
            both.wait()  # which one thread alone cannot pass
        threading.Event().wait(0.005)

    rate = throughput(run, batches, 0.1, 2)
    assert len(threads) == 2
    both = threading.Barrier(1)
    assert 0 < rate <= 2 * 2 / 0.005 * 1.2  # two threads with batches of two texts
    figures = latencies_of(run, batches, 0.05)
    assert 5 <= figures["p50_ms"] <= figures["p99_ms"]

    def broken(batch: object) -> None:
        raise ValueError("no such shape")

    with pytest.raises(ServerError, match="no such shape"):
        throughput(broken, batches, 0.05, 2)


@pytest.mark.long
def test_rest_is_measured_beside_grpc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = aisle("bench", "rest", "--quick", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["rest"]
    loads = {(engine, callers) for engine in (rest.SERVED, rest.NONE) for callers in rest.CALLERS}
    rows = {(row["engine"], row["callers"], row["system"]): row for row in found["rows"]}
    assert rows.keys() == {(*load, system) for load in loads for system in (rest.GRPC, rest.REST)}
    assert all(row["texts_per_second"] > 0 and row["cpu_us"]["server"] > 0 for row in found["rows"])
    assert {(row["engine"], row["callers"]) for row in found["ratios"]} == loads
    assert all(row["median"] > 0 and not row["conclusive"] for row in found["ratios"])  # of one round
    assert "gRPC's throughput" in Path("loadtest/report/bench.html").read_text("utf-8").replace("&#39;", "'")
