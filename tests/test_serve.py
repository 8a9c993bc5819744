"""Requests to the real server."""

from __future__ import annotations

import json
import random
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient.grpc import InferenceServerClient, InferenceServerException, InferInput, InferRequestedOutput

from aisle.build.engine import EngineSpec
from aisle.client import Classifier, ClassifierError, InvalidText
from aisle.preprocess.clean import MAX_BYTES, prepare
from aisle.train.core.checkpoint import Checkpoint
from aisle.train.core.predict import logits_of
from aisle.train.evaluation.evaluate import evaluate

from .conftest import Server

TEXTS = [
    "红富士苹果 5斤装",
    "<b>手机壳</b> 磨砂防摔 适用苹果手机",
    "ＷＩＲＥＬＥＳＳ earbuds &amp; case!!!",
    "洗发水\u200b 控油去屑 500ml",
    "婴儿奶粉 " * 200,  # truncated at the limit
    "𠮷野家 emoji 🎧",
]


@pytest.fixture(scope="module")
def triton(server: Server) -> Iterator[InferenceServerClient]:
    with InferenceServerClient(server.url) as client:
        yield client


def tensor(name: str, values: Any, datatype: str) -> InferInput:
    array = np.array(values, {"BYTES": np.object_, "INT32": np.int32, "FP32": np.float32}[datatype])
    made = InferInput(name, list(array.shape), datatype)
    made.set_data_from_numpy(array)
    return made


def statistics(triton: InferenceServerClient, model: str) -> Any:
    return triton.get_inference_statistics(model).model_stats[0]


def test_training_and_serving_see_the_same_tokens(triton: InferenceServerClient, checkpoint: Path) -> None:
    result = triton.infer("tokenizer", [tensor("text", [[t.encode()] for t in TEXTS], "BYTES")])
    input_ids, lengths = result.as_numpy("input_ids"), result.as_numpy("lengths")[:, 0]
    expected = Checkpoint(checkpoint).tokenizer.tokens([prepare(text) for text in TEXTS])
    assert [row[:n].tolist() for row, n in zip(input_ids, lengths, strict=True)] == expected
    assert max(map(len, expected)) == 128


def test_served_probabilities_are_pytorchs(classifier: Classifier, server: Server, checkpoint: Path) -> None:
    tokens = Checkpoint(checkpoint).tokenizer.tokens([prepare(text) for text in TEXTS])
    logits = logits_of(Checkpoint(checkpoint).model, tokens, "expected").astype(float)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = Checkpoint(checkpoint).labels
    for answer, row in zip(classifier.classify(TEXTS, top_k=server.labels), probabilities, strict=True):
        assert sum(answer.confidences) == pytest.approx(1, abs=1e-5)
        assert list(answer.confidences) == sorted(answer.confidences, reverse=True)
        for category, confidence in zip(answer.categories, answer.confidences, strict=True):
            assert confidence == pytest.approx(row[labels.index(category)], abs=1e-4)


def test_served_accuracy_is_pytorchs(server: Server, checkpoint: Path, sample: Path) -> None:
    local = evaluate(sample, "text", "category", checkpoint=checkpoint, held_out=True)
    served = evaluate(sample, "text", "category", url=server.url, held_out=True)
    for key in ("accuracy", "macro_f1", "per_class", "rows"):
        assert served[key] == local[key]


def test_the_cache_uses_cleaned_texts_and_any_top_k(classifier: Classifier, server: Server) -> None:
    before = server.figures()
    texts = ["缓存 测试", "缓存  测试", " 缓存&nbsp;测试", "缓存 测试"]
    answers = [classifier.classify([text], top_k=k)[0] for text, k in zip(texts, (3, 5, 1, 3), strict=True)]
    assert [len(answer.categories) for answer in answers] == [3, 5, 1, 3]
    assert answers[0] == answers[3]
    assert answers[0].categories == answers[1].categories[:3]
    after = server.figures()
    hits, lookups = (f'aisle_cache_{name}_total{{version="1"}}' for name in ("hits", "lookups"))
    assert after[lookups] - before[lookups] == 4
    assert after[hits] - before[hits] == 2  # five are more than the three in the cache


def test_requesting_one_output_does_not_affect_others(classifier: Classifier, triton: InferenceServerClient) -> None:
    text = tensor("text", [["只要类别".encode()]], "BYTES")
    alone = triton.infer("product_classifier", [text], outputs=[InferRequestedOutput("category")])
    assert alone.as_numpy("confidence") is None
    answer = classifier.classify(["只要类别"])[0]
    assert answer.category == alone.as_numpy("category")[0, 0].decode()
    assert 0 < answer.confidence <= 1


