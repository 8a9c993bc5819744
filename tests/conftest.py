"""One small checkpoint, one repository, one Triton for the whole session."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from aisle.build.build import build
from aisle.client import Classifier
from aisle.deploy.triton import Options, free_ports, running
from aisle.train.catalogue import write_sample
from aisle.train.train import Settings, train


@dataclass(frozen=True)
class Server:
    url: str
    metrics: str
    labels: int
    log: Path


@pytest.fixture(scope="session")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Synthetic titles with all their faults."""
    path = tmp_path_factory.mktemp("data") / "sample.csv"
    write_sample(path, 4000, seed=1)
    return path


@pytest.fixture(scope="session")
def checkpoint(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train") / "checkpoint"
    train(sample, "text", "category", folder, Settings(epochs=8))
    return folder


@pytest.fixture(scope="session")
def repository(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serve") / "model_repository"
    build(checkpoint, folder, "openvino", "fp32")
    return folder


@pytest.fixture(scope="session")
def server(repository: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    from aisle.train.checkpoint import read_labels

    grpc, metrics = free_ports(2)
    options = Options(repository, grpc_port=grpc, metrics_port=metrics)
    log = tmp_path_factory.mktemp("log") / "triton.log"
    with log.open("wb") as file, running(options, file):
        yield Server(f"localhost:{grpc}", f"localhost:{metrics}", len(read_labels(checkpoint)), log)


@pytest.fixture(scope="session")
def classifier(server: Server) -> Iterator[Classifier]:
    with Classifier(server.url, timeout=60) as each:
        yield each


@pytest.fixture
def rng() -> random.Random:
    return random.Random(0)


def aisle(*arguments: str | Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command as a user would."""
    command = [sys.executable, "-m", "aisle", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **(env or {})}, check=False)


def series(address: str) -> dict[str, float]:
    """Return the metrics' series that a server at HOST:PORT shows, and their values."""
    lines = urllib.request.urlopen(f"http://{address}/metrics").read().decode().splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines) if name[:1] != "#"}


def total(address: str, name: str) -> float:
    """Return the sum of a metric's series at HOST:PORT."""
    return sum(value for key, value in series(address).items() if key.partition("{")[0] == name)
