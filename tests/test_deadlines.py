"""Requests of callers that have left are dropped, with any clock."""

from __future__ import annotations

import asyncio
import json
import math
import time
from pathlib import Path

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from aisle.client import AsyncClassifier, ClassifierError
from aisle.deploy.serving import deadlines
from aisle.deploy.serving.batcher import QueuedRequest
from aisle.preprocess.encode import TextTokenizer

from .conftest import Server, long_text


def told(caller: str, sent: float, wait: float) -> str:
    return json.dumps({"caller": caller, "sent_us": int(1e6 * sent), "wait_us": int(1e6 * wait)})


@pytest.mark.parametrize("skew", [0.0, 3600.0, -3600.0])
def test_a_caller_waits_as_long_as_it_says(skew: float, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1e9
    monkeypatch.setattr(time, "time", lambda: now)
    callers = deadlines.CallerClocks()
    assert callers.timeout(told("a", now + skew - 0.01, 2)) == 2
    assert callers.timeout(told("a", now + skew - 1.9, 2)) == pytest.approx(0.11)
    assert callers.timeout(told("a", now + skew - 2.1, 2)) == pytest.approx(-0.09)
    assert callers.timeout(told("a", now + skew - 2.1, 3)) == pytest.approx(0.91)
    assert callers.timeout(told("b", now + skew - 2.1, 2)) == 2  # there is nothing to compare with


def test_a_clock_is_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1e9]
    monkeypatch.setattr(time, "time", lambda: now[0])
    callers = deadlines.CallerClocks()
    assert callers.timeout(told("a", now[0], 1)) == 1
    now[0] += deadlines.REMEASURE_SECONDS + 1
    assert callers.timeout(told("a", now[0] - 5, 1)) == 1  # its clock was set back meanwhile


def test_callers_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deadlines, "MAX_CALLERS", 2)
    callers, now = deadlines.CallerClocks(), time.time()
    for name in "abc":
        assert callers.timeout(told(name, now, 1)) == 1
    assert callers.timeout(told("c", now - 10, 1)) < 0
    assert callers.timeout(told("a", now - 10, 1)) == 1


def test_queue_time_is_not_travel_time() -> None:
    """The first request of a caller waits behind others; this does not make the next one look faster."""
    clock = [0.0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "perf_counter", lambda: clock[0])
        patch.setattr(time, "time", lambda: 1e9 + clock[0])
        callers = deadlines.CallerClocks()
        waiting = []
        for sent in (0.0, 1.0):  # both arrive without delay and stay in the queue
            clock[0] = sent
            waits = callers.timeout(told("a", 1e9 + sent, 2))
            waiting.append(QueuedRequest(None, np.ones(4, np.int64), np.array([4]), False, waits, sent))
        clock[0] = 2.5
        assert [each.age > each.timeout for each in waiting] == [True, False]
        clock[0] = 3.5
        assert waiting[1].age > waiting[1].timeout


@pytest.mark.parametrize(
    ("parameters", "timeout_us", "seconds"),
    [
        ("{}", 0, math.inf),
        ('{"caller": "a"}', 0, math.inf),
        ('{"caller": "a", "sent_us": 1}', 0, math.inf),
        ('{"wait_us": "long"}', 0, math.inf),
        ('{"wait_us": true}', 0, math.inf),
        ('{"wait_us": -1}', 0, math.inf),
        ('{"wait_us": 2500000}', 0, 2.5),
        ('{"wait_us": 2500000, "caller": 1, "sent_us": 1}', 0, 2.5),
        (told("x" * 1000, 0, 2.5), 0, 2.5),
        ("{}", 1_500_000, 1.5),
        ('{"wait_us": 2500000}', 1_500_000, 2.5),
    ],
)
def test_deadlines_of_other_clients(parameters: str, timeout_us: int, seconds: float) -> None:
    callers = deadlines.CallerClocks()
    assert callers.timeout(parameters, timeout_us) == seconds
    assert callers.timeout(parameters, timeout_us) == seconds


def plain_text(parameters: dict[str, int]) -> str:
    return f"洗衣机 {sorted(parameters)}"


def plain(url: str, **parameters: int) -> grpc.Future:
    """Call like any gRPC client, with these parameters."""
    request = service_pb2.ModelInferRequest(model_name="product_classifier")
    text = request.inputs.add(name="text", datatype="BYTES", shape=[1, 1])
    text.contents.bytes_contents.append(plain_text(parameters).encode())
    for name, value in parameters.items():
        request.parameters[name].int64_param = value
    return GRPCInferenceServiceStub(grpc.insecure_channel(url)).ModelInfer.future(request, timeout=120)


def test_abandoned_requests_are_not_computed(server: Server, checkpoint: Path) -> None:
    """The encoder recognizes abandoned requests by their deadlines; Triton drops only requests in its own queue."""
    patience = 3.0
    jam = [long_text(3500 + number) for number in range(64)]  # too long to be run inline

    async def callers() -> None:
        url = server.url
        async with AsyncClassifier(url, timeout=120) as bulk, AsyncClassifier(url, timeout=patience) as hasty:
            await hasty.classify(["苹果"])  # from which the server knows its clock
            before, tokenized = await asyncio.to_thread(server.figures), server.tokenized()
            with server.held():
                waiting = asyncio.create_task(bulk.classify(jam))
                await asyncio.to_thread(server.wait_for_texts, tokenized + len(jam))
                asked = [asyncio.create_task(hasty.classify([f"耳机 猫粮 {i} 奶粉 手机壳"])) for i in range(5)]
                others = [plain(url, wait_us=500_000), plain(url, timeout=500_000), plain(url)]
                await asyncio.to_thread(server.wait_for_texts, tokenized + len(jam) + 5 + len(others))
                await asyncio.sleep(patience)  # from here on nobody but the last one still waits
                left = await asyncio.gather(*asked, return_exceptions=True)
            assert [each.status for each in left if isinstance(each, ClassifierError)] == ["DEADLINE_EXCEEDED"] * 5
            assert await waiting
            codes = [await asyncio.to_thread(each.code) for each in others]
            assert codes == [grpc.StatusCode.CANCELLED, grpc.StatusCode.CANCELLED, grpc.StatusCode.OK]
        after = await asyncio.to_thread(server.figures)
        computed, late = (f'aisle_{name}_total{{version="1"}}' for name in ("tokens_useful", "texts_late"))
        (last,) = TextTokenizer(checkpoint / "tokenizer.json").tokens([plain_text({})])
        assert after[computed] - before[computed] == 128 * len(jam) + len(last)
        assert 3 <= after[late] - before[late] <= 7  # Triton dropped the others

    asyncio.run(callers())
