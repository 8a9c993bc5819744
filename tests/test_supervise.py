"""If a change of models fails in any way, the live version keeps serving."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from aisle.build.repository import MODELS, TEMPLATE
from aisle.deploy.server import admin as admin_module
from aisle.deploy.server import apply, instances, logs, served_repository, trial, triton
from aisle.deploy.server.admin import Admin
from aisle.deploy.server.release import Release, Status
from aisle.deploy.server.served_repository import ENSEMBLE, ServedRepository
from aisle.deploy.server.supervise import Supervisor
from aisle.deploy.server.trial import TrialMonitor
from aisle.deploy.server.triton import ServerOptions, Triton, free_ports, started
from aisle.errors import ServerError


@contextmanager
def answering(*contents: bytes, status: int = 200) -> Iterator[Admin]:
    """Return an Admin whose server gives these answers one after the other, and then repeats the last."""
    left = list(contents)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = left.pop(0) if len(left) > 1 else left[0]
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield Admin(("127.0.0.1", server.server_port), {}, 10)
        server.shutdown()


@pytest.mark.parametrize(
    "content", [b"<html>", b"[]", b"5", b"null", b'{"outputs": []}', b'{"outputs": [{}]}', b"\xff"]
)
def test_a_malformed_answer_is_an_error(content: bytes) -> None:
    calls: list[Callable[[Admin], object]] = [
        lambda a: a.classify("m", ["a"]),
        lambda a: a.counts("m"),
        lambda a: a.states(),
    ]
    for call in calls[: 2 if content == b"[]" else 3]:  # an empty list of states is valid
        with answering(content) as admin, pytest.raises(ServerError, match="is malformed"):
            call(admin)
    with answering(content, status=400) as admin, pytest.raises(ServerError):
        admin.load("m")


@contextmanager
def silent() -> Iterator[Admin]:
    """Return an Admin whose server accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield Admin(("127.0.0.1", server.getsockname()[1]), {})


