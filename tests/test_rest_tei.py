"""The routes of text-embeddings-inference: its requests, answers and errors."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from huggingface_hub import InferenceClient

from aisle.client import Classifier, InvalidText, Prediction
from aisle.deploy.rest.tei import all_categories

from .conftest import Server
from .front import RunningFront, front
from .test_rest import TEXTS


@pytest.fixture(scope="module")
def rest(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningFront]:
    with front(server.url, tmp_path_factory.mktemp("rest")) as running:
        yield running


def scores(prediction: Prediction) -> list[dict[str, Any]]:
    pairs = zip(prediction.categories, prediction.confidences, strict=True)
    return [{"score": score, "label": label} for label, score in pairs]


@pytest.mark.parametrize("path", ["/predict", "/"])
def test_every_category_with_its_score(rest: RunningFront, server: Server, classifier: Classifier, path: str) -> None:
    """For one text a list; for several a list of lists."""
    expected = [scores(each) for each in classifier.classify(TEXTS, server.labels)]
    assert rest.post(path, {"inputs": TEXTS[0]}).body == expected[0]
    assert rest.post(path, {"inputs": TEXTS[:1]}).body == expected[0]
    assert rest.post(path, {"inputs": [TEXTS[:1]]}).body == expected[:1]
    more = {"raw_scores": False, "truncate": True, "truncation_direction": "Right", "unknown": 1}
    assert rest.post(path, {"inputs": [[each] for each in TEXTS], **more}).body == expected


@pytest.mark.parametrize(
    ("body", "status", "complaint"),
    [
        ({"inputs": ["a", "b"]}, 422, "a pair of texts cannot be classified"),
        ({"inputs": [["a"], ["b", "c"]]}, 422, "a pair of texts cannot be classified"),
        ({"inputs": ["a", "b", "c"]}, 422, "inputs must be a text"),
        ({"inputs": []}, 422, "inputs must be a text"),
        ({"inputs": [[]]}, 422, "inputs must be a text"),
        ({"inputs": [["a"], "b"]}, 422, "inputs must be a text"),
        ({"inputs": 5}, 422, "inputs must be a text"),
        ({"inputs": [[5]]}, 422, "inputs must be a text"),
        ({"inputs": {"a": 1}}, 422, "inputs must be a text"),
        ({"texts": ["a"]}, 422, "inputs: Field required"),
        ({"inputs": "a", "raw_scores": True}, 422, "raw_scores must be false"),
        ({"inputs": " "}, 422, "empty once cleaned"),
        ({"inputs": [["a"]] * 65}, 413, "over the limit of 64"),
        (b"{", 400, "not JSON"),
    ],
)
def test_errors_have_the_form_of_tei(rest: RunningFront, body: Any, status: int, complaint: str) -> None:
    answer = rest.post("/predict", body)
    assert answer.status == status, answer.data
    assert complaint in answer.body["error"]
    assert answer.body["error_type"] == "Validation"


def test_health_and_info(rest: RunningFront, server: Server, classifier: Classifier) -> None:
    for path in ("/health", "/"):
        assert (rest.ask("GET", path).status, rest.ask("GET", path).data) == (200, b"")
    info = rest.ask("GET", "/info").body
    numbers = info["model_type"]["classifier"]
    assert {*numbers["label2id"]} == {*classifier.classify(["a"], server.labels)[0].categories}
    assert {int(number): name for number, name in numbers["id2label"].items()} == {
        number: name for name, number in numbers["label2id"].items()
    }
    assert info["max_client_batch_size"] == 64
    assert info["auto_truncate"] is True


class TwoVersions:
    """A server with a canary: version 2, which has one category more, answers the texts that say so."""

    labels: ClassVar = {1: ("a", "b"), 2: ("a", "b", "c")}
    asked = 0

    async def max_batch(self) -> int:
        return 64

    async def category_counts(self) -> dict[int, int]:
        self.asked += 1
        return {version: len(labels) for version, labels in self.labels.items()}

    async def classify(self, texts: list[str], top_k: int, *, decisions: bool, attributes: bool) -> list[Prediction]:
        version = 2 if "canary" in texts[0] else 1
        labels = self.labels[version]
        if top_k > len(labels):
            raise InvalidText(f"top_k must be one number from 1 to {len(labels)} in every row")
        return [Prediction(labels[:top_k], (0.1,) * top_k, version) for _ in texts]


@pytest.mark.parametrize(("known", "asked"), [({}, 1), ({1: 2, 2: 3}, 0), ({1: 2}, 1), ({1: 5}, 1)])
def test_all_categories_of_the_version_that_answers(known: dict[int, int], asked: int) -> None:
    """Also if versions differ, and if what was known of them is out of date."""
    server: Any = TwoVersions()
    front: Any = SimpleNamespace(category_counts=known, client=lambda request: server)
    request: Any = SimpleNamespace(headers={})
    answers = [asyncio.run(all_categories(front, request, [text])) for text in ("canary", "other")]
    assert [answer.categories for (answer,) in answers] == [("a", "b", "c"), ("a", "b")]
    assert server.asked == asked


def test_the_client_of_hugging_face_works_unchanged(rest: RunningFront, classifier: Classifier) -> None:
    client = InferenceClient(model=rest.url, token="unused")
    best: Any = client.text_classification(TEXTS[0])  # of a flat list, this client returns the first
    assert best["label"] == classifier.classify(TEXTS[:1])[0].category
    client = InferenceClient(model=rest.url, provider="hf-inference", token="unused")
    assert client.get_endpoint_info()["max_client_batch_size"] == 64
