"""How many processes tokenize, and how many run the engine on a GPU."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from aisle.build.repository import TEMPLATE
from aisle.deploy.server import instances, served_repository
from aisle.deploy.server.installation import infer_threads
from aisle.deploy.server.instances import Tokenizers, check_gpu, with_instances
from aisle.deploy.server.served_repository import ServedRepository
from aisle.errors import InputError


@pytest.mark.parametrize(
    ("config", "cores", "processes", "threads"),
    [("", 1, 1, 1), ("", 2, 1, 2), ("", 32, 4, 8), ("gpu", 2, 4, 1), ("gpu", 32, 8, 4), ("mine", 16, 2, 8)],
)
def test_tokenizers_by_cores_and_configuration(config: str, cores: int, processes: int, threads: int) -> None:
    chosen = Tokenizers.choose(config, cores)
    assert (chosen.processes, chosen.threads) == (processes, threads)
    text = with_instances((TEMPLATE / "tokenizer" / "config.pbtxt").read_text("utf-8"), chosen.processes)
    assert f"instance_group [ {{ count: {processes} kind: KIND_CPU }} ]" in text


@pytest.mark.parametrize(("cores", "gpus", "processes"), [(2, 1, 1), (10, 1, 2), (16, 1, 3), (64, 1, 3), (16, 2, 1)])
def test_encoders_by_cores_and_gpus(
    cores: int, gpus: int, processes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(gpus):
        (tmp_path / f"nvidia{number}").touch()
    (tmp_path / "nvidiactl").touch()
    monkeypatch.setattr(instances, "DEVICES", tmp_path)
    monkeypatch.setattr(served_repository, "cores", lambda: cores)
    served = ServedRepository(tmp_path / "repository", tmp_path / "served", "gpu")
    config = (tmp_path / "served" / "encoder" / "config.pbtxt").read_text("utf-8")
    assert f"instance_group [ {{ count: {processes} kind: KIND_GPU }} ]" in config
    assert f", {processes} encoder process" in served.describe()
    assert "encoder" not in ServedRepository(tmp_path / "repository", tmp_path / "on cpu", "").describe()


def test_an_engine_for_gpus_is_refused_where_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instances, "DEVICES", tmp_path)
    check_gpu(1, "openvino")
    with pytest.raises(InputError, match="version 1 is built for target cuda, which needs an NVIDIA GPU, and this"):
        check_gpu(1, "cuda")
    (tmp_path / "dxg").touch()  # in WSL
    check_gpu(1, "cuda")


def test_a_containers_cpu_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instances, "CPU_MAX", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    for told, expected in (
        ("max 100000", 16),
        ("250000 100000", 2),
        ("50000 100000", 1),
        ("3200000 100000", 16),
        ("", 16),
    ):
        (tmp_path / "cpu.max").write_text(told)
        assert instances.cores() == expected


@pytest.mark.parametrize(("says", "cores", "expected"), [("--grpc-infer-thread-count <n>", 16, ["8"]), ("", 16, [])])
def test_grpc_threads_if_triton_has_the_option(tmp_path: Path, says: str, cores: int, expected: list[str]) -> None:
    server = tmp_path / "tritonserver"
    server.write_text(f"#!/bin/sh\necho '{says}'\n")
    server.chmod(server.stat().st_mode | stat.S_IXUSR)
    found = infer_threads(str(server), dict(os.environ), cores)
    assert found == [f"--grpc-infer-thread-count={each}" for each in expected]
    assert infer_threads(str(server), dict(os.environ), 4) == []