def test_the_share_of_unknown_tokens_is_returned(
    classifier: Classifier, triton: InferenceServerClient, server: Server
) -> None:
    """Also for cached answers, and if only some outputs are requested."""
    before = server.figures()
    texts = ["红富士苹果", "𠮷𠮷𠮷", "红富士苹果", "𠮷𠮷𠮷"]
    shares = [classifier.classify([text])[0].unknown for text in texts]
    assert shares == [0, 1, 0, 1]
    assert [answer.unknown for answer in classifier.classify(texts)] == shares
    after, name = server.figures(), 'aisle_texts_unknown_total{version="1"}'
    assert after[name] - before[name] == 4
    text = tensor("text", [["只要 𠮷𠮷".encode()]], "BYTES")
    for asked in (["category"], ["unknown"], ["category", "confidence"], ["unknown", "confidence"]):
        result = triton.infer("product_classifier", [text], outputs=[InferRequestedOutput(name) for name in asked])
        assert {output.name for output in result.get_response().outputs} == set(asked)


BAD_TEXTS: list[tuple[str | bytes, str]] = [
    (b"", "empty once cleaned; send"),
    (b" <br> \n", "empty once cleaned"),
    (b"\xff\xfe\xfd", "not valid UTF-8; encode it"),
    ("长" * (MAX_BYTES // 3 + 1), f"over the limit of {MAX_BYTES}; shorten it"),
]


@pytest.mark.parametrize(("text", "complaint"), BAD_TEXTS)
def test_a_bad_text_is_an_invalid_argument(classifier: Classifier, text: str | bytes, complaint: str) -> None:
    with pytest.raises(InvalidText, match=complaint):
        classifier.classify([text])
    with pytest.raises(InvalidText, match=f"row 1: .*{complaint}"):
        classifier.classify(["好", text, "坏"])


def test_a_bad_request_does_not_fail_others_in_its_batch(
    server: Server, classifier: Classifier, triton: InferenceServerClient
) -> None:
    """Good and bad requests arrive together and share executions; each gets its own answer."""
    good = [f"苹果 {i}斤装" for i in range(60)]
    expected = {text: classifier.classify([text, "另一件"], top_k=2)[0] for text in good}
    before = statistics(triton, "tokenizer")

    def ask(number: int) -> None:
        if number % 4 == 0:
            with pytest.raises(InvalidText):
                classifier.classify([BAD_TEXTS[number // 4 % 4][0]])
        else:
            answer = classifier.classify([good[number % 60]], top_k=2)[0]
            assert answer.categories == expected[good[number % 60]].categories

    with ThreadPoolExecutor(32) as pool:
        with server.held("tokenizer"):
            calls = [pool.submit(ask, number) for number in range(400)]
            server.wait_for_requests("tokenizer", 24)
        for call in calls:
            call.result()
    after = statistics(triton, "tokenizer")
    assert after.execution_count - before.execution_count < after.inference_count - before.inference_count


@pytest.mark.parametrize("top_k", [0, -1, 10_000])
def test_top_k_out_of_range(classifier: Classifier, server: Server, top_k: int) -> None:
    with pytest.raises(InvalidText, match=f"from 1 to {server.labels} in every row; got \\[{top_k}\\]"):
        classifier.classify(["好"], top_k=top_k)


TEXT = tensor("text", [["好".encode()]] * 2, "BYTES")


@pytest.mark.parametrize(
    ("inputs", "complaint"),
    [
        ([tensor("text", [b"a", b"b"], "BYTES")], "shape"),
        ([tensor("text", [[b"a", b"b"]], "BYTES")], "shape"),
        ([tensor("text", [[1], [2]], "INT32")], "data-type"),
        ([tensor("text", [[b"a"]] * 65, "BYTES")], "batch-size must be <= 64"),
        ([TEXT, tensor("top_k", [[1]], "INT32")], "batch size"),
        ([TEXT, tensor("top_k", [[1], [2]], "INT32")], r"got \[1, 2\]"),
        ([TEXT, tensor("top_k", [[1.0], [1.0]], "FP32")], "data-type"),
        ([TEXT, tensor("extra", [[1], [1]], "INT32")], "extra"),
        ([tensor("top_k", [[1]], "INT32")], "at least one output is not set"),  # Triton's own words for a missing text
    ],
)
def test_wrong_shapes_and_types(triton: InferenceServerClient, inputs: list[InferInput], complaint: str) -> None:
    with pytest.raises(InferenceServerException, match=complaint) as caught:
        triton.infer("product_classifier", inputs)
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"


def test_unknown_model_version(server: Server) -> None:
    with Classifier(server.url, model_version="99") as classifier, pytest.raises(ClassifierError, match="99"):
        classifier.classify(["好"])


def test_texts_of_different_lengths_share_a_batch(
    classifier: Classifier, triton: InferenceServerClient, server: Server
) -> None:
    """They share a batch of the engine. Triton passes requests on as they arrive."""
    before, statistics_before = server.figures(), statistics(triton, "encoder")
    with ThreadPoolExecutor(64) as pool:
        with server.held():
            calls = [pool.submit(classifier.classify, [f"第{i}件 " + "长" * i]) for i in range(64)]
            server.wait_for_requests("encoder", 48)  # Triton holds them while the engine has the first ones
        assert all(call.result() for call in calls)
    after = statistics(triton, "encoder")
    assert after.inference_count - statistics_before.inference_count == 64
    assert after.execution_count - statistics_before.execution_count < 64
    name = 'aisle_engine_batches_total{version="1"}'
    assert 0 < server.figures()[name] - before[name] < 32


def test_health_and_metrics(server: Server) -> None:
    with grpc.insecure_channel(server.url) as channel:  # the health check of Kubernetes and Envoy
        assert channel.unary_unary("/grpc.health.v1.Health/Check")(b"") == b"\x08\x01"  # status: SERVING
    metrics = urllib.request.urlopen(f"http://{server.metrics}/metrics").read().decode()
    for name in ("nv_inference_count", "nv_inference_exec_count"):
        assert f'{name}{{model="product_classifier"' in metrics
    assert 'aisle_cache_hits_total{version="1"}' in metrics


def test_batches_have_little_padding_under_load(server: Server, rng: random.Random) -> None:
    """With requests of a few texts, of all lengths, the engine computes little padding."""
    texts = [f"{i} " + "婴儿奶粉" * int(rng.lognormvariate(3, 0.8)) for i in range(800)]
    before = server.figures()
    with Classifier(server.url, timeout=120) as classifier, ThreadPoolExecutor(50) as pool:
        with server.held():
            tokenized = server.tokenized()
            calls = [pool.submit(classifier.classify, texts[i : i + 16]) for i in range(0, len(texts), 16)]
            server.wait_for_texts(tokenized + len(texts))
        assert all(call.result() for call in calls)
    after = server.figures()

    def grown(counter: str) -> float:
        name = f'aisle_{counter}_total{{version="1"}}'
        return after[name] - before[name]

    assert grown("tokens_useful") / grown("tokens_computed") > 0.95
    assert grown("texts") == 800
    assert grown("engine_batches") < 80


def test_metrics_count_texts_tokens_and_answers(
    server: Server, classifier: Classifier, checkpoint: Path, repository: Path
) -> None:
    texts = [f"计数 {i}号 苹果" for i in range(20)] + ["婴儿奶粉 计数 " * 200, "计数 电话 13812345678"]
    before = server.figures()
    answers = classifier.classify(texts)
    for bad, _ in BAD_TEXTS:
        with pytest.raises(InvalidText):
            classifier.classify(["计数", bad])
    after = server.figures()

    def grown(name: str, **labels: str) -> float:
        inside = ",".join(f'{key}="{value}"' for key, value in sorted({**labels, "version": "1"}.items()))
        series = f"{name}{{{inside}}}"
        return after[series] - before.get(series, 0)

    assert grown("aisle_texts_total") == 22
    assert grown("aisle_texts_truncated_total") == 1
    assert grown("aisle_personal_data_total", kind="phone") == 1
    reasons = {
        reason: grown("aisle_texts_rejected_total", reason=reason) for reason in ("empty", "not UTF-8", "over-long")
    }
    assert reasons == {"empty": 2, "not UTF-8": 1, "over-long": 1}
    tokens = Checkpoint(checkpoint).tokenizer.tokens([prepare(text) for text in texts])
    assert grown("aisle_tokens_useful_total") == sum(map(len, tokens)) <= grown("aisle_tokens_computed_total")
    assert grown("aisle_engine_seconds_total") > 0
    assert 1 <= grown("aisle_engine_batches_total") < 22
    for category, count in Counter(answer.category for answer in answers).items():
        assert grown("aisle_categories_total", category=category) == count
    assert grown("aisle_confidence_count") == 22
    assert grown("aisle_confidence_sum") == pytest.approx(sum(answer.confidence for answer in answers), abs=1e-3)
    for le in ("0.5", "0.9", "+Inf"):
        expected = sum(answer.confidence <= float(le) for answer in answers)
        assert grown("aisle_confidence_bucket", le=le) == expected
    spec = EngineSpec.load(repository / "encoder" / "1")
    info = f'checkpoint="{spec.checkpoint}",gate="passed",precision="fp32",target="openvino",version="1"'
    assert after[f"aisle_model_info{{{info}}}"] == 1


def test_the_contract(triton: InferenceServerClient) -> None:
    metadata = triton.get_model_metadata("product_classifier", as_json=True)
    assert json.loads(json.dumps(metadata))["inputs"] == [
        {"name": "text", "datatype": "BYTES", "shape": ["-1", "1"]},
        {"name": "top_k", "datatype": "INT32", "shape": ["-1", "1"]},
    ]
    assert [(o["name"], o["datatype"]) for o in metadata["outputs"]] == [
        ("category", "BYTES"),
        ("confidence", "FP32"),
        ("unknown", "FP32"),
    ]
