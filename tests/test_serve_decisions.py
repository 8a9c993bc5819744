"""Decisions from the real server: the checkpoint's, only for those who ask, and none where none were fitted."""

from __future__ import annotations

import asyncio
import itertools
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tritonclient.grpc import InferenceServerClient, InferenceServerException, InferInput, InferRequestedOutput

from aisle.build.build import build
from aisle.client import AsyncClassifier, Classifier, ClassifierError, Failure, InvalidText, Prediction
from aisle.client.bulk import classify_file
from aisle.errors import InputError
from aisle.preprocess.clean import prepare
from aisle.preprocess.tables.table import read_rows
from aisle.preprocess.tables.writing import write_rows
from aisle.train.core.checkpoint import Checkpoint
from aisle.train.evaluation.evaluate import evaluate
from aisle.train.evaluation.predictors import CheckpointPredictor

from .conftest import Server, aisle, held_server
from .fake import fake_server

TEXTS = [
    *(
        "红富士苹果 5斤装",
        "数据线 耳机",
        "适用养生壶保温杯",
        "toothpaste sensitive",
        "芯棠 桌面 非耳机 重低音 低音炮 9W",
    ),
    *("新款 现货", "婴儿奶粉 " * 200),
]

ADDED = ["category", "confidence", "decision", "decided", "warning", "error"]


@pytest.fixture(scope="module")
def triton(server: Server) -> Iterator[InferenceServerClient]:
    with InferenceServerClient(server.url) as client:
        yield client


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> list[Prediction | Failure]:
    return CheckpointPredictor(Checkpoint(checkpoint)).top_k([prepare(text) for text in TEXTS], 1)


