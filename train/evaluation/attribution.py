"""The methods that weigh a text's words: integrated gradients and occlusion.

Integrated gradients (Sundararajan et al. 2017) need the checkpoint. They compare the text with an empty one, and divide
the difference in log-probability among the words. Occlusion (Zeiler and Fergus 2014) needs only a server. It leaves out
one word at a time.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from aisle.client import Prediction
from aisle.console import track
from aisle.preprocess.encode import TextTokenizer
from aisle.preprocess.han import HAN
from aisle.train.evaluation.predictors import CheckpointPredictor, Predictor, ServerPredictor

if TYPE_CHECKING:
    import torch  # a server's predictions are explained without it

STEPS = 50  # points of the path at which gradients are taken
TEXTS, ROWS = 8, 64  # batch sizes: of texts, and of points of their paths
LEAST_CHANGE = 0.01  # of the log-probability, about 1 % of the probability
GRADIENTS, OCCLUSION = "integrated_gradients", "occlusion"  # the methods' names in results
Weights = list[list[float]]  # of each word of each text
# Words without a tokenizer: a run of letters and digits, one Chinese character, or any other character.
_WORD = re.compile(rf"[^\W_{HAN}]+|\S")


@dataclass(frozen=True)
class Reading:
    """A cleaned text as the model reads it."""

    text: str  # up to the token limit, so that no later text moves up when a word is left out
    unread: int  # characters after the limit
    words: list[tuple[int, int]]  # start and end of each word
    tokens: list[int]  # empty if the tokenizer is unknown
    word_of_token: list[int]  # index of each token's word, -1 for [CLS] and [SEP]

    def without(self, words: Sequence[int]) -> str:
        """Return the text without some words. A space replaces each, to keep its neighbours apart."""
        text, end = "", 0
        for start, stop in sorted(self.words[word] for word in words):
            text += self.text[end:start] + " "
            end = stop
        return text + self.text[end:]


def read(text: str, tokenizer: TextTokenizer | None) -> Reading:
    """Divide a cleaned text into words: runs of letters and digits, single signs, and pieces of Chinese.

    The tokenizer defines the pieces of Chinese. Without it, each character is a piece.
    """
    words = [match.span() for match in _WORD.finditer(text)]
    if tokenizer is None:
        return Reading(text, 0, words, [], [])
    starts = [start for start, _ in words]
    tokens, spans, cut = tokenizer.spans(text)
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


@dataclass(frozen=True)
class Attribution:
    """The integrated gradients of one text."""

    weights: list[float]  # of its words, in units of the category's log-probability (natural logarithm)
    value: float  # log-probability of the category
    baseline: float  # log-probability of the category for the empty text

    @property
    def gap(self) -> float:
        """The completeness error: the weights' sum minus the difference in log-probability."""
        return sum(self.weights) - (self.value - self.baseline)


def integrated_gradients(
    checkpoint: CheckpointPredictor, readings: Sequence[Reading], categories: Sequence[str]
) -> list[Attribution]:
    """Attribute the log-probability of each text's category to its words (Sundararajan et al. 2017).

    The path goes from the embeddings of [PAD] to the text's. [PAD] carries no meaning in any checkpoint, but [MASK] is
    random in a checkpoint without pretraining. [CLS], [SEP] and the positions stay the same, so the words get the
    whole difference. The log-probability is used because the probability saturates. The integral is computed by
    Gauss-Legendre quadrature.
    """
    targets = checkpoint.numbers(categories)
    order = sorted(range(len(readings)), key=lambda i: len(readings[i].tokens))
    found: dict[int, Attribution] = {}
    for batch in track([order[i : i + TEXTS] for i in range(0, len(order), TEXTS)], "integrating gradients"):
        attributions = _integrate(checkpoint.model, [readings[i] for i in batch], [targets[i] for i in batch])
        found.update(zip(batch, attributions, strict=True))
    return [found[i] for i in range(len(readings))]


