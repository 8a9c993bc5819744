"""Embeddings: from the graph to files, through the real server."""

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet
import pytest
import torch
from tritonclient.grpc import InferenceServerClient, InferInput, InferRequestedOutput, service_pb2
from tritonclient.utils import InferenceServerException

from aisle.client import AsyncClassifier, Classifier, ClassifierError, Failure, InvalidText
from aisle.client.embedding import MODEL, embed_file
from aisle.client.protocol import Embedding
from aisle.preprocess.clean import prepare
from aisle.train.core.checkpoint import Checkpoint
from aisle.train.core.predict import pad
from tests.conftest import Server, aisle, total
from tests.fake import fake_server

TEXTS = ["红富士苹果 5斤装", "usb c cable 2m", "红富士苹果", "a" * 300]


def expected_of(checkpoint: Path, texts: list[str]) -> npt.NDArray[np.float32]:
    """Return the last hidden states of [CLS] in transformers, of length 1."""
    loaded = Checkpoint(checkpoint)
    input_ids, attention_mask = pad(loaded.tokenizer.tokens([prepare(text) for text in texts]))
    with torch.inference_mode():
        hidden = loaded.model.base_model(input_ids, attention_mask=attention_mask).last_hidden_state[:, 0].numpy()
    rows: npt.NDArray[np.float32] = hidden / np.linalg.norm(hidden, axis=1, keepdims=True)
    return rows


def test_embeddings_are_the_hidden_states_that_are_classified(
    server: Server, classifier: Classifier, checkpoint: Path
) -> None:
    found = classifier.embed([*TEXTS, TEXTS[0]])
    assert found.dtype == np.float32
    assert np.abs(found[:-1] - expected_of(checkpoint, TEXTS)).max() < 1e-3
    assert np.array_equal(found[0], found[-1])
    assert np.allclose(np.linalg.norm(found, axis=1), 1)

    async def ask() -> npt.NDArray[np.float32]:
        async with AsyncClassifier(server.url, timeout=60) as other:
            return await other.embed(TEXTS)

    assert np.allclose(asyncio.run(ask()), found[:-1], atol=1e-5)


def test_many_embeddings_keep_their_order(classifier: Classifier, checkpoint: Path) -> None:
    texts = [f"order {number}" for number in range(200)]
    assert np.abs(classifier.embed(texts) - expected_of(checkpoint, texts)).max() < 1e-3


def test_embeddings_can_be_shortened(server: Server, classifier: Classifier, tmp_path: Path) -> None:
    whole = classifier.embed(TEXTS)
    expected = whole[:, :16] / np.linalg.norm(whole[:, :16], axis=1, keepdims=True)
    assert np.allclose(classifier.embed(TEXTS, size=16), expected, atol=1e-3)
    (streamed,) = classifier.stream_embeddings(TEXTS[:1], size=16)
    assert isinstance(streamed, Embedding)
    assert np.allclose(streamed.values, expected[0], atol=1e-3)

    async def ask() -> npt.NDArray[np.float32]:
        async with AsyncClassifier(server.url, timeout=60) as other:
            return await other.embed(TEXTS, size=16)

    assert np.allclose(asyncio.run(ask()), expected, atol=1e-3)
    table = tmp_path / "table.jsonl"
    table.write_text(json.dumps({"text": TEXTS[0]}) + "\n", "utf-8")
    command = ["embed", table, "-o", tmp_path / "out.npy", "--size", "16", "--url", server.url, "--json"]
    assert json.loads(aisle(*command).stdout)["size"] == 16
    assert np.allclose(np.load(tmp_path / "out.npy")[0], expected[0], atol=1e-3)


def test_a_size_that_the_model_does_not_have_is_refused(classifier: Classifier) -> None:
    available = classifier.embed(TEXTS[:1]).shape[1]
    with pytest.raises(InvalidText, match=f"size must be at most {available}, .* got 9999"):
        classifier.embed(TEXTS, size=9999)
    with pytest.raises(InvalidText, match="size must be at most"):
        list(classifier.stream_embeddings(TEXTS, size=9999))
    for size in (0, 1.5, True):
        with pytest.raises(ValueError, match="positive whole number"):
            classifier.embed(TEXTS, size=size)  # type: ignore[arg-type]


def test_embedding_and_classifying_do_not_disturb_each_other(server: Server, classifier: Classifier) -> None:
    """Requests of both kinds share batches and the cache."""
    texts = [f"apart {number}" for number in range(40)]
    first = classifier.classify(texts), classifier.embed(texts)
    failed: list[Exception] = []

    def repeat() -> None:
        try:
            for _ in range(5):
                assert classifier.classify(texts) == first[0]
                assert np.allclose(classifier.embed(texts), first[1], atol=1e-3)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=repeat) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_embeddings_count_as_no_classification(server: Server, classifier: Classifier) -> None:
    server.figures()
    name = "aisle_confidence_count_total"
    before, texts = total(server.metrics, name), server.tokenized()
    classifier.embed(["counted neither as a category", "nor in the confidences"])
    server.figures()
    assert (total(server.metrics, name), server.tokenized()) == (before, texts + 2)


