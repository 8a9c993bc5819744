"""The encoder's queues: bounded, interactive before bulk, batches by tokens."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from aisle.deploy.serving.batcher import INLINE_TOKENS, Answer, Batcher, Ints, Logits, QueuedRequest, is_bulk


class Engine:
    """Answers each text with its first token and the sum of its tokens; it computes only while the gate is open."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.busy = threading.Event()
        self.batches: list[list[int]] = []  # lengths
        self.answers: dict[Any, Any] = {}
        self.abandoned: set[Any] = set()
        self.order: list[Any] = []

    def compute(self, tokens: Ints, lengths: Ints) -> Logits:
        self.busy.set()
        assert self.gate.wait(30)
        self.batches.append(lengths.tolist())
        texts = np.split(tokens, np.cumsum(lengths)[:-1])
        if any(text[0] == 666 for text in texts):
            raise RuntimeError("no such token")
        return np.array([[text[0], text.sum()] for text in texts], np.float32)

    def answer(self, answers: Sequence[Answer]) -> None:
        for waiting, found in answers:
            assert waiting.request not in self.answers
            self.answers[waiting.request] = found if isinstance(found, Exception) else found.tolist()
            self.order.append(waiting.request)

    def batcher(
        self, tokens: int = 10, texts: int = 64, max_queue_size: int = 8, inline_seconds: float = 0.0, **more: int
    ) -> Batcher:
        return Batcher(
            self.compute,
            self.answer,
            lambda waiting: waiting.request in self.abandoned,
            tokens=tokens,
            bulk_tokens=tokens // 2,
            texts=texts,
            max_queue_size=max_queue_size,
            inline_seconds=inline_seconds,
            **more,
        )


def waiting(name: str, *texts: list[int], bulk: bool = False) -> QueuedRequest:
    return QueuedRequest(name, np.concatenate(texts), np.array([len(text) for text in texts]), bulk)


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [('{"bulk":true}', True), ("", False), ("{}", False), ('{"bulk":false}', False), ('{"caller":"bulk"}', False)],
)
def test_only_the_parameter_makes_a_request_bulk(parameters: str, expected: bool) -> None:
    assert is_bulk(parameters) is expected


def jammed(engine: Engine, batcher: Batcher) -> None:
    """Start the engine on one request, which it completes when the gate opens."""
    assert batcher.put(waiting("first", [1]))
    assert engine.busy.wait(30)


def test_waiting_texts_share_a_batch_up_to_the_token_limit(engine: Engine) -> None:
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


def test_a_batch_is_limited_by_texts(engine: Engine) -> None:
    batcher = engine.batcher(tokens=100, texts=3)
    jammed(engine, batcher)
    batcher.put(waiting("a", *[[n] for n in range(4)]))
    batcher.put(waiting("b", [5], [6]))
    engine.gate.set()
    batcher.close()
    assert engine.batches == [[1], [1] * 3, [1] * 3]
    assert engine.answers["b"] == [[5, 5], [6, 6]]


def test_interactive_requests_go_first_even_between_the_texts_of_one_request(engine: Engine) -> None:
    batcher = engine.batcher(tokens=8)  # and half of that for bulk batches
    batcher.put(waiting("file", *[[n] * 2 for n in range(6)], bulk=True))
    assert engine.busy.wait(30)  # with the first two texts
    assert batcher.put(waiting("other file", [8], bulk=True))
    assert batcher.put(waiting("call", *[[9, 9]] * 3))
    engine.gate.set()
    batcher.close()
    assert engine.batches == [[2, 2], [2, 2, 2], [2, 2], [2, 2], [1]]
    assert engine.order == ["call", "file", "other file"]
    assert engine.answers["file"] == [[n, 2 * n] for n in range(6)]


def test_each_queue_is_bounded(engine: Engine) -> None:
    batcher = engine.batcher(max_queue_size=2)
    jammed(engine, batcher)
    assert [batcher.put(waiting(name, [1])) for name in "abc"] == [True, True, False]
    assert [batcher.put(waiting(name, [1], bulk=True)) for name in "def"] == [True, True, False]
    engine.gate.set()
    batcher.close()
    assert sorted(engine.answers) == ["a", "b", "d", "e", "first"]


def test_abandoned_requests_are_not_computed(engine: Engine) -> None:
    batcher = engine.batcher()
    jammed(engine, batcher)
    for name in "abc":
        batcher.put(waiting(name, [2, 2]))
    engine.abandoned |= {"a", "c"}
    engine.gate.set()
    batcher.close()
    assert engine.batches == [[1], [2]]
    assert isinstance(engine.answers["a"], TimeoutError)
    assert isinstance(engine.answers["c"], TimeoutError)


def test_a_failed_batch_fails_only_its_own_requests(engine: Engine) -> None:
    batcher = engine.batcher(tokens=4)
    engine.gate.set()
    batcher.put(waiting("bad", [666] * 3, [1, 1], [1, 1]))
    batcher.put(waiting("good", [2]))
    batcher.close()
    assert isinstance(engine.answers["bad"], RuntimeError)
    assert engine.answers["good"] == [[2, 2]]


def test_an_answer_that_cannot_be_sent_ends_no_thread(engine: Engine) -> None:
    def answer(answers: Sequence[Answer]) -> None:
        if any(waiting.request == "closed" for waiting, _ in answers):
            raise RuntimeError("the response has been sent")
        engine.answer(answers)

    batcher = Batcher(engine.compute, answer, lambda _: False, tokens=1, bulk_tokens=1, texts=64, max_queue_size=8)
    jammed(engine, batcher)
    batcher.put(waiting("closed", [1]))
    batcher.put(waiting("open", [1]))
    engine.gate.set()
    batcher.close()
    assert sorted(engine.answers) == ["first", "open"]


