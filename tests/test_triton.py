"""Starting and stopping the server."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from aisle.build.build import build
from aisle.build.cuda_runtime import gpu_name
from aisle.client import Classifier
from aisle.deploy.server import instances, watchdog
from aisle.deploy.server.triton import ServerOptions, free_ports, running
from aisle.errors import InputError, ServerError
from aisle.loadtest import processes

from .conftest import Server, seal, wait_for


def serving(repository: Path) -> tuple[subprocess.Popen[str], str]:
    """Start `aisle serve` as a user does; return the process, when it is ready, and its URL."""
    grpc, metrics = map(str, free_ports(2))
    command = [sys.executable, "-m", "aisle", "serve", "--repository", str(repository)]
    command += ["--grpc-port", grpc, "--metrics-port", metrics]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert any(line.startswith("ready: ") for line in process.stderr)
    return process, f"localhost:{grpc}"


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_no_process_is_left_running(repository: Path, how: signal.Signals) -> None:
    process, url = serving(repository)
    with Classifier(url) as classifier:
        assert classifier.classify(["红富士苹果"])
    started = processes.tree(process.pid) - {process.pid}
    assert len(started) >= 3  # the server and its two Python models
    process.send_signal(how)
    process.communicate(timeout=60)
    assert process.returncode == (-how if how == signal.SIGKILL else 0)
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in started))


@pytest.mark.long
def test_a_server_with_a_watchdog_stops_without_a_timeout(repository: Path) -> None:
    """Triton waits for open connections, including the watchdog's, and gives up after ten seconds."""
    process, _ = serving(repository)
    time.sleep(watchdog.CHECK_SECONDS + 1)
    process.send_signal(signal.SIGTERM)
    _, log = process.communicate(timeout=60)
    assert "Waiting for in-flight requests to complete" in log
    assert "timeout expired" not in log


def test_shared_memory_is_released_and_a_missing_gpu_is_no_error(repository: Path, tmp_path: Path) -> None:
    grpc, metrics = free_ports(2)
    with (
        (tmp_path / "log").open("wb") as log,
        running(ServerOptions(repository, grpc_port=grpc, metrics_port=metrics), log) as process,
    ):
        command = Path(f"/proc/{process.pid}/cmdline").read_text("utf-8")
        (own,) = re.findall(r"shm-region-prefix-name=([^\0]+)", command)  # other servers may start and stop meanwhile
        assert any(name.startswith(own) for name in os.listdir("/dev/shm"))
    assert not any(name.startswith(own) for name in os.listdir("/dev/shm"))
    lines = (tmp_path / "log").read_text("utf-8")
    assert "Started Metrics Service" in lines
    assert gpu_name() or not re.search("CUDA driver|NVML|CudaDriverHelper", lines)


def test_a_server_that_cannot_start_reports_why(repository: Path, server: Server, tmp_path: Path) -> None:
    grpc, metrics = free_ports(2)
    taken = ServerOptions(repository, grpc_port=int(server.url.partition(":")[2]), metrics_port=metrics)
    with pytest.raises(InputError, match="--grpc-port"), running(taken):
        pass
    copy = tmp_path / "repository"
    shutil.copytree(repository, copy, symlinks=True)
    engine = copy / "encoder" / "1" / "model.xml"
    engine.write_text("<net>")
    damaged = ServerOptions(copy, grpc_port=grpc, metrics_port=metrics)
    with pytest.raises(ServerError, match=r"version 1 is damaged: encoder/model\.xml"), running(damaged):
        pass
    seal(copy, 1, "encoder/model.xml")  # now the manifest matches
    with (
        (tmp_path / "log").open("wb") as log,
        pytest.raises(ServerError, match="its log says why"),
        running(damaged, log),
    ):
        pass
    assert "the engine cannot be loaded" in (tmp_path / "log").read_text()


@pytest.mark.long
def test_int8_serves_the_same_answers(checkpoint: Path, classifier: Classifier, tmp_path: Path) -> None:
    build(checkpoint, tmp_path / "repository", "openvino", "int8")
    texts = ["红富士苹果 5斤装", "手机壳 磨砂防摔", "wireless earbuds"]
    grpc, metrics = free_ports(2)
    options = ServerOptions(tmp_path / "repository", grpc_port=grpc, metrics_port=metrics)
    with running(options), Classifier(f"localhost:{grpc}") as other:
        for ours, theirs in zip(classifier.classify(texts), other.classify(texts), strict=True):
            assert ours.category == theirs.category
            assert ours.confidence == pytest.approx(theirs.confidence, abs=0.02)


@pytest.mark.skipif(bool(gpu_name()), reason="refusal by a machine without a GPU")
@pytest.mark.long
def test_a_plan_is_not_served_without_a_gpu(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(checkpoint, tmp_path / "repository", "tensorrt-rtx", "fp16")
    grpc, metrics = free_ports(2)
    options = ServerOptions(tmp_path / "repository", grpc_port=grpc, metrics_port=metrics)
    with (
        pytest.raises(InputError, match="is built for target tensorrt-rtx, which needs an NVIDIA GPU"),
        running(options),
    ):
        pass
    (tmp_path / "nvidiactl").touch()  # a driver that does not work
    monkeypatch.setattr(instances, "DEVICES", tmp_path)
    with (tmp_path / "log").open("wb") as log, pytest.raises(ServerError), running(options, log):
        pass
    assert "a TensorRT-RTX plan needs an NVIDIA GPU and its driver; found none" in (tmp_path / "log").read_text()
