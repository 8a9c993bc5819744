"""Starting and stopping the server."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from aisle.build.build import build
from aisle.build.repository import MANIFEST
from aisle.build.tensorrt import gpu_name
from aisle.client import Classifier
from aisle.deploy import watchdog
from aisle.deploy.triton import Options, free_ports, running
from aisle.errors import InputError, ServerError
from aisle.preprocess.table import fingerprint

from .conftest import Server


def serving(repository: Path) -> tuple[subprocess.Popen[str], str]:
    """Start `aisle serve` as a user would; return it, ready, and its URL."""
    grpc, metrics = map(str, free_ports(2))
    command = [sys.executable, "-m", "aisle", "serve", "--repository", str(repository)]
    command += ["--grpc-port", grpc, "--metrics-port", metrics]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert any(line.startswith("ready: ") for line in process.stderr)
    return process, f"localhost:{grpc}"


def children(process: subprocess.Popen[str]) -> set[int]:
    """Return the processes below this one, to any depth."""
    parents = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(status.parent.name)] = int(status.read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue  # it ended meanwhile
    found, size = {process.pid}, 0
    while len(found) > size:
        size = len(found)
        found |= {child for child, parent in parents.items() if parent in found}
    return found - {process.pid}


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_running(repository: Path, how: signal.Signals) -> None:
    process, url = serving(repository)
    with Classifier(url) as classifier:
        assert classifier.classify(["红富士苹果"])
    below = children(process)
    assert len(below) >= 4  # the server and its three Python models
    process.send_signal(how)
    process.communicate(timeout=60)
    assert process.returncode == (-how if how == signal.SIGKILL else 0)
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in below):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_server_that_was_watched_over_still_ends_of_itself(repository: Path) -> None:
    """Triton waits for whoever is connected, the watchdog too, and breaks off after ten seconds."""
    process, _ = serving(repository)
    time.sleep(watchdog.SECONDS + 1)
    process.send_signal(signal.SIGTERM)
    _, log = process.communicate(timeout=60)
    assert "Waiting for in-flight requests to complete" in log
    assert "timeout expired" not in log


def test_shared_memory_is_given_back(repository: Path) -> None:
    before = set(os.listdir("/dev/shm"))
    grpc, metrics = free_ports(2)
    with running(Options(repository, grpc_port=grpc, metrics_port=metrics)):
        assert set(os.listdir("/dev/shm")) > before
    assert set(os.listdir("/dev/shm")) <= before


def test_a_server_that_cannot_start_says_so(repository: Path, server: Server, tmp_path: Path) -> None:
    grpc, metrics = free_ports(2)
    taken = Options(repository, grpc_port=int(server.url.partition(":")[2]), metrics_port=metrics)
    with pytest.raises(InputError, match="--grpc-port"), running(taken):
        pass
    copy = tmp_path / "repository"
    shutil.copytree(repository, copy, symlinks=True)
    engine = copy / "encoder" / "1" / "model.xml"
    engine.write_text("<net>")
    damaged = Options(copy, grpc_port=grpc, metrics_port=metrics)
    with pytest.raises(ServerError, match=r"version 1 is damaged: encoder/model\.xml"), running(damaged):
        pass
    manifest = copy / "product_classifier" / "1" / MANIFEST  # one that does not give it away
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "encoder/model.xml": fingerprint(engine)}))
    with (
        (tmp_path / "log").open("wb") as log,
        pytest.raises(ServerError, match="its log says why"),
        running(damaged, log),
    ):
        pass
    assert "the engine cannot be loaded" in (tmp_path / "log").read_text()


def test_int8_serves_the_same_answers(checkpoint: Path, classifier: Classifier, tmp_path: Path) -> None:
    build(checkpoint, tmp_path / "repository", "openvino", "int8")
    texts = ["红富士苹果 5斤装", "手机壳 磨砂防摔", "wireless earbuds"]
    grpc, metrics = free_ports(2)
    options = Options(tmp_path / "repository", grpc_port=grpc, metrics_port=metrics)
    with running(options), Classifier(f"localhost:{grpc}") as other:
        for ours, theirs in zip(classifier.classify(texts), other.classify(texts), strict=True):
            assert ours.category == theirs.category
            assert ours.confidence == pytest.approx(theirs.confidence, abs=0.02)


@pytest.mark.skipif(bool(gpu_name()), reason="refusal by a machine without a GPU")
def test_a_plan_is_not_served_without_a_gpu(checkpoint: Path, tmp_path: Path) -> None:
    build(checkpoint, tmp_path / "repository", "tensorrt-rtx", "fp16")
    grpc, metrics = free_ports(2)
    options = Options(tmp_path / "repository", grpc_port=grpc, metrics_port=metrics)
    with (tmp_path / "log").open("wb") as log, pytest.raises(ServerError), running(options, log):
        pass
    assert "a TensorRT-RTX plan needs an NVIDIA GPU and its driver; found none" in (tmp_path / "log").read_text()
