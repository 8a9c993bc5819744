"""Explain: which words of a text decided its category.

Integrated gradients (Sundararajan et al. 2017) ask the checkpoint: they divide the difference between the text and one
that says nothing among the words. Occlusion (Zeiler and Fergus 2014) asks what is served: it leaves out one word after
the other.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from captum.attr import IntegratedGradients

from aisle.client import Classifier, Prediction
from aisle.console import track
from aisle.errors import InputError
from aisle.preprocess.clean import TextError, prepare
from aisle.preprocess.encode import Encoder
from aisle.train.calibrate import softmax
from aisle.train.checkpoint import load_model, read_labels
from aisle.train.evaluate import largest_top_k, logits_of, pad

STEPS = 50  # points of the path at which gradients are taken
TEXTS, ROWS = 8, 64  # of a batch of texts, and of a batch of points of their paths
MOST_LABELS = 2**20
GRADIENTS, OCCLUSION = "integrated_gradients", "occlusion"  # the methods, as results name them
Floats = npt.NDArray[np.floating[Any]]
Weights = list[list[float]]  # of each word of each text
# Without a tokenizer: a run of letters and digits, or any one other sign; of Chinese, each character.
_WORD = re.compile(r"[^\W_\u3400-\u9fff]+|\S")


@dataclass(frozen=True)
class Reading:
    """A cleaned text as the model reads it."""

    text: str  # up to where the model stops reading: what lies behind must not move up when a word is left out
    unread: int  # characters behind it
    words: list[tuple[int, int]]  # where each starts and ends
    tokens: list[int]  # none where the tokenizer is unknown
    word_of_token: list[int]  # the number of its word, -1 for [CLS] and [SEP]

    def without(self, words: Sequence[int]) -> str:
        """Return the text with words left out; a space in their place keeps their neighbours apart."""
        text, end = "", 0
        for start, stop in sorted(self.words[word] for word in words):
            text += self.text[end:start] + " "
            end = stop
        return text + self.text[end:]


def read(text: str, encoder: Encoder | None) -> Reading:
    """Divide a cleaned text into words: a run of letters and digits, a sign, or a piece of Chinese.

    Pieces of Chinese are the tokenizer's; without it each character is one.
    """
    words = [match.span() for match in _WORD.finditer(text)]
    if encoder is None:
        return Reading(text, 0, words, [], [])
    starts = [start for start, _ in words]
    tokens, spans, cut = encoder.spans(text)
    joined: list[tuple[int, int]] = []
    word_of_token = []
    current = None
    for start, end in spans:
        if start == end:
            word_of_token.append(-1)
            continue
        number = bisect_right(starts, start)
        if number == current:  # a further piece of the same word
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
        current = number
        word_of_token.append(len(joined) - 1)
    end = joined[-1][1] if cut else len(text)
    return Reading(text[:end], len(text) - end, joined, tokens, word_of_token)


class Answers(NamedTuple):
    """What texts without some of their words still get, each [texts]."""

    probability: Floats  # of the category asked for
    kept: npt.NDArray[np.bool_]  # whether it is still the most probable one


class Judge(Protocol):
    """A classifier that texts are put to."""

    def first(self, texts: Sequence[str]) -> list[Prediction]:
        """Return the most probable category of each text."""

    def ask(self, texts: Sequence[str], categories: Sequence[str], description: str) -> Answers:
        """Return what each text gets of a category; one that is refused, as empty, gets nothing."""


class Checkpoint:
    """The classifier in PyTorch."""

    def __init__(self, folder: Path) -> None:
        """Load it.

        Raises:
            InputError: the folder is no checkpoint.
        """
        self.labels = read_labels(folder)
        self.model = load_model(folder).to("cuda" if torch.cuda.is_available() else "cpu")
        self.encoder = Encoder(folder / "tokenizer.json")

    def first(self, texts: Sequence[str]) -> list[Prediction]:
        probabilities = self._probabilities(texts, "classifying")
        best = probabilities.argmax(axis=1).tolist()
        return [Prediction((self.labels[i],), (float(row[i]),)) for i, row in zip(best, probabilities, strict=True)]

    def ask(self, texts: Sequence[str], categories: Sequence[str], description: str) -> Answers:
        prepared = []
        for text in texts:
            try:
                prepared.append(prepare(text))
            except TextError:
                prepared.append("")
        probabilities = self._probabilities(prepared, description)
        wanted = self.numbers(categories)
        given = np.array([bool(text) for text in prepared])
        return Answers(
            np.where(given, probabilities[np.arange(len(texts)), wanted], 0.0),
            given & (probabilities.argmax(axis=1) == wanted),
        )

    def numbers(self, categories: Sequence[str]) -> list[int]:
        number = {label: i for i, label in enumerate(self.labels)}
        return [number[category] for category in categories]

    def _probabilities(self, texts: Sequence[str], description: str) -> Floats:
        different = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        logits = logits_of(self.model, self.encoder.tokens(list(different)), description)
        return softmax(logits)[[different[text] for text in texts]]


class Served:
    """The classifier behind a server."""

    def __init__(self, classifier: Classifier, labels: Sequence[str] | None) -> None:
        """Learn how many categories the server has.

        Raises:
            InputError: they are not `labels`.
            ServerError: the server failed.
        """
        self._classifier = classifier
        self._categories = largest_top_k(classifier, len(labels) + 1 if labels else MOST_LABELS)
        if labels:
            (answer,) = classifier.classify(["1"], self._categories)
            strange = sorted(set(labels) ^ set(answer.categories))
            if strange:
                message = f"the server's categories are not the checkpoint's: only one of them has {strange[0]!r}"
                raise InputError(f"{message}; give the checkpoint that its engine was built from")

    def first(self, texts: Sequence[str]) -> list[Prediction]:
        return self._classifier.classify(texts)

    def ask(self, texts: Sequence[str], categories: Sequence[str], description: str) -> Answers:
        probability, kept = np.zeros(len(texts)), np.zeros(len(texts), bool)
        asked = [i for i, text in enumerate(texts) if not text.isspace()]
        answers = self._classifier.stream([texts[i] for i in asked], self._categories)
        for i, answer in zip(asked, track(answers, description, len(asked)), strict=True):
            if isinstance(answer, Prediction):
                probability[i] = answer.confidences[answer.categories.index(categories[i])]
                kept[i] = answer.category == categories[i]
        return Answers(probability, kept)


@contextmanager
def judging(checkpoint: Checkpoint | None, url: str) -> Iterator[Judge]:
    """Connect to the server, if one is named, else let the checkpoint judge.

    Raises:
        InputError: neither is given, or they don't belong together.
    """
    if url:
        with Classifier.from_environment(url) as classifier:
            yield Served(classifier, checkpoint.labels if checkpoint else None)
    elif checkpoint:
        yield checkpoint
    else:
        raise InputError("say whose answers to explain: --checkpoint DIR, --url HOST:PORT, or both")


@dataclass(frozen=True)
class Attribution:
    """What integrated gradients say of one text."""

    weights: list[float]  # of its words, in nats of the category's log-probability
    value: float  # log-probability of the category
    baseline: float  # the same of the baseline

    @property
    def gap(self) -> float:
        """How far the weights' sum is from the difference that it should be: completeness, up to the steps taken."""
        return sum(self.weights) - (self.value - self.baseline)


