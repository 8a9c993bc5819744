"""One new row for a classifier, with the other rows frozen.

The softmax probability of the new category is sigmoid(w·h + b - rest), where h is what the row reads and rest is the
logsumexp of the other logits. So the row is a logistic regression with an offset, and its probability is calibrated
against the other categories. Rows made from few texts are known as imprinted weights (Qi, Brown and Lowe 2018,
arXiv:1712.07136); there, the row is the mean of what the texts give.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit, logsumexp

from aisle.train.core.decisions import Floats

RIDGE = 0.0001  # beside losses whose weights add up to about 1; of 1e-4 to 0.1, the one that finds most
PRIOR = 0.1  # the weight of all examples together, relative to that of all other texts
FOLDS = 5
TAIL = 20  # of the texts that a new category comes nearest to, from which its effect on all is estimated


class Row(NamedTuple):
    """A row of the output layer."""

    weight: Floats  # [features]
    bias: float

    def logits(self, features: Floats) -> Floats:
        """Return the logits [texts] of features [texts, features]."""
        logits: Floats = features @ self.weight + self.bias
        return logits


class Inputs(NamedTuple):
    """Texts as a new row sees them."""

    features: Floats  # what the row reads, [texts, features]
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
    shift = low_quantile((texts.logits.max(axis=1) - for_texts)[correct], share * len(of_text) / correct.sum())
    row = _one_against_rest(examples, texts)
    return Prototype(Row(row.weight, row.bias + shift), for_examples + shift, for_texts + shift)


def low_quantile(values: Floats, share: float) -> float:
    """Return the value below which so small a share lies that few or none of the given values would show it.

    The lowest values are taken for an exponential tail (Balkema and de Haan 1974, Pickands 1975).
    """
    count = min(TAIL, len(values) - 1)
    lowest = np.sort(values)[: count + 1]
    spread = float((lowest[-1] - lowest[:-1]).mean()) if count else 0.0
    return float(lowest[-1] + spread * min(0.0, np.log(share * len(values) / max(count, 1))))


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


def merged_row(layer: Floats, features: Floats, logits: Floats, members: Sequence[int]) -> Row:
    """Return one row in place of several, whose probability is nearest to the sum of theirs.

    The exact logit, the logsumexp of theirs, is not linear. So a row is fitted to the sum of the probabilities on some
    texts, and starts from the sum of the rows. It reads the features that they read.

    Args:
        layer: the weights of all rows, [labels, features].
        features: of the texts, [texts, features].
        logits: of the texts, [texts, labels].
        members: the numbers of the labels that are merged.
    """
    others = np.delete(np.arange(logits.shape[1]), members)
    wanted = expit(logsumexp(logits[:, members], axis=1) - logsumexp(logits[:, others], axis=1))
    common = layer[others].mean(axis=0)  # a softmax does not depend on what is added to all rows
    read = layer[members].any(axis=0)
    start = ((layer[members] - common).sum(axis=0) + common)[read]
    even = np.full(len(wanted), 1 / len(wanted))
    row = fit_row(features[:, read], logits[:, others], wanted, weights=even, start=start)
    weight = np.zeros(layer.shape[1])
    weight[read] = row.weight
    return Row(weight, row.bias)
