"""One new row of a classifier's output layer, with the other rows frozen.

The softmax probability of the new category is sigmoid(w·h + b - rest), where h are the inputs of the output layer and
rest is the logsumexp of the other logits. So the row is a logistic regression with an offset, and its probability is
calibrated against the other categories. The idea of a row made from few texts is that of imprinted weights (Qi, Brown
and Lowe 2018, arXiv:1712.07136), where the row is the mean of the texts' inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit, logsumexp

from aisle.train.core.decisions import Floats

RIDGE = 0.01  # per text; see docs/benchmarks.md
PRIOR = 0.1  # the weight of all examples together, relative to that of all other texts
FOLDS = 10


class Row(NamedTuple):
    """A row of the output layer."""

    weight: Floats  # [features]
    bias: float

    def logits(self, features: Floats) -> Floats:
        """Return the logits [texts] of features [texts, features]."""
        logits: Floats = features @ self.weight + self.bias
        return logits


class Inputs(NamedTuple):
    """Texts as the output layer sees them."""

    features: Floats  # [texts, features]
    logits: Floats  # [texts, labels], of the labels that stay

    def rows(self, chosen: Floats) -> Inputs:
        """Return the chosen texts."""
        return Inputs(self.features[chosen], self.logits[chosen])


class Prototype(NamedTuple):
    """A row for a new category, and what it says about the texts that it was made from, when it had not seen them."""

    row: Row
    examples: Floats  # logits of the examples, each from a row that was fitted without it
    texts: Floats  # the same for the other texts


def new_row(examples: Inputs, texts: Inputs, correct: Floats, share: float) -> Prototype:
    """Return the row of a new category.

    Its bias is as high as possible if no more than `share` of the other texts that are `correct`, [texts], may be lost.
    Cross-fitted logits decide on it, not those of texts that the row was fitted on.
    """
    folds = min(FOLDS, len(examples.features))
    of_example = np.arange(len(examples.features)) % folds
    of_text = np.random.default_rng(0).permutation(len(texts.features)) % folds
    for_examples, for_texts = np.empty(len(of_example)), np.empty(len(of_text))
    for fold in range(folds):
        row = _one_against_rest(examples.rows(of_example != fold), texts.rows(of_text != fold))
        for_examples[of_example == fold] = row.logits(examples.features[of_example == fold])
        for_texts[of_text == fold] = row.logits(texts.features[of_text == fold])
    room = np.sort((texts.logits.max(axis=1) - for_texts)[correct])
    shift = room[int(share * len(of_text))] - 1e-3
    row = _one_against_rest(examples, texts)
    return Prototype(Row(row.weight, row.bias + shift), for_examples + shift, for_texts + shift)


def _one_against_rest(examples: Inputs, texts: Inputs) -> Row:
    many, few = len(texts.features), len(examples.features)
    wanted = np.repeat([1.0, 0.0], [few, many])
    return fit_row(
        np.concatenate([examples.features, texts.features]),
        np.concatenate([examples.logits, texts.logits]),
        wanted,
        weights=np.where(wanted == 1, PRIOR / few, 1 / many),
        start=np.zeros(examples.features.shape[1]),
    )


def fit_row(features: Floats, logits: Floats, wanted: Floats, *, weights: Floats, start: Floats) -> Row:
    """Fit a row by logistic regression with an offset, and with a penalty on its distance from `start`.

    Args:
        features: [texts, features].
        logits: of the other labels, [texts, labels].
        wanted: the probability of the new label, [texts].
        weights: of the texts' losses, [texts]; they add up to about 1.
        start: weights of the row, [features].
    """
    center, scale = features.mean(axis=0), features.std()
    inputs, first = (features - center) / scale, start * scale
    rest = logsumexp(logits, axis=1)

    def loss(row: Floats) -> tuple[float, Floats]:
        margin = inputs @ row[:-1] + row[-1] - rest
        away = row[:-1] - first
        error = weights * (expit(margin) - wanted)
        value = weights @ (np.logaddexp(0, margin) - wanted * margin) + RIDGE / 2 * away @ away
        return float(value), np.append(inputs.T @ error + RIDGE * away, error.sum())

    found = minimize(loss, np.append(first, 0.0), jac=True, method="L-BFGS-B").x
    weight = found[:-1] / scale
    return Row(weight, float(found[-1] - weight @ center))


def merged_row(weight: Floats, features: Floats, logits: Floats, members: Sequence[int]) -> Row:
    """Return one row in place of several, whose probability is nearest to the sum of theirs.

    The exact logit, the logsumexp of theirs, is not linear. So a row is fitted to the sum of the probabilities on some
    texts, and starts from the sum of the rows.

    Args:
        weight: the output layer's, [labels, features].
        features: of the texts, [texts, features].
        logits: of the texts, [texts, labels].
        members: the numbers of the labels that are merged.
    """
    others = np.delete(np.arange(logits.shape[1]), members)
    wanted = expit(logsumexp(logits[:, members], axis=1) - logsumexp(logits[:, others], axis=1))
    common = weight.mean(axis=0)  # a softmax does not depend on what is added to all rows
    start = (weight[members] - common).sum(axis=0) + common
    return fit_row(features, logits[:, others], wanted, weights=np.full(len(wanted), 1 / len(wanted)), start=start)