@pytest.mark.parametrize(
    ("limit", "call"),
    [
        ("LOAD_SECONDS", lambda a: a.load("m")),
        ("UNLOAD_SECONDS", lambda a: a.unload("m")),
        ("QUERY_SECONDS", lambda a: a.states()),
        ("QUERY_SECONDS", lambda a: a.counts("m")),
        ("", lambda a: a.classify("m", ["a"], 0.1)),
        ("", lambda a: a.new_connection(0.1).load("m")),
    ],
)
def test_every_call_has_a_time_limit(
    limit: str, call: Callable[[Admin], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    if limit:
        monkeypatch.setattr(admin_module, limit, 0.1)
    with silent() as admin, pytest.raises(ServerError, match=r"has not answered /v2/.* within 0\.1 s"):
        call(admin)


def test_a_candidate_that_hangs_fails_the_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each text has a short limit, so that one that hangs does not end the trial's monitoring."""
    monkeypatch.setattr(trial, "COMPARE_SECONDS", 0.1)
    path = tmp_path / "trial"
    with silent() as admin, TrialMonitor(path, admin) as monitor, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as s:
        monitor.follow(Release(1, candidate=2, shadow=True))
        for number in range(2):
            s.sendto(json.dumps({"text": f"text {number}", "category": "a"}).encode(), str(path))
        while monitor.metrics().get("shadow_compared", 0) < 2:
            time.sleep(0.01)
        assert monitor.metrics() == {"shadow_compared": 2, "shadow_errors": 2, "shadow_agreed": 0, "changes": {}}


@pytest.fixture
def supervisor(repository: Path, tmp_path: Path) -> Iterator[Supervisor]:
    """A supervisor with a fake Triton that serves version 1; version 2 is available."""
    copy = tmp_path / "repository"
    shutil.copytree(repository, copy)
    for model in MODELS:
        shutil.copytree(copy / model / "1", copy / model / "2")
    shown = ServedRepository(copy, tmp_path / "view", "")
    shown.add_version(1)
    shown.write_ensemble(ENSEMBLE, 1)
    answer = json.dumps({"outputs": [{"name": "category", "shape": [1, 1], "data": ["a"]}]}).encode()
    with answering(answer) as admin:
        process: Any = SimpleNamespace(pid=os.getpid())
        triton = Triton(process, Release(1), shown, admin, tmp_path / "trial")
        yield Supervisor(triton, ServerOptions(copy), Status("127.0.0.1:1"))


def follow(supervisor: Supervisor) -> str:
    """Let it follow a release of version 2; return its status."""
    Release(2, 1).save(supervisor._repository)
    monitor: Any = SimpleNamespace(metrics=dict, follow=lambda _: None)
    supervisor._follow_release(monitor)
    return supervisor._status.error


def assert_version_1_serves(supervisor: Supervisor) -> None:
    shown = supervisor._triton.served
    assert (supervisor.release.live, shown.versions()) == (1, {1})
    assert (shown.folder / ENSEMBLE / "config.pbtxt").read_text("utf-8").count("model_version: 1\n") >= 2


def test_damaged_code_is_refused(supervisor: Supervisor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "template"
    shutil.copytree(TEMPLATE, broken, ignore=shutil.ignore_patterns("[0-9]*"))
    (broken / "encoder" / "model.py").write_text("def broken(:")
    monkeypatch.setattr(served_repository, "TEMPLATE", broken)
    error = follow(supervisor)
    assert "encoder/model.py is damaged" in error
    assert "install Aisle again" in error
    assert_version_1_serves(supervisor)


@pytest.mark.parametrize("error", [KeyError("outputs"), RuntimeError("who knows"), RecursionError(), OSError(5, "I/O")])
def test_an_unexpected_error_keeps_the_live_version(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(apply, "_warm_up", fail)
    told = follow(supervisor)
    assert told
    assert isinstance(error, OSError) or told.startswith(type(error).__name__)
    assert_version_1_serves(supervisor)


def test_a_warm_up_that_answers_too_little_is_refused(supervisor: Supervisor) -> None:
    assert "does not answer every text" in follow(supervisor)  # 64 texts, one answer
    assert_version_1_serves(supervisor)


@pytest.mark.parametrize("gpu", [False, True])
def test_errors_about_cuda_are_left_out_where_there_is_no_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu: bool
) -> None:
    monkeypatch.setattr(instances, "DEVICES", tmp_path)
    if gpu:
        (tmp_path / "nvidiactl").touch()
    lines = ["E1126 CUDA memory pool disabled", "E1126 a fault", "W1126 Failed to initialize NVML"]
    with (tmp_path / "log").open("wb") as file:
        log = logs.TritonLog(file.fileno())
        os.write(log.descriptor, "\n".join([*lines, ""]).encode())
        log.close()
    assert (tmp_path / "log").read_text().splitlines() == (lines if gpu else lines[1:2])
    assert not log.lock_failed


STAND_IN = '''"""Stands in for tritonserver: crashes as often as told, as over a lock, and then serves its metrics."""
import http.server, os, pathlib, sys

told = dict(argument.removeprefix("--").split("=", 1) for argument in sys.argv[2:] if "=" in argument)
starts = pathlib.Path(sys.argv[1], "starts")
starts.write_text(starts.read_text() + "x")
crashes, reason = pathlib.Path(sys.argv[1], "told").read_text().split(" ", 1)
if len(starts.read_text()) <= int(crashes):
    sys.stderr.write(reason + "\\n")
    sys.stderr.flush()
    os.abort()
address = (told["metrics-address"], int(told["metrics-port"]))
http.server.HTTPServer(address, type("Handler", (http.server.BaseHTTPRequestHandler,), {
    "do_HEAD": lambda self: (self.send_response(200), self.end_headers()), "log_message": lambda *_: None,
})).serve_forever()
'''
LOCK = "terminate called after throwing an instance of 'boost::interprocess::lock_exception'"


@pytest.mark.parametrize(
    ("crashes", "reason", "started_at"), [(2, LOCK, 3), (9, LOCK, None), (1, "E1126 out of memory", None)]
)
def test_a_start_that_crashes_over_a_lock_is_tried_again(
    repository: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    crashes: int,
    reason: str,
    started_at: int | None,
) -> None:
    (tmp_path / "server.py").write_text(STAND_IN)
    (tmp_path / "starts").write_text("")
    (tmp_path / "told").write_text(f"{crashes} {reason}")
    command = [sys.executable, str(tmp_path / "server.py"), str(tmp_path)]
    monkeypatch.setattr(triton, "triton_command", lambda home: (list(command), dict(os.environ)))
    grpc, metrics = free_ports(2)
    options = ServerOptions(repository, grpc_port=grpc, metrics_port=metrics)
    tried = "could not lock its shared memory (boost lock_exception); trying again"
    if started_at is None:
        with pytest.raises(ServerError, match="Triton ended with exit code -6 before it was ready"), started(options):
            pass
    else:
        with started(options) as running:
            assert running.process.poll() is None
    starts = len((tmp_path / "starts").read_text())
    assert starts == (started_at or (triton.STARTS if reason == LOCK else 1))
    said = capfd.readouterr().err
    assert said.count(tried) == starts - 1
    assert said.count(reason) == min(crashes, starts)  # the log is handed on
