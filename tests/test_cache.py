"""The encoder's answer cache: what it stores, what it never stores, and that answers are the same with it."""

from __future__ import annotations

import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tritonclient.grpc import InferenceServerClient, InferInput

from aisle.client import Classifier, Overloaded, Prediction
from aisle.deploy.serving.cache import PAIR, AnswerCache, keys_of, read_rows, rows_of
from aisle.preprocess.clean import prepare
from aisle.preprocess.encode import TextTokenizer

from .conftest import Server, long_text, wait_for


def pairs(indices: list[list[int]]) -> npt.NDArray[Any]:
    made: npt.NDArray[Any] = np.zeros(np.shape(indices), PAIR)
    made["index"], made["confidence"] = indices, 0.5
    return made


def test_the_key_of_a_text_is_its_token_ids() -> None:
    tokens, lengths = np.array([1, 2, 3, 1, 2], np.int32), np.array([2, 1, 2], np.int32)
    first, second, third = keys_of(tokens, lengths)
    assert first == third != second
    assert np.frombuffer(second, np.int32).tolist() == [3]


def test_an_entry_answers_up_to_its_largest_k() -> None:
    cache = AnswerCache(1 << 20)
    cache.put(rows_of([b"a", b"b"], pairs([[4, 2], [7, 1]])))
    assert cache.find([b"a", b"b", b"c"], 3) == {}
    found = cache.find([b"b", b"a", b"c"], 1)
    assert read_rows([b"b", b"a", b"b"], found, 1)["index"].tolist() == [[7], [4], [7]]
    cache.put(rows_of([b"a"], pairs([[4, 2, 9]])))
    cache.put(rows_of([b"a"], pairs([[4]])))  # a smaller k does not shrink the entry
    assert read_rows([b"a"], cache.find([b"a"], 3), 3)["index"].tolist() == [[4, 2, 9]]


def test_memory_is_bounded_and_the_oldest_go_first() -> None:
    cache = AnswerCache(1 << 20)
    keys = [number.to_bytes(40, "big") for number in range(20_000)]
    evicted = 0
    for key in keys:
        evicted += cache.put(rows_of([key], pairs([[1]])))
        assert cache.size <= 1 << 20
        cache.find(keys[:1], 1)  # used all the time
    assert len(cache) == len(keys) - evicted > 1000
    assert cache.size >= len(cache) * (sys.getsizeof(keys[0]) + sys.getsizeof(bytes(PAIR.itemsize)))
    known = cache.find(keys, 1)
    assert set(known) == {keys[0], *keys[-len(cache) + 1 :]}


def test_a_cache_without_a_budget_is_off() -> None:
    assert not AnswerCache(0)
    assert AnswerCache(1)


def grown(after: dict[str, float], before: dict[str, float], name: str, **labels: str) -> float:
    inside = ",".join(f'{key}="{value}"' for key, value in sorted({**labels, "version": "1"}.items()))
    return after[f"{name}{{{inside}}}"] - before.get(f"{name}{{{inside}}}", 0)


def test_only_missing_texts_are_computed_and_all_are_counted(
    server: Server, classifier: Classifier, checkpoint: Path
) -> None:
    """Between calls, within a call and in a file."""
    known, new, file = "缓存记得 苹果", "缓存不记得 手机壳", [f"文件 缓存 {i % 5}" for i in range(200)]
    before = server.figures()
    first = classifier.classify([known], top_k=2)
    again = classifier.classify([new, known, new], top_k=2)
    answers = list(classifier.stream(file))
    after = server.figures()
    assert again[1] == first[0]
    assert again[0] == again[2] != again[1]
    assert [answer.category for answer in answers if isinstance(answer, Prediction)] == [
        classifier.classify([text])[0].category for text in file[:5]
    ] * 40
    tokens = TextTokenizer(checkpoint / "tokenizer.json").tokens([prepare(text) for text in (known, new, *file[:5])])
    single = sum(map(len, tokens))
    repeats = sum(map(len, tokens[2:])) * 3  # concurrent requests of 64 texts each compute their own texts
    assert single <= grown(after, before, "aisle_tokens_useful_total") <= single + repeats
    lookups, hits = (grown(after, before, f"aisle_cache_{name}_total") for name in ("lookups", "hits"))
    assert hits >= lookups - 7 - 15
    total = 4 + len(file)
    assert grown(after, before, "aisle_confidence_count") == grown(after, before, "aisle_texts_total") == total
    counts = Counter(answer.category for answer in (*first, *again, *answers) if isinstance(answer, Prediction))
    for category, count in counts.items():
        assert grown(after, before, "aisle_categories_total", category=category) == count


def test_logits_are_right_for_repeated_and_for_cached_texts(server: Server, checkpoint: Path) -> None:
    ids = TextTokenizer(checkpoint / "tokenizer.json")(["缓存 红富士苹果", "缓存 usb c cable", "缓存 红富士苹果"])
    tensors = []
    for name, kind, value in (
        ("input_ids", "INT32", ids.input_ids),
        ("lengths", "INT32", ids.lengths),
        ("return_logits", "BOOL", np.ones((3, 1), bool)),
    ):
        tensors.append(InferInput(name, list(value.shape), kind))
        tensors[-1].set_data_from_numpy(value)
    with InferenceServerClient(server.url) as triton:
        for _ in range(2):
            plain, asked = triton.infer("encoder", tensors[:2]), triton.infer("encoder", tensors)
            logits = asked.as_numpy("logits")
            assert logits.shape == (3, server.labels)
            assert np.array_equal(logits[0], logits[2])
            assert not np.allclose(logits[0], logits[1])
            assert asked.as_numpy("category").tolist() == plain.as_numpy("category").tolist()
            highest = np.exp(logits - logits.max(axis=1, keepdims=True)).sum(axis=1)
            assert np.allclose(plain.as_numpy("confidence")[:, 0], 1 / highest, atol=1e-5)


def test_a_refused_text_is_answered_later(short: Server) -> None:
    """A refusal is not cached, and cached texts are answered although the queue is full."""
    batches = [[long_text(2100 + 64 * call + row) for row in range(64)] for call in range(12)]
    with Classifier(short.url, timeout=120) as classifier, ThreadPoolExecutor(12) as pool:
        known = classifier.classify(["好"])

        def ask(batch: list[str]) -> bool:
            try:
                return len(classifier.classify(batch)) == len(batch)
            except Overloaded:
                return False

        with short.held():
            calls = [pool.submit(ask, batch) for batch in batches]
            wait_for(lambda: sum(call.done() for call in calls) >= 6)
            for _ in range(20):
                assert classifier.classify(["好"]) == known
        refused = [batch for batch, call in zip(batches, calls, strict=True) if not call.result()]
        assert refused
        for _ in range(2):
            for batch in refused[:3]:
                assert all(answer.category and 0 < answer.confidence <= 1 for answer in classifier.classify(batch))
