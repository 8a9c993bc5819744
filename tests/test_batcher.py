"""The encoder's queues: bounded, calls before files, batches by tokens."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from aisle.deploy.batcher import AT_ONCE, Batcher, Ints, Logits, Waiting


class Engine:
    """Answers each text by its first token and the sum of all; it computes only while the gate is open."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.busy = threading.Event()
        self.batches: list[list[int]] = []  # lengths
        self.answers: dict[Any, Any] = {}
        self.gone: set[Any] = set()
        self.order: list[Any] = []

    def compute(self, tokens: Ints, lengths: Ints) -> Logits:
        self.busy.set()
        assert self.gate.wait(30)
        self.batches.append(lengths.tolist())
        texts = np.split(tokens, np.cumsum(lengths)[:-1])
        if any(text[0] == 666 for text in texts):
            raise RuntimeError("no such token")
        return np.array([[text[0], text.sum()] for text in texts], np.float32)

    def answer(self, waiting: Waiting, found: Any) -> None:
        assert waiting.request not in self.answers
        self.answers[waiting.request] = found if isinstance(found, Exception) else found.tolist()
        self.order.append(waiting.request)

    def batcher(self, tokens: int = 10, texts: int = 64, longest_queue: int = 8) -> Batcher:
        return Batcher(
            self.compute,
            self.answer,
            lambda waiting: waiting.request in self.gone,
            tokens=tokens,
            tokens_of_files=tokens // 2,
            texts=texts,
            longest_queue=longest_queue,
        )


def waiting(name: str, *texts: list[int], patient: bool = False) -> Waiting:
    return Waiting(name, np.concatenate(texts), np.array([len(text) for text in texts]), patient)


@pytest.fixture
def engine() -> Engine:
    return Engine()


def jammed(engine: Engine, batcher: Batcher) -> None:
    """Let the engine begin with one request, which it does not finish until the gate opens."""
    assert batcher.put(waiting("first", [1]))
    assert engine.busy.wait(30)


def test_texts_that_wait_share_a_batch_of_so_many_tokens(engine: Engine) -> None:
    batcher = engine.batcher(tokens=10)
    jammed(engine, batcher)
    for name, texts in {"a": [[2, 2]], "b": [[3] * 5, [4]], "c": [[5] * 4], "d": [[6] * 30], "e": [[7]]}.items():
        assert batcher.put(waiting(name, *texts))
    engine.gate.set()
    batcher.close()
    assert engine.batches == [[1], [2, 5, 1], [4], [30], [1]]
    assert engine.answers["b"] == [[3, 15], [4, 4]]
    assert engine.answers["d"] == [[6, 180]]
    assert engine.order == ["first", "a", "b", "c", "d", "e"]


def test_a_batch_holds_so_many_texts_at_most(engine: Engine) -> None:
    batcher = engine.batcher(tokens=100, texts=3)
    jammed(engine, batcher)
    batcher.put(waiting("a", *[[n] for n in range(4)]))
    batcher.put(waiting("b", [5], [6]))
    engine.gate.set()
    batcher.close()
    assert engine.batches == [[1], [1] * 3, [1] * 3]
    assert engine.answers["b"] == [[5, 5], [6, 6]]


def test_calls_go_first_even_between_the_texts_of_one_request(engine: Engine) -> None:
    batcher = engine.batcher(tokens=8)  # and half of that of files
    batcher.put(waiting("file", *[[n] * 2 for n in range(6)], patient=True))
    assert engine.busy.wait(30)  # with the first two texts
    assert batcher.put(waiting("other file", [8], patient=True))
    assert batcher.put(waiting("call", *[[9, 9]] * 3))
    engine.gate.set()
    batcher.close()
    assert engine.batches == [[2, 2], [2, 2, 2], [2, 2], [2, 2], [1]]
    assert engine.order == ["call", "file", "other file"]
    assert engine.answers["file"] == [[n, 2 * n] for n in range(6)]


def test_each_queue_takes_so_many_and_no_more(engine: Engine) -> None:
    batcher = engine.batcher(longest_queue=2)
    jammed(engine, batcher)
    assert [batcher.put(waiting(name, [1])) for name in "abc"] == [True, True, False]
    assert [batcher.put(waiting(name, [1], patient=True)) for name in "def"] == [True, True, False]
    engine.gate.set()
    batcher.close()
    assert sorted(engine.answers) == ["a", "b", "d", "e", "first"]


def test_what_nobody_waits_for_is_not_computed(engine: Engine) -> None:
    batcher = engine.batcher()
    jammed(engine, batcher)
    for name in "abc":
        batcher.put(waiting(name, [2, 2]))
    engine.gone |= {"a", "c"}
    engine.gate.set()
    batcher.close()
    assert engine.batches == [[1], [2]]
    assert isinstance(engine.answers["a"], TimeoutError)
    assert isinstance(engine.answers["c"], TimeoutError)


def test_a_batch_that_fails_fails_alone(engine: Engine) -> None:
    batcher = engine.batcher(tokens=4)
    engine.gate.set()
    batcher.put(waiting("bad", [666] * 3, [1, 1], [1, 1]))
    batcher.put(waiting("good", [2]))
    batcher.close()
    assert isinstance(engine.answers["bad"], RuntimeError)
    assert engine.answers["good"] == [[2, 2]]


def test_one_that_cannot_be_answered_ends_nothing(engine: Engine) -> None:
    def answer(waiting: Waiting, found: Any) -> None:
        if waiting.request == "closed":
            raise RuntimeError("the response has been sent")
        engine.answer(waiting, found)

    batcher = Batcher(engine.compute, answer, lambda _: False, tokens=10, tokens_of_files=5, texts=64, longest_queue=8)
    jammed(engine, batcher)
    batcher.put(waiting("closed", [1]))
    batcher.put(waiting("open", [1]))
    engine.gate.set()
    batcher.close()
    assert sorted(engine.answers) == ["first", "open"]


def test_it_waits_without_work_and_counts_the_wait(engine: Engine) -> None:
    batcher = engine.batcher()
    jammed(engine, batcher)
    late = waiting("late", [1])
    batcher.put(late)
    engine.gate.set()
    batcher.close()
    assert 0 < late.waited <= late.age


def test_a_small_call_is_computed_at_once_where_nothing_waits(engine: Engine) -> None:
    batcher = engine.batcher()
    engine.gate.set()
    found = batcher.at_once(waiting("call", [3, 4]))
    assert found is not None
    assert found.tolist() == [[3, 7]]
    assert batcher.at_once(waiting("file", [1], patient=True)) is None
    engine.gone.add("left")
    assert batcher.at_once(waiting("left", [1])) is None
    assert batcher.at_once(waiting("large", [1] * (AT_ONCE + 1))) is None
    engine.gate.clear()
    engine.busy.clear()
    jammed(engine, batcher)
    assert batcher.at_once(waiting("second", [1])) is None  # the engine is busy
    batcher.put(waiting("third", [1]))
    engine.gate.set()
    batcher.close()
    assert sorted(engine.answers) == ["first", "third"]
