"""More callers than the server can serve: some are refused at once, the others are answered."""

from __future__ import annotations

import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tritonclient.grpc import InferenceServerClient

from aisle.client import Classifier, Overloaded
from aisle.client.bulk import classify_file
from aisle.client.protocol import MODEL, inputs
from aisle.deploy.triton import Options, free_ports, running
from aisle.errors import InputError
from aisle.loadtest import soak
from aisle.loadtest.overload import overload
from aisle.preprocess.table import read_rows, write_rows

from .conftest import Server, total

LONG = "红富士苹果 " * 60


@pytest.fixture(scope="module")
def ports(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, int]]:
    """A server whose encoder lets two calls and two requests of files wait."""
    folder = tmp_path_factory.mktemp("overload")
    copy = folder / "repository"
    shutil.copytree(repository, copy, symlinks=True)
    config = copy / "encoder" / "config.pbtxt"
    text = config.read_text("utf-8")
    text, count = re.subn(r'(max_queue_size" value { string_value: )"\d+"', r'\1"2"', text)
    assert count == 1
    config.write_text(text, "utf-8")
    grpc, metrics = free_ports(2)
    options = Options(copy, grpc_port=grpc, metrics_port=metrics, cache_mb=0)
    with (folder / "log").open("wb") as log, running(options, log):
        yield grpc, metrics


@pytest.fixture
def url(ports: tuple[int, int]) -> str:
    return f"localhost:{ports[0]}"


def test_those_over_the_queue_cost_nothing_and_the_others_are_answered(url: str, ports: tuple[int, int]) -> None:
    metrics = f"localhost:{ports[1]}"
    with Classifier(url, timeout=60) as classifier, ThreadPoolExecutor(32) as pool:
        expected = classifier.classify([LONG])[0]
        time.sleep(3)  # more than between two reports
        one = total(metrics, "aisle_tokens_useful_total")

        def ask(_: int) -> int | str:
            try:
                answers = classifier.classify([LONG] * 64)
            except Overloaded as refusal:
                return refusal.status
            return len([answer for answer in answers if answer.category == expected.category])

        outcomes = list(pool.map(ask, range(32)))
        answered = [each for each in outcomes if isinstance(each, int)]
        assert set(answered) == {64}
        assert set(outcomes) - {64} == {"UNAVAILABLE"}
        time.sleep(3)
        assert total(metrics, "aisle_tokens_useful_total") == one * (
            1 + 64 * len(answered)
        )  # the engine has seen no others
        assert total(metrics, "aisle_requests_refused_total") == len(outcomes) - len(answered)
        assert classifier.classify([LONG])[0].category == expected.category  # with the callers, the overload goes


def test_a_call_that_someone_waits_for_goes_before_files(server: Server) -> None:
    """It overtakes what files have in the encoder's queue."""
    done: list[str] = []
    with InferenceServerClient(server.url) as triton, Classifier(server.url, timeout=60) as classifier:
        classifier.classify([LONG])
        batches = [inputs([f"{LONG} {time.time_ns()} {i}" for i in range(64)], 1) for _ in range(24)]

        def note(result: object, error: Exception | None) -> None:
            done.append("failed" if error else "file")

        for batch in batches:
            triton.async_infer(MODEL, batch, note, parameters={"patient": True})
        classifier.classify([f"苹果 {time.time_ns()}"])
        done.append("call")
        deadline = time.monotonic() + 60
        while len(done) <= len(batches) and time.monotonic() < deadline:
            time.sleep(0.01)
    assert sorted(done) == ["call", *["file"] * len(batches)]
    assert done.index("call") < len(batches) // 2


def test_a_file_is_finished_all_the_same(url: str, tmp_path: Path) -> None:
    """Single calls leave an overloaded server alone; a whole file waits for its turn, and loses nothing."""
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    texts = [f"苹果 {i}" for i in range(640)]
    write_rows(source, lambda: ({"text": text} for text in texts), ["text"])
    with Classifier(url, timeout=60) as classifier, ThreadPoolExecutor(4) as pool:
        classifier.classify(["好"])
        jam = [pool.submit(lambda: list(classifier.stream(texts))) for _ in range(4)]
        result = classify_file(classifier, source, out, "text", top_k=1)
        assert (result["rows"], result["errors"]) == (640, 0)
        assert [row["text"] for row in read_rows(out)] == texts
        assert all(len(future.result()) == len(texts) for future in jam)


def test_figures_of_an_overload(url: str, sample: Path) -> None:
    result = overload(sample, "text", url, times=3, seconds=1)
    assert result["offered_per_second"] > result["capacity"]["texts_per_second"]
    assert result["overload"]["refused"] + result["capacity"]["refused"] > 0  # 64 callers are too many for a queue of 2
    for phase in ("unloaded", "capacity", "overload", "after"):
        assert result[phase]["failed"] == 0
        assert result[phase]["p99_ms"] >= result[phase]["p50_ms"] > 0
    assert result["unloaded"]["refused"] == result["after"]["refused"] == 0


def test_memory_is_sampled_by_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "SAMPLE_SECONDS", 0.15)
    with soak.Memory(os.getpid(), tmp_path / "memory.csv") as memory:
        wait = threading.Event()
        while len({seconds for seconds, _, _ in memory.rows}) < 4:
            wait.wait(0.05)
    assert memory.growth()["mib_end"] > 10
    rows = list(read_rows(tmp_path / "memory.csv"))
    assert [float(row["mib"]) for row in rows] == [mib for _, _, mib in memory.rows]
    with pytest.raises(InputError, match="no process"):
        soak.Memory(2**22 + 1, tmp_path / "memory.csv")