def _integrate(model: Any, readings: Sequence[Reading], targets: Sequence[int]) -> list[Attribution]:
    """Integrate the gradients of a batch; `targets` are the indices of the texts' categories."""
    import torch
    from captum.attr import IntegratedGradients

    from aisle.train.core.predict import pad

    def log_probabilities(vectors: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = model(inputs_embeds=vectors, attention_mask=attention_mask).logits
        return logits.log_softmax(dim=1)

    input_ids, attention_mask = (tensor.to(model.device) for tensor in pad([each.tokens for each in readings]))
    in_word, _ = pad([[int(word >= 0) for word in each.word_of_token] for each in readings])
    target = torch.tensor(list(targets), device=model.device)
    with torch.no_grad():
        embed = model.get_input_embeddings()
        text = embed(input_ids)
        empty = embed(input_ids.masked_fill(in_word.bool().to(model.device), model.config.pad_token_id))
        values, baselines = (
            log_probabilities(each, attention_mask).gather(1, target[:, None])[:, 0].tolist() for each in (text, empty)
        )
    method = IntegratedGradients(log_probabilities)
    weights = method.attribute(text, empty, target, (attention_mask,), n_steps=STEPS, internal_batch_size=ROWS)
    of_tokens = weights.sum(dim=2).double().cpu().numpy()
    return [
        Attribution(_sum_by_word(reading, row), value, baseline)
        for reading, row, value, baseline in zip(readings, of_tokens, values, baselines, strict=True)
    ]


def _sum_by_word(reading: Reading, of_tokens: Sequence[float]) -> list[float]:
    """Return the weight of each word: the sum of its tokens' weights."""
    of_words = np.zeros(len(reading.words))
    for token, word in enumerate(reading.word_of_token):
        if word >= 0:
            of_words[word] += of_tokens[token]
    weights: list[float] = of_words.tolist()
    return weights


def occlusion(predictor: Predictor, readings: Sequence[Reading], predictions: Sequence[Prediction]) -> Weights:
    """Return how much the probability of each text's category drops when a word is left out, for each word.

    If a text has one word, that word gets the whole probability.
    """
    left_out = [(i, word) for i, reading in enumerate(readings) for word in range(len(reading.words))]
    texts = [readings[i].without([word]) for i, word in left_out]
    probability = predictor.score(
        texts, [predictions[i].category for i, _ in left_out], "leaving words out"
    ).probability
    weights: Weights = [[] for _ in readings]
    for (i, _), left in zip(left_out, probability.tolist(), strict=True):
        weights[i].append(predictions[i].confidence - left)
    return weights


def attribute(
    readings: Sequence[Reading], checkpoint: CheckpointPredictor | None, predictor: Predictor
) -> tuple[list[Prediction], dict[str, Weights], list[Attribution]]:
    """Return the predictions, each method's weights, and the attributions of integrated gradients."""
    predictions = predictor.predict([reading.text for reading in readings])
    weights: dict[str, Weights] = {}
    attributions: list[Attribution] = []
    if checkpoint:
        attributions = integrated_gradients(checkpoint, readings, [each.category for each in predictions])
        weights[GRADIENTS] = [attribution.weights for attribution in attributions]
    if isinstance(predictor, ServerPredictor):
        weights[OCCLUSION] = occlusion(predictor, readings, predictions)
    return predictions, weights, attributions


def evidence(explanation: dict[str, Any], method: str) -> list[float]:
    """Return each word's share of the evidence: its weight divided by the sum of all absolute weights.

    A positive share supports the category, a negative one opposes it.
    """
    weights = [float(word[method]) for word in explanation["words"]]
    total = sum(map(abs, weights)) or 1.0
    return [weight / total for weight in weights]


def accounted(explanation: dict[str, Any]) -> str:
    """Return a sentence about the completeness of integrated gradients; empty if the text changes too little."""
    completeness = explanation.get("completeness")
    if not completeness or abs(change := completeness["log_probability"] - completeness["baseline"]) < LEAST_CHANGE:
        return ""
    share = completeness["sum"] / change
    return f"The words account for {share:.1%} of the difference between this text and an empty one."


def marks(explanation: dict[str, Any], method: str) -> list[tuple[str, float]]:
    """Return the pieces of a text in order, each with a shade from -1 (opposes the category) to 1 (supports it).

    The word with the largest weight has 1 or -1; text between words has 0.
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
