"""Faults of production, caused on purpose: killed processes, stopped servers, full disks."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tritonclient.grpc import InferenceServerClient

from aisle.build.repository import MODELS
from aisle.client import Classifier, Prediction, Unavailable
from aisle.client.bulk import classify_file
from aisle.deploy.server import supervise
from aisle.deploy.server.release import Release, servers
from aisle.deploy.server.triton import ServerOptions
from aisle.errors import ServerError
from aisle.preprocess.tables.table import read_rows
from aisle.preprocess.tables.writing import write_rows

from .conftest import Server, below, wait_for
from .test_triton import serving


@pytest.fixture
def served(repository: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    copy = tmp_path / "repository"
    shutil.copytree(repository, copy, symlinks=True)
    process, url = serving(copy)
    threading.Thread(target=process.communicate, daemon=True).start()  # otherwise its log would fill the pipe
    yield process, url
    process.kill()
    process.wait()


def test_a_file_survives_the_death_of_a_step_and_of_triton(
    served: tuple[subprocess.Popen[str], str], tmp_path: Path
) -> None:
    process, url = served
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    texts = [f"红富士苹果 {i}号" for i in range(4000)]
    write_rows(source, lambda: ({"text": text} for text in texts), ["text"])
    partial = tmp_path / "out.jsonl.partial"
    with Classifier(url) as classifier, ThreadPoolExecutor(1) as pool:
        job = pool.submit(classify_file, classifier, source, out, "text", 1)
        wait_for(lambda: job.done() or (partial.exists() and partial.stat().st_size > 10_000))
        (encoder,) = below(process.pid, "/encoder/1/model.py")
        os.kill(encoder, signal.SIGKILL)
        wait_for(lambda: below(process.pid, "/encoder/1/model.py") - {encoder})
        (triton,) = below(process.pid, "--model-repository=")
        os.kill(triton, signal.SIGKILL)
        assert not job.done()
        result = job.result(300)
        assert wait_for(lambda: below(process.pid, "--model-repository=")) != {triton}
    assert (result["rows"], result["errors"], result["resumed_from"]) == (4000, 0, 0)
    assert [row["text"] for row in read_rows(out)] == texts


def test_callers_of_a_dead_encoder_get_an_error_at_once(served: tuple[subprocess.Popen[str], str]) -> None:
    process, url = served
    text = "红富士苹果 " * 60
    with Classifier(url, timeout=120, retries=0) as classifier, ThreadPoolExecutor(16) as pool:
        classifier.classify([text])
        (encoder,) = below(process.pid, "/encoder/1/model.py")
        batches = [[f"{number} {row} {text}" for row in range(64)] for number in range(16)]
        calls = [pool.submit(classifier.classify, batch) for batch in batches]
        wait_for(lambda: any(call.done() for call in calls))
        os.kill(encoder, signal.SIGKILL)
        failures = [error for call in calls if (error := call.exception(60)) is not None]
        assert failures
        assert all(isinstance(error, Unavailable) for error in failures)  # a status that clients retry
    with Classifier(url) as classifier:
        assert [type(answer) for answer in classifier.stream([text])] == [Prediction]  # when everything has recovered


@pytest.mark.long
def test_a_step_that_hangs_is_noticed_and_loses_no_row(served: tuple[subprocess.Popen[str], str]) -> None:
    process, url = served
    with Classifier(url) as classifier:
        expected = classifier.classify(["红富士苹果"])[0].category
        (encoder,) = below(process.pid, "/encoder/1/model.py")
        os.kill(encoder, signal.SIGSTOP)
        try:
            answers = list(classifier.stream(["红富士苹果"] * 65))  # two requests that wait for their answers
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(encoder, signal.SIGCONT)
        assert [answer.category for answer in answers if isinstance(answer, Prediction)] == [expected] * 65
        assert encoder not in below(process.pid, "/encoder/1/model.py")


def test_a_dead_step_without_callers_is_reloaded(served: tuple[subprocess.Popen[str], str], tmp_path: Path) -> None:
    """The tokenizer, and the encoder of a candidate without traffic."""
    process, url = served
    triton = below(process.pid, "--model-repository=")
    repository = tmp_path / "repository"
    trial = subprocess.Popen(tried(repository, "--shadow", "120"), stderr=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: [each.revision for each in servers(repository)] == [2])
        with Classifier(url) as classifier:
            for code in ("/tokenizer/1/model.py", "/encoder/2/model.py"):
                (dead,) = below(process.pid, code)
                os.kill(dead, signal.SIGKILL)
                wait_for(lambda code=code, dead=dead: below(process.pid, code) - {dead})  # type: ignore[misc]
                assert [type(answer) for answer in classifier.stream(["红富士苹果"])] == [Prediction]
        assert below(process.pid, "--model-repository=") == triton
    finally:
        trial.terminate()
        trial.communicate(timeout=60)


def tried(repository: Path, *how: str) -> list[str]:
    """Add version 2, a copy of version 1, and return the command that tries it."""
    for model in MODELS:
        shutil.copytree(repository / model / "1", repository / model / "2", symlinks=True)
    return [sys.executable, "-m", "aisle", "deploy", "--repository", str(repository), "--version", "2", *how]


def test_a_trial_ends_when_triton_ends(served: tuple[subprocess.Popen[str], str], tmp_path: Path) -> None:
    """If the candidate was the cause, it is not tried again and again."""
    process, url = served
    repository = tmp_path / "repository"
    command = tried(repository, "--canary", "0.5", "--canary-seconds", "120")
    trial = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: Release.load(repository).share and [each.revision for each in servers(repository)] == [2])
    (triton,) = below(process.pid, "--model-repository=")
    os.kill(triton, signal.SIGKILL)
    _, errors = trial.communicate(timeout=60)
    assert trial.returncode == 1
    assert "Triton ended during the trial of version 2" in errors
    with Classifier(url, timeout=60) as classifier:
        (answer,) = classifier.stream(["红富士苹果"])  # which waits for the server
    assert isinstance(answer, Prediction)
    assert answer.version == 1
    assert Release.load(repository).candidate is None


def test_requests_in_flight_are_answered_before_a_server_stops(served: tuple[subprocess.Popen[str], str]) -> None:
    process, url = served
    text = "红富士苹果 " * 60
    with Classifier(url, timeout=60, retries=0) as classifier, ThreadPoolExecutor(8) as pool:
        expected = classifier.classify([text])[0]
        with InferenceServerClient(url) as triton:
            batches = [[f"{number} {row} {text}" for row in range(16)] for number in range(8)]
            calls = [pool.submit(classifier.classify, batch) for batch in batches]
            statistics = triton.get_inference_statistics
            wait_for(lambda: statistics("tokenizer").model_stats[0].inference_count == 8 * 16 + 1)
        process.send_signal(signal.SIGTERM)
        for call in calls:
            assert {answer.category for answer in call.result()} == {expected.category}
    process.wait(60)
    assert process.returncode == 0


def test_a_full_disk_is_one_line_and_the_file_resumes(server: Server, tmp_path: Path) -> None:
    """A limit on the file size causes the same errors as a full disk, without filling the disk."""
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    texts = [f"苹果 {i}" for i in range(500)]
    write_rows(source, lambda: ({"text": text} for text in texts), ["text"])
    command = [sys.executable, "-m", "aisle", "classify", str(source), "-o", str(out), "--url", server.url, "--json"]

    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=fill, check=False)
    assert done.returncode == 2
    assert f"cannot write {out}: File too large; correct that and run the command again" in done.stderr
    assert "Traceback" not in done.stderr
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["resumed_from"] > 0
    assert [row["text"] for row in read_rows(out)] == texts


@pytest.mark.long
def test_a_build_on_a_full_disk_is_one_line_and_leaves_no_files(checkpoint: Path, tmp_path: Path) -> None:
    if os.getuid() or subprocess.run(["unshare", "-m", "true"], check=False, capture_output=True).returncode:
        pytest.skip("mounting a small disk takes root")
    build = f"{sys.executable} -m aisle build {checkpoint} --repository . --precision fp32"
    script = (
        f"mount -t tmpfs -o size=512k tmpfs {tmp_path}; cd {tmp_path}; {build}; code=$?; find . -type f; exit $code"
    )
    done = subprocess.run(["unshare", "-m", "sh", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert re.fullmatch(r"aisle: \.: 0 MiB free, about \d+ needed; make room", done.stderr.splitlines()[-1])
    assert "Traceback" not in done.stderr
    assert not any(re.search(r"/\d+/|/\.", line) for line in done.stdout.splitlines())  # no version and no hidden files


@pytest.mark.parametrize("begins", [True, False])
def test_a_server_that_keeps_ending_is_not_restarted_forever(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, begins: bool
) -> None:
    starts = []

    @contextmanager
    def started(_: ServerOptions, release: object) -> Iterator[Any]:
        starts.append(1)
        if begins and len(starts) == 1:
            yield None
            return
        raise ServerError("it ended")

    monkeypatch.setattr(supervise, "started", started)
    monkeypatch.setattr(supervise, "watch", lambda *_: (9, None))
    monkeypatch.setattr(time, "sleep", lambda _: None)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        if begins:
            assert supervise.serve_forever(ServerOptions(tmp_path)) == 1
            assert len(starts) == supervise.MAX_RESTARTS + 1
        else:  # a failure of the first start is not retried: the operator can fix it
            with pytest.raises(ServerError):
                supervise.serve_forever(ServerOptions(tmp_path))
            assert len(starts) == 1
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
            signal.signal(number, handler)