@pytest.fixture(scope="module")
def without(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose version has no decisions, as a checkpoint of Aisle 0.1 makes it."""
    folder = tmp_path_factory.mktemp("without")
    shutil.copytree(checkpoint, folder / "checkpoint")
    (folder / "checkpoint" / "decisions.json").unlink()
    build(folder / "checkpoint", folder / "repository", "openvino", "fp32")
    with held_server(folder / "repository", folder / "checkpoint", folder / "server") as each:
        yield each


def tensor(texts: list[str]) -> InferInput:
    made = InferInput("text", [len(texts), 1], "BYTES")
    made.set_data_from_numpy(np.array([[text.encode()] for text in texts], np.object_))
    return made


def assert_same(found: Prediction | Failure, wanted: Prediction | Failure) -> None:
    assert isinstance(found, Prediction)
    assert isinstance(wanted, Prediction)
    assert (found.category, found.decision, found.decided) == (wanted.category, wanted.decision, wanted.decided)
    assert found.prediction_set == wanted.prediction_set
    assert found.energy == pytest.approx(wanted.energy, abs=1e-3)


def test_served_decisions_are_the_checkpoints(
    classifier: Classifier, server: Server, expected: list[Prediction | Failure]
) -> None:
    assert classifier.has_decisions()
    assert {each.decision for each in expected if isinstance(each, Prediction)} >= {"accept", "review"}
    for found in (classifier.classify(TEXTS, decisions=True), list(classifier.stream(TEXTS, decisions=True))):
        for one, wanted in zip(found, expected, strict=True):
            assert_same(one, wanted)
    alone = [classifier.classify([text], 3, decisions=True)[0] for text in TEXTS]  # sets of one text are not padded
    for one, wanted in zip(alone, expected, strict=True):
        assert_same(one, wanted)
        assert len(one.categories) == 3

    async def ask() -> list[Prediction]:
        async with AsyncClassifier(server.url, timeout=60) as asyncio_client:
            assert await asyncio_client.has_decisions()
            streamed = [each async for each in asyncio_client.stream(TEXTS, decisions=True)]
            assert streamed == await asyncio_client.classify(TEXTS, decisions=True)
            return [each for each in streamed if isinstance(each, Prediction)]

    for one, wanted in zip(asyncio.run(ask()), expected, strict=True):
        assert_same(one, wanted)


def test_who_does_not_ask_gets_no_decisions(classifier: Classifier) -> None:
    (plain,) = classifier.classify(["红富士苹果 5斤装"])
    assert (plain.decision, plain.decided, plain.prediction_set, plain.energy) == (None, None, None, None)


def test_each_output_can_be_requested_alone(triton: InferenceServerClient) -> None:
    names = ("category", "confidence", "unknown", "decision", "decided", "prediction_set", "energy")
    for asked in (*((name,) for name in names), ("energy", "category"), names):
        outputs = [InferRequestedOutput(name) for name in asked]
        answer = triton.infer("product_decisions", [tensor(TEXTS[:3])], outputs=outputs)
        assert {output.name for output in answer.get_response().outputs} == set(asked)
        for name in asked:
            assert len(answer.as_numpy(name)) == 3


def test_a_request_to_the_encoder_without_named_outputs_gets_no_decisions(triton: InferenceServerClient) -> None:
    ids, lengths = InferInput("input_ids", [1, 3], "INT32"), InferInput("lengths", [1, 1], "INT32")
    ids.set_data_from_numpy(np.array([[2, 5, 3]], np.int32))
    lengths.set_data_from_numpy(np.array([[3]], np.int32))
    assert {o.name for o in triton.infer("encoder", [ids, lengths]).get_response().outputs} == {
        "category",
        "confidence",
    }
    named = [InferRequestedOutput("decision")]
    assert triton.infer("encoder", [ids, lengths], outputs=named).as_numpy("decision").shape == (1, 1)


def test_requests_with_and_without_decisions_share_batches(
    server: Server, classifier: Classifier, checkpoint: Path
) -> None:
    """Each gets its own answer, and the decisions are counted."""
    texts = [f"{TEXTS[number % len(TEXTS)]} {number}" for number in range(12 * len(TEXTS))]
    wanted = CheckpointPredictor(Checkpoint(checkpoint)).top_k(texts, 1)
    before = server.figures()

    def ask(number: int) -> Prediction:
        return classifier.classify([texts[number]], decisions=number % 2 == 0)[0]

    with ThreadPoolExecutor(32) as pool:
        with server.held():
            calls = [pool.submit(ask, number) for number in range(len(texts))]
            server.wait_for_requests("encoder", 16)
        for number, call in enumerate(calls):
            if number % 2 == 0:
                assert_same(call.result(), wanted[number])
            else:
                assert call.result().decision is None
    after = server.figures()
    counts = Counter(each.decision for each in wanted[::2] if isinstance(each, Prediction))
    for decision, count in counts.items():
        name = f'aisle_decisions_total{{decision="{decision}",version="1"}}'
        assert after[name] - before.get(name, 0) == count


def test_a_text_is_computed_once_with_and_once_without_decisions(classifier: Classifier, server: Server) -> None:
    """Each kind of answer has its own entry in the cache; one with decisions holds its whole prediction set."""
    before = server.figures()
    texts = ["决定 缓存 苹果", "决定 缓存 zq", "决定 缓存 苹果"]
    first = classifier.classify(texts, decisions=True)
    assert first[0] == first[2]
    assert classifier.classify(texts, decisions=True) == first
    (plain,) = classifier.classify(texts[:1])
    assert (plain.category, plain.decision) == (first[0].category, None)
    assert classifier.classify(texts[:1], decisions=True)[0] == first[0]
    wider = classifier.classify(texts, server.labels, decisions=True)  # more categories than in the entries
    assert [each.prediction_set for each in wider] == [each.prediction_set for each in first]
    after = server.figures()
    hits, lookups = (f'aisle_cache_{name}_total{{version="1"}}' for name in ("hits", "lookups"))
    assert after[lookups] - before[lookups] == 3 + 3 + 1 + 1 + 3
    assert after[hits] - before[hits] == 1 + 3 + 0 + 1 + 1


def test_without_a_cache_the_decisions_are_the_same(
    repository: Path, checkpoint: Path, tmp_path: Path, expected: list[Prediction | Failure]
) -> None:
    with held_server(repository, checkpoint, tmp_path, cache_mb=0) as server, Classifier(server.url) as classifier:
        for _ in range(2):
            found = classifier.classify([*TEXTS, *TEXTS], decisions=True)
            for one, wanted in zip(found, expected * 2, strict=True):
                assert_same(one, wanted)
        assert server.figures()['aisle_cache_lookups_total{version="1"}'] == 0


def test_a_bad_text_fails_as_without_decisions(classifier: Classifier) -> None:
    with pytest.raises(InvalidText, match="row 1: text is empty once cleaned"):
        classifier.classify(["好", " "], decisions=True)
    good, bad = classifier.stream(["好", " "], decisions=True)
    assert isinstance(good, Prediction)
    assert good.decision
    assert isinstance(bad, Failure)
    with pytest.raises(InvalidText, match="top_k must be one number"):
        classifier.classify(["好"], 0, decisions=True)


def test_the_server_is_measured_as_the_checkpoint(server: Server, checkpoint: Path, sample: Path) -> None:
    local = evaluate(sample, "text", "category", checkpoint=checkpoint, held_out=True)["decisions"]
    served = evaluate(sample, "text", "category", url=server.url, held_out=True)["decisions"]
    assert local
    assert served == local


def test_a_version_without_decisions_says_so(without: Server, sample: Path) -> None:
    complaint = (
        "^this version has no decisions; fit them with aisle decide CHECKPOINT, then build and deploy it again; a "
    )
    with Classifier(without.url, timeout=60) as classifier:
        assert not classifier.has_decisions()
        assert classifier.classify(["好"])[0].decision is None
        with pytest.raises(InvalidText, match=complaint):
            classifier.classify(["好"], decisions=True)
        with pytest.raises(InvalidText, match=complaint):  # and no Failure for each text
            list(classifier.stream(["好", "坏"] * 40, decisions=True))
    with InferenceServerClient(without.url) as triton:
        with pytest.raises(InferenceServerException) as caught:
            triton.infer("product_decisions", [tensor(["好"])])
        assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"
    assert evaluate(sample, "text", "category", url=without.url, held_out=True)["decisions"] is None


# ---- files


def a_file(folder: Path, rows: int = 40) -> Path:
    """Write a table that has columns with the names of the decisions."""
    texts = [TEXTS[i % len(TEXTS)] if i % 9 else " " for i in range(rows)]
    path = folder / "in.csv"
    write_rows(
        path,
        lambda: ({"text": text, "decision": "own", "decided": "own"} for text in texts),
        ["text", "decision", "decided"],
    )
    return path


def test_files_get_the_decisions(classifier: Classifier, server: Server, tmp_path: Path) -> None:
    source, out = a_file(tmp_path), tmp_path / "out.jsonl"
    done = aisle("classify", source, "-o", out, "--url", server.url, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["renamed"] == {"decision": "source_decision", "decided": "source_decided"}
    rows = list(read_rows(out))
    assert list(rows[1]) == ["text", "source_decision", "source_decided", *ADDED]
    answers = classifier.stream([row["text"] for row in rows], decisions=True)
    for row, found in zip(rows, answers, strict=True):
        assert (row["source_decision"], row["source_decided"]) == ("own", "own")
        if isinstance(found, Failure):
            assert (row["decision"], row["decided"], row["error"]) == (None, None, found.message)
        else:
            assert (row["decision"], row["decided"]) == (found.decision, found.decided or None)
    assert {row["decision"] for row in rows} >= {"accept", "review", None}

    assert aisle("classify", source, "-o", out, "--url", server.url, "--no-decisions").returncode == 0
    assert list(next(iter(read_rows(out)))) == [
        "text",
        "decision",
        "decided",
        "category",
        "confidence",
        "warning",
        "error",
    ]


@pytest.mark.parametrize("before", [False, True])
def test_a_resumed_file_keeps_its_columns(classifier: Classifier, tmp_path: Path, before: bool) -> None:
    """An earlier run, with or without decisions, goes on as it began; another choice is another job."""
    source, out = a_file(tmp_path, 400), tmp_path / "out.csv"

    def stop(answers: Iterable[Any], _: int) -> Iterator[Any]:
        yield from itertools.islice(answers, 100)
        raise InputError("stopped")

    with pytest.raises(InputError, match="stopped"):
        classify_file(classifier, source, out, "text", 1, stop, decisions=before)
    with pytest.raises(InputError, match="belongs to another job"):
        classify_file(classifier, source, out, "text", 1, decisions=not before)
    assert classify_file(classifier, source, out, "text", 1)["resumed_from"] == 100
    rows = list(read_rows(out))
    assert len(rows) == 400
    assert ("source_decision" in rows[0]) == before
    assert all((row["decision"] != "own") == before for row in rows)


def test_a_file_without_decisions_where_the_model_has_none(without: Server, tmp_path: Path) -> None:
    source, out = a_file(tmp_path), tmp_path / "out.csv"
    assert aisle("classify", source, "-o", out, "--url", without.url).returncode == 0
    assert "source_decision" not in next(iter(read_rows(out)))
    done = aisle("classify", source, "-o", tmp_path / "other.csv", "--url", without.url, "--decisions")
    assert done.returncode == 2
    assert "this version has no decisions; fit them with aisle decide" in done.stderr
    assert not (tmp_path / "other.csv.partial").exists()


def test_texts_show_their_decisions(server: Server, without: Server) -> None:
    done = aisle("classify", *TEXTS[:3], "--url", server.url, "--json")
    (first, *_) = json.loads(done.stdout)["predictions"]
    assert first.keys() >= {"decision", "decided", "prediction_set"}
    assert "decided" in aisle("classify", *TEXTS[:3], "--top-k", 2, "--url", server.url).stdout
    assert "decided" not in aisle("classify", *TEXTS[:3], "--url", without.url).stdout


def test_an_earlier_server_has_no_decisions() -> None:
    import grpc

    def behave(method: str, context: grpc.ServicerContext) -> None:
        if method == "ModelInfer":
            context.abort(grpc.StatusCode.NOT_FOUND, "Request for unknown model: 'product_decisions' is not found")

    with fake_server() as fake:
        fake.behave = behave
        with Classifier(fake.url) as classifier:
            assert not classifier.has_decisions()
            with pytest.raises(ClassifierError, match="is of an Aisle without decisions"):
                classifier.classify(["好"], decisions=True)
