"""The classifiers for evaluation and explanation: a checkpoint in PyTorch, or a running server."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from aisle.client import Attribute, Classifier, Failure, InvalidText, Prediction
from aisle.console import track
from aisle.errors import InputError
from aisle.preprocess.clean import prepare
from aisle.preprocess.values import TextError
from aisle.train.core.calibration import softmax
from aisle.train.core.checkpoint import Checkpoint
from aisle.train.core.decisions import OUTCOMES
from aisle.train.core.heads import spans

MOST_CATEGORIES = 2**20  # an upper bound for the categories of a server
Floats = npt.NDArray[np.floating[Any]]


class CategoryScores(NamedTuple):
    """The scores of one category for each text, each [texts]."""

    probability: Floats
    is_top: npt.NDArray[np.bool_]  # whether the category is the most probable one


class Predictor(Protocol):
    """A classifier."""

    def top_k(self, texts: Sequence[str], k: int) -> list[Prediction | Failure]:
        """Return the k most probable categories of each raw text, and its decision if the model has decisions.

        If there are fewer than k categories, all are returned.
        """

    def known_categories(self, labels: Sequence[str], predictions: Sequence[Prediction | Failure]) -> set[str]:
        """Return the categories that the classifier knows, at least those among `labels` and in `predictions`."""

    def predict(self, texts: Sequence[str]) -> list[Prediction]:
        """Return the most probable category of each cleaned text."""

    def score(self, texts: Sequence[str], categories: Sequence[str], description: str) -> CategoryScores:
        """Return the scores of one category for each text; the probability is 0 if the text is empty or refused."""


class CheckpointPredictor:
    """A checkpoint in PyTorch, on the GPU if there is one."""

    def __init__(self, checkpoint: Checkpoint, *, attributes: bool = False) -> None:
        """Load it.

        Args:
            attributes: whether `top_k` gives attributes too, if it has further heads.

        Raises:
            InputError: the folder is not a checkpoint.
        """
        import torch  # imported here because a server's predictions do not need it

        self.labels = checkpoint.labels
        self.tokenizer = checkpoint.tokenizer
        self.heads = checkpoint.heads if attributes else ()
        model = checkpoint.whole_model if self.heads else checkpoint.model
        self.model = model.to("cuda" if torch.cuda.is_available() else "cpu")
        self.decisions = checkpoint.decisions

    def top_k(self, texts: Sequence[str], k: int) -> list[Prediction | Failure]:
        every = self._logits([prepare(text) for text in texts], "evaluating")
        logits = every[:, : len(self.labels)]
        probabilities = softmax(logits)
        ranking = np.argsort(-probabilities, axis=1, kind="stable")
        best = ranking[:, :k]
        confidences = np.take_along_axis(probabilities, best, axis=1)
        predictions = [
            Prediction(tuple(self.labels[i] for i in row), tuple(values))
            for row, values in zip(best.tolist(), confidences.tolist(), strict=True)
        ]
        decided = self._decided(predictions, logits, ranking) if self.decisions else predictions
        return [*(self._described(decided, every) if self.heads else decided)]

    def _described(self, predictions: Iterable[Prediction], logits: Floats) -> Iterator[Prediction]:
        """Yield predictions with their attributes, from the logits [texts, categories + values]."""
        found = []
        for head, place in zip(self.heads, spans(len(self.labels), self.heads), strict=True):
            probabilities = softmax(logits[:, place])
            best = probabilities.argmax(axis=1).tolist()
            found.append([Attribute(head.labels[i], float(row[i])) for i, row in zip(best, probabilities, strict=True)])
        for prediction, own in zip(predictions, zip(*found, strict=True), strict=True):
            named = zip((head.name for head in self.heads), own, strict=True)
            yield replace(prediction, attributes=dict(named))

    def _decided(
        self, predictions: Sequence[Prediction], logits: Floats, ranking: npt.NDArray[np.intp]
    ) -> Iterator[Prediction]:
        """Yield predictions with their decisions."""
        assert self.decisions
        decided = self.decisions.apply(logits)
        for prediction, outcome, category, size, energy, ranked in zip(predictions, *decided, ranking, strict=True):
            members = tuple(self.labels[i] for i in ranked[:size])
            yield replace(
                prediction,
                decision=OUTCOMES[outcome],
                decided=self.decisions.names[category],
                prediction_set=members,
                energy=float(energy),
            )

    def known_categories(self, labels: Sequence[str], predictions: Sequence[Prediction | Failure]) -> set[str]:
        return set(self.labels)

    def predict(self, texts: Sequence[str]) -> list[Prediction]:
        probabilities = self._probabilities(texts, "classifying")
        best = probabilities.argmax(axis=1).tolist()
        return [Prediction((self.labels[i],), (float(row[i]),)) for i, row in zip(best, probabilities, strict=True)]

    def score(self, texts: Sequence[str], categories: Sequence[str], description: str) -> CategoryScores:
        prepared = []
        for text in texts:
            try:
                prepared.append(prepare(text))
            except TextError:
                prepared.append("")
        probabilities = self._probabilities(prepared, description)
        wanted = self.numbers(categories)
        given = np.array([bool(text) for text in prepared])
        return CategoryScores(
            np.where(given, probabilities[np.arange(len(texts)), wanted], 0.0),
            given & (probabilities.argmax(axis=1) == wanted),
        )

    def numbers(self, categories: Sequence[str]) -> list[int]:
        """Return the number of each category's logit."""
        number = {label: i for i, label in enumerate(self.labels)}
        return [number[category] for category in categories]

    def _probabilities(self, texts: Sequence[str], description: str) -> Floats:
        """Return probabilities [texts, labels]."""
        return softmax(self._logits(texts, description)[:, : len(self.labels)])

    def _logits(self, texts: Sequence[str], description: str) -> Floats:
        """Return logits [texts, labels], with those of `heads` after them; equal texts are computed once."""
        from aisle.train.core.predict import logits_of  # imported here because it imports torch

        row_of = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        logits = logits_of(self.model, self.tokenizer.tokens(list(row_of)), description)
        return logits[[row_of[text] for text in texts]]