def integrated_gradients(
    checkpoint: Checkpoint, readings: Sequence[Reading], categories: Sequence[str]
) -> list[Attribution]:
    """Attribute the log-probability of each text's category to its words (Sundararajan et al. 2017).

    The path leads to the text's word embeddings from those of [PAD]: the one token that says nothing in every
    checkpoint ([MASK] is random noise in one that was never trained to fill it in). [CLS], [SEP] and the positions stay
    as they are, so everything is divided among the words. The log-probability does not saturate as the
    probability does. The integral is taken by Gauss-Legendre quadrature.
    """
    model = checkpoint.model

    def log_probabilities(vectors: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = model(inputs_embeds=vectors, attention_mask=attention_mask).logits
        return logits.log_softmax(dim=1)

    method = IntegratedGradients(log_probabilities)
    targets = checkpoint.numbers(categories)
    order = sorted(range(len(readings)), key=lambda i: len(readings[i].tokens))
    found: dict[int, Attribution] = {}
    for batch in track([order[i : i + TEXTS] for i in range(0, len(order), TEXTS)], "integrating gradients"):
        input_ids, attention_mask = (t.to(model.device) for t in pad([readings[i].tokens for i in batch]))
        said, _ = pad([[int(word >= 0) for word in readings[i].word_of_token] for i in batch])
        target = torch.tensor([targets[i] for i in batch], device=model.device)
        with torch.no_grad():
            embed = model.get_input_embeddings()
            vectors = embed(input_ids)
            silent = embed(input_ids.masked_fill(said.bool().to(model.device), model.config.pad_token_id))
            ends = [
                log_probabilities(each, attention_mask).gather(1, target[:, None])[:, 0] for each in (vectors, silent)
            ]
        weights = method.attribute(vectors, silent, target, (attention_mask,), n_steps=STEPS, internal_batch_size=ROWS)
        of_tokens = weights.sum(dim=2).double().cpu().numpy()
        for i, row, value, baseline in zip(batch, of_tokens, *(end.tolist() for end in ends), strict=True):
            of_words = np.zeros(len(readings[i].words))
            for token, word in enumerate(readings[i].word_of_token):
                if word >= 0:
                    of_words[word] += row[token]
            found[i] = Attribution(of_words.tolist(), value, baseline)
    return [found[i] for i in range(len(readings))]


def occlusion(judge: Judge, readings: Sequence[Reading], answers: Sequence[Prediction]) -> Weights:
    """Return how far the probability of each text's category falls when each of its words is left out.

    A text of one word is nothing without it, so the word counts for the whole probability.
    """
    asked = [(i, word) for i, reading in enumerate(readings) for word in range(len(reading.words))]
    texts = [readings[i].without([word]) for i, word in asked]
    probability = judge.ask(texts, [answers[i].category for i, _ in asked], "leaving words out").probability
    weights: Weights = [[] for _ in readings]
    for (i, _), left in zip(asked, probability.tolist(), strict=True):
        weights[i].append(answers[i].confidence - left)
    return weights


def attribute(
    readings: Sequence[Reading], checkpoint: Checkpoint | None, judge: Judge
) -> tuple[list[Prediction], dict[str, Weights], list[Attribution]]:
    """Return the judge's answers, each method's weights, and what integrated gradients say besides."""
    answers = judge.first([reading.text for reading in readings])
    weights: dict[str, Weights] = {}
    attributions: list[Attribution] = []
    if checkpoint:
        attributions = integrated_gradients(checkpoint, readings, [answer.category for answer in answers])
        weights[GRADIENTS] = [attribution.weights for attribution in attributions]
    if isinstance(judge, Served):
        weights[OCCLUSION] = occlusion(judge, readings, answers)
    return answers, weights, attributions


def explain(
    texts: Sequence[str], *, checkpoint: Path | None = None, url: str = "", report: Path | None = None
) -> dict[str, Any]:
    """Explain the category of each text: by integrated gradients from a checkpoint, by occlusion through a server.

    With both, the category is the server's. `report` is the HTML page to write.

    Raises:
        InputError: a text cannot be classified, no classifier is given, or checkpoint and server don't belong together.
        ServerError: the server failed.
    """
    if not texts:
        raise InputError("give a text to explain, or a table with --check")
    prepared = [prepare(text) for text in texts]
    model = Checkpoint(checkpoint) if checkpoint else None
    with judging(model, url) as judge:
        readings = [read(text, model.encoder if model else None) for text in prepared]
        answers, weights, attributions = attribute(readings, model, judge)
    result = {
        "checkpoint": str(checkpoint) if checkpoint else None,
        "url": url or None,
        "methods": list(weights),
        "explanations": explanations(readings, answers, weights, attributions),
    }
    if report:
        from aisle.train.explanation_report import write_explanations

        write_explanations(result, report)
    return result


def explanations(
    readings: Sequence[Reading],
    answers: Sequence[Prediction],
    weights: dict[str, Weights],
    attributions: Sequence[Attribution],
) -> list[dict[str, Any]]:
    """Return what is told of each text."""
    told = []
    for i, (reading, answer) in enumerate(zip(readings, answers, strict=True)):
        words = [
            {
                "word": reading.text[start:end],
                "start": start,
                "end": end,
                **{method: of_texts[i][number] for method, of_texts in weights.items()},
            }
            for number, (start, end) in enumerate(reading.words)
        ]
        told.append(
            {
                "text": reading.text,
                "unread_characters": reading.unread,
                "category": answer.category,
                "confidence": answer.confidence,
                "words": words,
            }
        )
        if attributions:
            each = attributions[i]
            told[-1]["completeness"] = {
                "log_probability": each.value,
                "baseline": each.baseline,
                "sum": sum(each.weights),
                "gap": each.gap,
            }
    return told


def marks(explanation: dict[str, Any], method: str) -> list[tuple[str, float]]:
    """Return the pieces of a text in order, each with its share: from -1, against the category, to 1, for it.

    The word that weighs most has a share of 1 or -1; what lies between words has 0.
    """
    text, words = explanation["text"], explanation["words"]
    most = max((abs(word[method]) for word in words), default=0) or 1
    pieces, end = [], 0
    for word in words:
        if word["start"] > end:
            pieces.append((text[end : word["start"]], 0.0))
        pieces.append((text[word["start"] : word["end"]], word[method] / most))
        end = word["end"]
    if end < len(text):
        pieces.append((text[end:], 0.0))
    return pieces
