"""More callers than the server can handle: some are refused at once, the others are answered."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from tritonclient.grpc import InferenceServerClient, InferInput

from aisle.client import Classifier, Overloaded
from aisle.client.bulk import classify_file
from aisle.client.protocol import MODEL
from aisle.errors import InputError
from aisle.loadtest import generator, memory
from aisle.loadtest import overload as overload_module
from aisle.loadtest.overload import overload
from aisle.preprocess.tables.table import read_rows
from aisle.preprocess.tables.writing import write_rows

from .clock import VirtualClock
from .conftest import Server, long_text, total, wait_for


def test_requests_over_the_queue_limit_are_refused_at_once(short: Server) -> None:
    before = short.figures()
    with Classifier(short.url, timeout=120) as classifier, ThreadPoolExecutor(32) as pool:

        def ask(caller: int) -> int | str:
            try:
                return len(classifier.classify([long_text(64 * caller + row) for row in range(64)]))
            except Overloaded as refusal:
                return refusal.status

        with short.held():
            calls = [pool.submit(ask, number) for number in range(32)]
            wait_for(lambda: sum(call.done() for call in calls) >= 24)  # at once: the engine stands still
        outcomes = [call.result() for call in calls]
        answered = outcomes.count(64)
        assert set(outcomes) == {64, "UNAVAILABLE"}
        after = short.figures()

        def grown(name: str) -> float:
            return sum(after[key] - before[key] for key in after if key.partition("{")[0] == name)

        assert grown("aisle_tokens_useful_total") == 128 * 64 * answered  # the engine has seen no others
        assert grown("aisle_requests_refused_total") == len(outcomes) - answered
        assert classifier.classify([long_text(2048)])[0].category  # with the callers, the overload goes


def _texts(texts: list[str]) -> InferInput:
    tensor = InferInput("text", [len(texts), 1], "BYTES")
    tensor.set_data_from_numpy(np.array([text.encode() for text in texts], np.object_).reshape(-1, 1))
    return tensor


def test_interactive_requests_run_before_files(server: Server) -> None:
    """A call overtakes the requests of files in the encoder's queue."""
    done: list[str] = []
    batches = [[_texts([long_text(3000 + 32 * file + row) for row in range(32)])] for file in range(12)]
    with (
        InferenceServerClient(server.url) as triton,
        Classifier(server.url, timeout=120) as classifier,
        ThreadPoolExecutor(1) as pool,
    ):

        def note(result: object, error: Exception | None) -> None:
            done.append("failed" if error else "file")

        def call() -> None:
            classifier.classify(["someone waits 苹果"])
            done.append("call")

        with server.held():
            before = server.tokenized()
            for batch in batches:
                told = {"bulk": True, "caller": "files", "sent_us": time.time_ns() // 1000, "wait_us": 300_000_000}
                triton.async_infer(MODEL, batch, note, parameters=told)
            server.wait_for_texts(before + 32 * len(batches))
            pool.submit(call)
            server.wait_for_texts(before + 32 * len(batches) + 1)
        wait_for(lambda: len(done) > len(batches))
    assert sorted(done) == ["call", *["file"] * len(batches)]
    assert done.index("call") < len(batches) // 2


def test_a_file_is_completed_under_overload(short: Server, tmp_path: Path) -> None:
    """Single calls are not retried; a file waits and loses no row."""
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    texts = [f"苹果 {i}" for i in range(640)]
    write_rows(source, lambda: ({"text": text} for text in texts), ["text"])
    refused = "aisle_requests_refused_total"
    before = total(short.metrics, refused)
    with Classifier(short.url, timeout=120) as classifier, ThreadPoolExecutor(6) as pool:
        others = [[f"{caller} {text}" for text in texts] for caller in range(4)]
        with short.held():
            tokenized = short.tokenized()
            pool.submit(classifier.classify, [long_text(2900 + row) for row in range(64)])  # too long to be run inline
            short.wait_for_texts(tokenized + 64)
            jam = [pool.submit(lambda own=own: list(classifier.stream(own))) for own in others]  # type: ignore[misc]
            file = pool.submit(classify_file, classifier, source, out, "text", 1)
            wait_for(lambda: total(short.metrics, refused) > before)
        result = file.result()
        assert (result["rows"], result["errors"]) == (640, 0)
        assert [row["text"] for row in read_rows(out)] == texts
        assert all(len(future.result()) == len(texts) for future in jam)


def test_measurements_of_an_overload(short: Server, sample: Path) -> None:
    result = overload(sample, "text", short.url, times=3, seconds=1)
    assert result["offered_per_second"] > result["capacity"]["texts_per_second"]
    assert result["overload"]["refused"] + result["capacity"]["refused"] > 0  # 64 callers are too many for a queue of 2
    for phase in ("unloaded", "capacity", "overload", "after"):
        assert result[phase]["failed"] == 0
        assert result[phase]["p99_ms"] >= result[phase]["p50_ms"] > 0
    assert result["unloaded"]["refused"] == result["after"]["refused"] == 0


def slow_sender(clock: VirtualClock) -> type:
    """A client whose calls block the whole process, so that it cannot keep the schedule."""

    class SlowSender:
        def __init__(self, url: str, **_: object) -> None:
            pass

        async def __aenter__(self) -> SlowSender:
            return self

        async def __aexit__(self, *_: object) -> None:
            pass

        async def classify(self, texts: list[str]) -> None:
            clock.now += 0.004
            await asyncio.sleep(0)

        async def stream(self, texts: Iterator[str]) -> AsyncIterator[str]:
            for text in texts:
                await asyncio.sleep(0.01)
                yield text

    return SlowSender


def test_overload_latency_counts_from_the_scheduled_time(
    sample: Path, monkeypatch: pytest.MonkeyPatch, clock: VirtualClock
) -> None:
    """A sender that falls behind must not report the latency from sending."""
    monkeypatch.setattr(overload_module, "AsyncClassifier", slow_sender(clock))
    monkeypatch.setattr(generator, "WARM_UP", 0.0)
    result = overload(sample, "text", "nowhere", times=4, seconds=1)
    over = result["overload"]
    assert over["failed"] == 0
    assert over["sent_per_second"] < 0.7 * result["offered_per_second"]
    # At four times the capacity the last of a second's calls is sent about three seconds late.
    assert over["p99_ms"] > 1000
    assert over["p50_ms"] > 20 * result["unloaded"]["p50_ms"]


def test_memory_is_sampled_by_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "SAMPLE_SECONDS", 0.15)
    with memory.Memory(os.getpid(), tmp_path / "memory.csv") as sampled:
        wait = threading.Event()
        while len({seconds for seconds, _, _ in sampled.rows}) < 4:
            wait.wait(0.05)
    assert sampled.growth()["mib_end"] > 10
    rows = list(read_rows(tmp_path / "memory.csv"))
    assert [float(row["mib"]) for row in rows] == [mib for _, _, mib in sampled.rows]
    with pytest.raises(InputError, match="no process"):
        memory.Memory(2**22 + 1, tmp_path / "memory.csv")