class ServerPredictor:
    """A running server."""

    def __init__(self, classifier: Classifier, labels: Sequence[str] | None = None) -> None:
        """Use a connected client.

        Raises:
            InputError: `labels` are given but differ from the server's categories, or the model is multi-label.
            ServerError: the server failed.
        """
        if classifier.models().multi_label:
            raise InputError("the server's model is multi-label; this needs a model that gives a text one category")
        self._classifier = classifier
        self._labels = labels
        if labels:
            (prediction,) = classifier.classify(["1"], self._categories)
            differing = sorted(set(labels) ^ set(prediction.categories))
            if differing:
                message = f"the server's categories are not the checkpoint's: only one of them has {differing[0]!r}"
                raise InputError(f"{message}; give the checkpoint that its engine was built from")

    @cached_property
    def _categories(self) -> int:
        """The number of the server's categories; if there are labels, at most one more than their number."""
        return largest_top_k(self._classifier, len(self._labels) + 1 if self._labels else MOST_CATEGORIES)

    def top_k(self, texts: Sequence[str], k: int) -> list[Prediction | Failure]:
        models, most = self._classifier.models(), largest_top_k(self._classifier, k)
        predictions = self._classifier.stream(
            texts, most, decisions=models.has_decisions, attributes=bool(models.attributes)
        )
        return list(track(predictions, "evaluating", total=len(texts)))

    def known_categories(self, labels: Sequence[str], predictions: Sequence[Prediction | Failure]) -> set[str]:
        named = {category for each in predictions if isinstance(each, Prediction) for category in each.categories}
        if named.issuperset(labels):
            return named
        (prediction,) = self._classifier.classify(["probe"], self._categories)
        return set(prediction.categories)

    def predict(self, texts: Sequence[str]) -> list[Prediction]:
        return self._classifier.classify(texts)

    def score(self, texts: Sequence[str], categories: Sequence[str], description: str) -> CategoryScores:
        probability, is_top = np.zeros(len(texts)), np.zeros(len(texts), bool)
        given = [i for i, text in enumerate(texts) if not text.isspace()]
        predictions = self._classifier.stream([texts[i] for i in given], self._categories)
        for i, prediction in zip(given, track(predictions, description, len(given)), strict=True):
            if isinstance(prediction, Prediction):
                probability[i] = prediction.confidences[prediction.categories.index(categories[i])]
                is_top[i] = prediction.category == categories[i]
        return CategoryScores(probability, is_top)


@contextmanager
def open_predictor(local: CheckpointPredictor | None, url: str) -> Iterator[Predictor]:
    """Connect to the server if `url` names one, else use the checkpoint.

    Raises:
        InputError: neither is given, or their categories differ.
    """
    if url:
        with Classifier.from_environment(url) as classifier:
            yield ServerPredictor(classifier, local.labels if local else None)
    elif local:
        yield local
    else:
        raise InputError("give --checkpoint DIR, --url HOST:PORT, or both")


def largest_top_k(classifier: Classifier, wanted: int) -> int:
    """Return `wanted` or, if it has fewer, the number of the server's categories. The server refuses a larger k."""
    granted, refused = 1, wanted + 1
    k = wanted
    while refused - granted > 1:
        try:
            classifier.probe(k)
        except InvalidText:
            refused = k
        else:
            granted = k
        k = (granted + refused) // 2
    return granted
