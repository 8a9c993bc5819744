"""Load tests of the running server: Locust's figures, the knee, and the comparison with h2load."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path

import grpc
import pytest
from tritonclient.grpc import service_pb2

from aisle.deploy.server.triton import free_ports
from aisle.errors import ServerError
from aisle.loadtest.generator import percentile_of_counts
from aisle.loadtest.locust.run import frame, knee, read_h2load
from tests.conftest import Server, aisle


def row(offered: int, answered: float, p99: float) -> dict[str, float]:
    return {"offered": offered, "texts_per_second": answered, "p99_ms": p99}


def test_the_knee_is_the_last_load_answered_in_time() -> None:
    rows = [row(100, 100, 20), row(200, 199, 25), row(300, 298, 60), row(400, 399, 800), row(500, 500, 30)]
    assert knee(rows, 10) == 300  # p99 jumps; later loads do not count
    assert knee([*rows[:2], row(300, 250, 60)], 10) == 200  # not all is answered
    assert knee([row(100, 20, 900)], 10) is None
    assert knee([{"offered": None, "texts_per_second": 9, "p99_ms": 9}, *rows], 10) == 300


def test_percentiles_of_a_histogram() -> None:
    counts = {5.0: 90, 1.0: 900, 20.0: 9, 100.0: 1}
    assert [percentile_of_counts(counts, p) for p in (50, 90, 95, 99, 99.9, 100)] == [1, 1, 5, 5, 20, 100]


def test_closed_then_open_loads_one_row_each(server: Server, sample: Path, tmp_path: Path) -> None:
    page = tmp_path / "report" / "loadtest.html"
    arguments = ["--callers", "2", "--shares", "0.2", "--shares", "0.4", "--seconds", "1", "--warm-up", "0.5"]
    done = aisle(*("loadtest", sample, "--url", server.url, *arguments, "--zipf", "1", "--report", page, "--json"))
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    closed, *opened = result["rows"]
    assert closed["load"] == "2 at once"
    assert closed["offered"] is None
    assert [each["offered"] for each in opened] == sorted(each["offered"] for each in opened)
    assert opened[-1]["offered"] == pytest.approx(0.4 * closed["texts_per_second"], abs=1)
    for each in result["rows"]:
        assert each["failures"] == 0
        assert each["texts_per_second"] == each["texts"] / result["seconds"]  # the warm-up is not among them
        assert 0 < each["p50_ms"] <= each["p95_ms"] <= each["p99_ms"] <= each["p99.9_ms"]
    assert json.loads(page.with_suffix(".json").read_text())["rows"] == result["rows"]
    assert "<svg" in page.read_text()


@pytest.mark.long
def test_workers_share_the_load(server: Server, sample: Path, tmp_path: Path) -> None:
    arguments = ["--callers", "2", "--shares", "0.3", "--seconds", "1", "--warm-up", "0.5", "--workers", "2"]
    done = aisle("loadtest", sample, "--url", server.url, *arguments, "--report", tmp_path / "a.html", "--json", env={})
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert [each["load"].endswith("at once") for each in result["rows"]] == [True, False]
    assert all(each["texts"] > 0 for each in result["rows"])


def test_no_server_is_exit_code_1(sample: Path, tmp_path: Path) -> None:
    arguments = ["--callers", "1", "--shares", "1", "--seconds", "0.2", "--warm-up", "0"]
    done = aisle("loadtest", sample, "--url", "localhost:1", *arguments, "--report", tmp_path / "a.html")
    assert done.returncode == 1
    assert "is the server up?" in done.stderr


def test_the_prepared_frame_is_a_grpc_message(server: Server) -> None:
    body = frame("红富士苹果 5斤装")
    assert (body[0], int.from_bytes(body[1:5], "big")) == (0, len(body) - 5)
    with grpc.insecure_channel(server.url) as channel:
        call = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=bytes,
            response_deserializer=service_pb2.ModelInferResponse.FromString,
        )
        answer = call(body[5:], timeout=30)
    assert {output.name for output in answer.outputs} >= {"category", "confidence"}


def test_read_h2load() -> None:
    output = (
        "finished in 4.00s, 517.25 req/s, 120.9KB/s\n"
        "requests: 2069 total, 2077 started, 2069 done, 2069 succeeded, 0 failed, 0 errored, 0 timeout\n"
    )
    assert read_h2load(output) == 517.25
    for bad in ("", output.replace("0 failed", "3 failed")):
        with pytest.raises(ServerError, match="h2load"):
            read_h2load(bad)


@pytest.mark.skipif(shutil.which("h2load") is None, reason="h2load is not installed")
def test_second_opinion(server: Server, sample: Path) -> None:
    done = aisle(
        *("loadtest", sample, "--url", server.url, "--second-opinion", "--callers", "2", "--seconds", "1", "--json")
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["ratio"] == result["locust_texts_per_second"] / result["h2load_texts_per_second"]


def test_a_load_started_on_locusts_page_is_reported(server: Server, sample: Path, tmp_path: Path) -> None:
    """The page is served until Ctrl-C; then the load started there is reported."""
    page = tmp_path / "web.html"
    options = ["--callers", "1", "--shares", "0.5", "--seconds", "1", "--warm-up", "0", "--web", "--report", page]
    command = [sys.executable, "-m", "aisle", "loadtest", sample, "--url", server.url, *options, "--json"]
    (port,) = free_ports(1)
    address = f"http://localhost:{port}"
    environment = {**os.environ, "LOCUST_WEB_PORT": str(port)}
    with subprocess.Popen(
        [*map(str, command)], stdout=subprocess.PIPE, text=True, start_new_session=True, env=environment
    ) as process:
        wait_for_page(f"{address}/")
        form = urllib.parse.urlencode({"user_count": 1, "spawn_rate": 1}).encode()
        urllib.request.urlopen(f"{address}/swarm", form).close()
        while json.load(urllib.request.urlopen(f"{address}/stats/requests"))["state"] != "stopped":
            time.sleep(0.2)
        os.killpg(process.pid, signal.SIGINT)
        result = json.loads(process.communicate()[0])
    assert process.returncode == 0
    assert result["rows"][0]["load"] == "1 at once"
    assert json.loads(page.with_suffix(".json").read_text())["rows"] == result["rows"]


def wait_for_page(url: str) -> None:
    for _ in range(600):
        with contextlib.suppress(OSError):
            urllib.request.urlopen(url).close()
            return
        time.sleep(0.1)
    raise AssertionError(f"{url} does not answer")