def test_bad_texts_are_named(classifier: Classifier) -> None:
    with pytest.raises(InvalidText, match=r"row 1: .*empty") as refused:
        classifier.embed(["good", " "])
    assert refused.value.row == 1
    found = [*classifier.stream_embeddings(["good", None, " ", "also good"])]
    assert [isinstance(each, Failure) for each in found] == [False, True, True, False]
    assert classifier.embed([]).shape == (0, 0)


def test_a_file_is_embedded(server: Server, classifier: Classifier, checkpoint: Path, tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    table.write_text('text,price\n红富士苹果,5\n"",6\nusb cable,7\n', "utf-8")
    done = aisle("embed", table, "-o", tmp_path / "out.parquet", "--url", server.url, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["rows"], result["errors"], result["version"]) == (3, 1, 1)
    found = pyarrow.parquet.read_table(tmp_path / "out.parquet")
    assert found.schema.metadata[MODEL].decode() == result["model"] == classifier.fingerprints()[1]
    assert found.column("row").to_pylist() == [0, 1, 2]
    assert found.column("embedding").to_pylist()[1] is None
    assert found.column("error").to_pylist()[0] is None
    assert "empty" in found.column("error").to_pylist()[1]
    expected = expected_of(checkpoint, ["红富士苹果", "usb cable"])
    assert np.abs(np.array([found.column("embedding").to_pylist()[row] for row in (0, 2)]) - expected).max() < 1e-3

    embed_file(classifier, table, tmp_path / "out.npy", "text")
    array = np.load(tmp_path / "out.npy", mmap_mode="r")
    assert np.isnan(array[1]).all()
    assert np.abs(array[[0, 2]] - expected).max() < 1e-3


def test_a_bad_row_spoils_no_other(classifier: Classifier, tmp_path: Path) -> None:
    """Not even one whose text Parquet cannot hold."""
    table = tmp_path / "table.jsonl"
    values = ['"good"', '"\\ud800"', "null", "[1]", json.dumps("a" * 40_000), '"also good"']
    table.write_text("".join(f'{{"text": {value}}}\n' for value in values), "utf-8")
    assert embed_file(classifier, table, tmp_path / "out.parquet", "text")["errors"] == 4
    found = pyarrow.parquet.read_table(tmp_path / "out.parquet")
    assert [each is None for each in found.column("error").to_pylist()] == [True, False, False, False, False, True]
    assert found.column("embedding").is_valid().to_pylist() == [True, False, False, False, False, True]


def test_embed_shows_how_similar_texts_are(server: Server) -> None:
    done = aisle("embed", "红富士苹果", "红富士苹果", "usb cable", "--url", server.url)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("1.000") >= 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["embed", __file__], "give the output with -o"),
        (["embed", "none.csv", "-o", "out.npy"], "no such file"),
        (["embed", __file__, "-o", "out.csv"], r"written as .parquet or .npy"),
        (["embed", "a", "b", "-o", "out.npy"], "one file at a time"),
        (["embed", " "], "empty"),
    ],
)
def test_bad_arguments_are_one_line(server: Server, arguments: list[str], message: str) -> None:
    done = aisle(*arguments, "--url", server.url)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert message in done.stderr


def test_a_request_to_the_ensemble_names_its_output(server: Server) -> None:
    text = InferInput("text", [1, 1], "BYTES")
    text.set_data_from_numpy(np.array([["红富士".encode()]], np.object_))
    with InferenceServerClient(server.url) as triton:
        answer = triton.infer("product_embeddings", [text], outputs=[InferRequestedOutput("embedding")])
        assert answer.as_numpy("embedding").shape[0] == 1
        with pytest.raises(InferenceServerException, match="unexpected inference output"):
            triton.infer("product_embeddings", [text], outputs=[InferRequestedOutput("category")])


class TwoVersions(Classifier):
    """Its answers come from version 3, then from version 4, as if 4 went live between two requests."""

    versions = iter("34")

    def _infer(self, raw: list[bytes], wanted: Any, bulk: bool) -> bytes:
        answer = service_pb2.ModelInferResponse(model_version=next(self.versions))
        answer.outputs.add(name="embedding", datatype="FP32", shape=[len(raw), 2])
        answer.raw_output_contents.append(np.ones((len(raw), 2), np.float32).tobytes())
        return bytes(answer.SerializeToString())


def test_versions_are_not_mixed() -> None:
    with (
        fake_server() as fake,
        TwoVersions(fake.url) as classifier,
        pytest.raises(ClassifierError, match="versions 3, 4 answered; their embeddings cannot be compared"),
    ):
        classifier.embed(["text"] * 65)
