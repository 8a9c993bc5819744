"""Three real servers: requests are balanced over them, and no request is lost with one server."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from aisle.client import Classifier, Prediction
from aisle.deploy.server.triton import free_ports

from .conftest import series
from .test_dashboard import names, told

TEXTS = [f"红富士苹果 {i}斤装" if i % 2 else f"手机壳 磨砂防摔 {i}" for i in range(1500)]


@dataclass
class Member:
    """One of three servers, with its processes in their own group."""

    process: subprocess.Popen[str]
    port: int
    metrics: int
    folder: Path

    def texts(self) -> int:
        """How many texts it has tokenized."""
        shown = series(f"127.0.0.1:{self.metrics}").items()
        return int(sum(value for key, value in shown if key.startswith('nv_inference_count{model="tokenizer",')))

    def lose(self) -> None:
        """End it like a power failure."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for home in self.folder.glob("aisle-triton-*"):
            for leftover in Path("/dev/shm").glob(f"aisle_{home.name}_*"):
                leftover.unlink(missing_ok=True)


@pytest.fixture(scope="module")
def members(repository: Path) -> Iterator[list[Member]]:
    started = []
    folder = Path(tempfile.mkdtemp(prefix="aisle-"))
    for number in range(3):
        copy, home = folder / str(number) / "models", folder / str(number)
        shutil.copytree(repository, copy, symlinks=True)
        grpc, http, metrics = free_ports(3)
        command = [sys.executable, "-m", "aisle", "serve", "--repository", str(copy), "--log-json"]
        command += ["--grpc-port", str(grpc), "--http-port", str(http), "--metrics-port", str(metrics)]
        environment = {**os.environ, "TMPDIR": str(home)}
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True)
        started.append(Member(process, grpc, metrics, home))
    for member in started:
        assert member.process.stderr is not None
        assert any(json.loads(line)["message"].startswith("ready: ") for line in member.process.stderr)
    yield started
    for member in started:
        member.process.terminate()
    for member in started:
        member.process.communicate(timeout=60)
    shutil.rmtree(folder)


def addresses(members: list[Member]) -> str:
    """Return the addresses of all servers, like a DNS name with several addresses."""
    return "ipv4:" + ",".join(f"127.0.0.1:{member.port}" for member in members)


def test_the_client_balances_over_all_servers(members: list[Member]) -> None:
    before = [member.texts() for member in members]
    with Classifier(addresses(members)) as classifier:
        for i in range(61):
            classifier.classify([f"轮流 {i}"])
    shares = [member.texts() - start for member, start in zip(members, before, strict=True)]
    assert sum(shares) == 61
    assert min(shares) >= 15


def test_no_request_is_lost_with_a_server(members: list[Member], classifier: Classifier, tmp_path: Path) -> None:
    """Both at the same time: the client with all addresses, and the gateway."""
    from .gateway import TOKENS, gateway

    expected = [answer.category for answer in classifier.classify(TEXTS)]
    with ExitStack() as stack:
        entry = stack.enter_context(gateway(tmp_path / "envoy", [member.port for member in members]))
        through = stack.enter_context(Classifier(entry.url, tls=entry.tls, token=TOKENS["catalogue"]))
        direct = stack.enter_context(Classifier(addresses(members)))
        before = [member.texts() for member in members]
        for number, answers in enumerate(zip(direct.stream(TEXTS), through.stream(TEXTS), strict=True)):
            for answer in answers:
                assert isinstance(answer, Prediction)
                assert answer.category == expected[number]
            if number == 400:
                assert all(member.texts() > start for member, start in zip(members, before, strict=True))
                members[2].lose()
        assert number + 1 == len(TEXTS)
        assert names("envoy_") <= told(entry.metrics, "stats/prometheus")
    with Classifier(addresses(members)) as late:  # a client that starts while one server is missing
        assert [answer.category for answer in late.classify(TEXTS[:100])] == expected[:100]
