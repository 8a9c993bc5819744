"""The encoder's answers: ranking, labels, sending; and logits on request."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from tritonclient.grpc import InferenceServerClient, InferInput, InferRequestedOutput

from aisle.build.engine import load_engine
from aisle.deploy.serving.answers import Labels, rank
from aisle.deploy.serving.senders import Senders
from aisle.errors import InputError
from aisle.train.core.checkpoint import Checkpoint

from .conftest import Server


@pytest.mark.parametrize("k", [1, 2, 5])
def test_categories_are_ranked_and_ties_keep_the_order_of_the_labels(k: int) -> None:
    logits = np.array([[0, 3, 1, 3, 2], [1, 1, 1, 1, 1]], np.float32)
    indices, probabilities = rank(logits, k)
    assert indices.tolist() == [[1, 3, 4, 2, 0][:k], [0, 1, 2, 3, 4][:k]]
    whole = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert np.allclose(probabilities, np.take_along_axis(whole, indices, axis=1))


def test_top_k_is_one_number_within_the_categories() -> None:
    labels = Labels(["甲", "b > c"])
    assert labels.top_k(None) == 1
    assert labels.top_k(np.array([[2], [2]])) == 2
    for asked in ([[0]], [[3]], [[1], [2]]):
        with pytest.raises(InputError, match="top_k must be one number from 1 to 2"):
            labels.top_k(np.array(asked))
    assert labels.encoded(np.array([[1, 0]])).tolist() == [[b"b > c", "甲".encode()]]
    assert labels.counts(np.array([1, 1, 0])) == {"b > c": 2, "甲": 1}


def test_labels_that_do_not_match_the_logits_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no labels"):
        Labels.load(tmp_path, 2)
    (tmp_path / "labels.json").write_text('["a"]')
    with pytest.raises(InputError, match="1 labels for 2 logits"):
        Labels.load(tmp_path, 2)


def test_answers_are_sent_from_several_threads_and_none_is_lost() -> None:
    together, sent, lock = threading.Barrier(3), [], threading.Lock()

    def send(number: int) -> None:
        if number < 3:
            together.wait(30)  # passes only if three threads send at the same time
        if number == 5:
            raise RuntimeError("its caller has left")
        with lock:
            sent.append(number)

    senders: Senders[int] = Senders(send, capacity=4, threads=3)
    senders.put(range(3))
    senders.put(range(3, 50))
    senders.close()
    assert sorted(sent) == [number for number in range(50) if number != 5]


def test_logits_are_returned_on_request(server: Server, repository: Path, checkpoint: Path) -> None:
    """Before and after a request for the same texts without logits: the cache distinguishes the two."""
    texts = ["红富士苹果 5斤装", "usb c cable 2m"]
    ids = Checkpoint(checkpoint).tokenizer(texts)
    tokens = np.concatenate([row[:length] for row, length in zip(ids.input_ids, ids.lengths[:, 0], strict=True)])
    expected = load_engine(repository / "encoder" / "1")(tokens, ids.lengths[:, 0])
    tensors = []
    for name, kind, value in (
        ("input_ids", "INT32", ids.input_ids),
        ("lengths", "INT32", ids.lengths),
        ("return_logits", "BOOL", np.ones((2, 1), bool)),
    ):
        tensors.append(InferInput(name, list(value.shape), kind))
        tensors[-1].set_data_from_numpy(value)
    wanted = [InferRequestedOutput(name) for name in ("category", "logits")]
    names = Checkpoint(checkpoint).labels
    with InferenceServerClient(server.url) as triton:
        for _ in range(2):
            plain = triton.infer("encoder", tensors[:2])
            assert plain.as_numpy("logits") is None
            asked = triton.infer("encoder", tensors, outputs=wanted)
            assert np.allclose(asked.as_numpy("logits"), expected, atol=1e-4)
            best = [[names[place].encode()] for place in expected.argmax(axis=1)]
            assert asked.as_numpy("category").tolist() == plain.as_numpy("category").tolist() == best
