"""Work whose caller has left is dropped, whatever the caller's clock says."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import time
from pathlib import Path

import pytest

from aisle.client import AsyncClassifier, ClassifierError
from aisle.deploy import late
from aisle.deploy.triton import Options, free_ports, running

from .conftest import total


def told(caller: str, sent: float, wait: float) -> str:
    return json.dumps({"caller": caller, "sent_us": int(1e6 * sent), "wait_us": int(1e6 * wait)})


@pytest.mark.parametrize("skew", [0.0, 3600.0, -3600.0])
def test_only_what_waited_too_long_is_late(skew: float, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1e9
    monkeypatch.setattr(time, "time", lambda: now)
    callers = late.Callers()
    assert not callers.gone(told("a", now + skew - 0.01, 2))
    assert not callers.gone(told("a", now + skew - 1.9, 2))
    assert callers.gone(told("a", now + skew - 2.1, 2))
    assert not callers.gone(told("a", now + skew - 2.1, 3))
    assert not callers.gone(told("b", now + skew - 2.1, 2))  # nothing to hold it against


def test_a_clock_is_compared_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1e9]
    monkeypatch.setattr(time, "time", lambda: now[0])
    callers = late.Callers()
    assert not callers.gone(told("a", now[0], 1))
    now[0] += late.AGAIN + 1
    assert not callers.gone(told("a", now[0] - 5, 1))  # its clock was set back meanwhile


def test_callers_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(late, "REMEMBERED", 2)
    callers, now = late.Callers(), time.time()
    for name in "abc":
        assert not callers.gone(told(name, now, 1))
    assert callers.gone(told("c", now - 10, 1))
    assert not callers.gone(told("a", now - 10, 1))


@pytest.mark.parametrize(
    "parameters",
    ["{}", '{"caller": "a"}', told("x" * 1000, 0, 0), '{"caller": 1, "sent_us": 1, "wait_us": 1}'],
)
def test_whoever_says_nothing_of_use_waits(parameters: str) -> None:
    callers = late.Callers()
    assert not callers.gone(parameters)
    assert not callers.gone(parameters)


def test_what_nobody_waits_for_is_not_computed(repository: Path, tmp_path: Path) -> None:
    """Those who leave while the encoder has their texts are told by their clocks; Triton drops only what it holds."""
    copy = tmp_path / "repository"
    shutil.copytree(repository, copy, symlinks=True)
    code = copy / "encoder" / "model.py"
    slow = re.sub("(?m)^( +)(logits = self.engine)", r"\1__import__('time').sleep(1)\n\1\2", code.read_text("utf-8"))
    slow = re.sub("(?m)^TOKENS = .*", "TOKENS = 1", slow)  # every request is a batch of its own
    code.write_text(slow, "utf-8")
    grpc, port = free_ports(2)
    options = Options(copy, grpc_port=grpc, metrics_port=port, cache_mb=0)
    url, address = f"localhost:{grpc}", f"localhost:{port}"

    async def callers() -> None:
        async with AsyncClassifier(url, timeout=60) as patient, AsyncClassifier(url, timeout=1.8, retries=0) as hasty:
            await hasty.classify(["苹果"])  # from which the server knows its clock
            waiting = [asyncio.create_task(patient.classify(["蓝牙耳机"]))]  # computed for a second,
            await asyncio.sleep(0.2)
            # and then these for two, and all others come along.
            waiting += [asyncio.create_task(patient.classify([text])) for text in ("红富士苹果", "洗衣机")]
            await asyncio.sleep(0.3)
            asked = [asyncio.create_task(hasty.classify([f"红富士苹果 {i}"])) for i in range(5)]
            left = await asyncio.gather(*asked, return_exceptions=True)
            assert [each.status for each in left if isinstance(each, ClassifierError)] == ["DEADLINE_EXCEEDED"] * 5
            assert all(await asyncio.gather(*waiting))

    with (tmp_path / "log").open("wb") as log, running(options, log):
        asyncio.run(callers())
        deadline = time.monotonic() + 30
        while total(address, "aisle_engine_batches_total") < 4 and time.monotonic() < deadline:
            time.sleep(0.2)
        time.sleep(2)  # more than between two reports
        assert total(address, "aisle_engine_batches_total") == 4
        assert 1 <= total(address, "aisle_texts_late_total") <= 5  # Triton dropped the others