def test_queue_time_is_measured(engine: Engine) -> None:
    batcher = engine.batcher()
    jammed(engine, batcher)
    late = waiting("late", [1])
    batcher.put(late)
    engine.gate.set()
    batcher.close()
    assert 0 < late.queue_time <= late.age


def test_small_requests_run_inline_if_none_waits(engine: Engine) -> None:
    batcher = engine.batcher(tokens=1000)
    engine.gate.set()
    found = batcher.try_run_inline([waiting("call", [3, 4]), waiting("another", [5], [6])])
    assert found is not None
    assert found.tolist() == [[3, 7], [5, 5], [6, 6]]
    assert batcher.try_run_inline([]) is None
    assert batcher.try_run_inline([waiting("call", [1]), waiting("file", [1], bulk=True)]) is None
    engine.abandoned.add("left")
    assert batcher.try_run_inline([waiting("call", [1]), waiting("left", [1])]) is None
    assert batcher.try_run_inline([waiting("large", [1] * INLINE_TOKENS), waiting("one more", [1])]) is None
    engine.gate.clear()
    engine.busy.clear()
    jammed(engine, batcher)
    assert batcher.try_run_inline([waiting("second", [1])]) is None  # the engine is busy
    batcher.put(waiting("third", [1]))
    engine.gate.set()
    batcher.close()
    assert sorted(engine.answers) == ["first", "third"]


def test_requests_that_a_fast_engine_computes_soon_run_inline(engine: Engine) -> None:
    batcher = engine.batcher(tokens=1000, texts=2, inline_seconds=60.0)
    engine.gate.set()
    large = waiting("file", [1] * (INLINE_TOKENS + 1), bulk=True)
    assert batcher.try_run_inline([large]) is None  # its speed is not known yet
    assert batcher.try_run_inline([waiting("call", [1])]) is not None
    assert batcher.try_run_inline([large]) is not None
    assert batcher.try_run_inline([waiting("call", [1], [1]), waiting("call", [1])]) is None  # more than a batch
    assert batcher.try_run_inline([waiting("call", [1] * 1001)]) is None
    batcher.close()


def test_the_engines_time_is_known_for_each_size_of_a_batch(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU needs about as long for one text as for twenty. Seconds per token would say that twenty take too long."""
    now = 0.0

    def compute(tokens: Ints, lengths: Ints) -> Logits:
        nonlocal now
        now += 0.002 if len(tokens) < 1000 else 0.004
        return np.zeros((len(lengths), 2), np.float32)

    engine.compute = compute  # type: ignore[method-assign]
    batcher = engine.batcher(tokens=5000, inline_seconds=0.003)
    monkeypatch.setattr("aisle.deploy.serving.batcher.time.perf_counter", lambda: now)
    assert batcher.try_run_inline([waiting("call", [1] * 40)]) is not None
    for name, tokens in (("more", 60), ("twice as many", 120)):  # at most in proportion to the tokens
        assert batcher.try_run_inline([waiting(name, [1] * tokens)]) is not None
    assert batcher.try_run_inline([waiting("unknown", [1] * 900)]) is None
    batcher._run(np.ones(900, int), np.array([900]))
    assert batcher.try_run_inline([waiting("known", [1] * 900)]) is not None
    assert batcher.try_run_inline([waiting("five", [1] * 180) for _ in range(5)]) is not None
    batcher._run(np.ones(4000, int), np.array([4000]))
    assert batcher.try_run_inline([waiting("too slow", [1] * 4000)]) is None
    batcher.close()


def test_files_wait_for_a_larger_batch_where_batches_overlap(engine: Engine) -> None:
    batcher = engine.batcher(tokens=1000, inline_seconds=60.0, concurrency=2)
    engine.gate.set()
    assert batcher.try_run_inline([waiting("call", [1])]) is not None
    assert batcher.try_run_inline([waiting("file", [1], bulk=True)]) is None
    batcher.close()


def test_two_batches_run_concurrently(engine: Engine) -> None:
    """The pieces of a split request end in any order; its answer keeps the order of its texts."""
    both = threading.Barrier(2, timeout=30)
    first, second = threading.Event(), threading.Event()

    def compute(tokens: Ints, lengths: Ints) -> Logits:
        both.wait()  # passes only if two batches are computed concurrently
        if tokens[0] == 1:
            assert second.wait(30)  # the later piece ends first
            first.set()
        texts = np.split(tokens, np.cumsum(lengths)[:-1])
        result = np.array([[text[0], text.sum()] for text in texts], np.float32)
        if tokens[0] != 1:
            second.set()
        return result

    engine.compute = compute  # type: ignore[method-assign]
    batcher = engine.batcher(tokens=4, concurrency=2)
    assert batcher.put(waiting("divided", [1, 1], [2, 2], [3, 3], [4, 4]))
    assert first.wait(30)
    batcher.close()
    assert engine.answers == {"divided": [[1, 2], [2, 4], [3, 6], [4, 8]]}


def test_a_request_whose_pieces_both_fail_is_answered_once(engine: Engine) -> None:
    both = threading.Barrier(2, timeout=30)

    def compute(tokens: Ints, lengths: Ints) -> Logits:
        both.wait()
        raise RuntimeError("no such token")

    engine.compute = compute  # type: ignore[method-assign]
    batcher = engine.batcher(tokens=2, concurrency=2)
    assert batcher.put(waiting("divided", [1, 1], [2, 2]))
    batcher.close()
    assert [str(error) for error in engine.answers.values()] == ["no such token"]
