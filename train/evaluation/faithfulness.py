"""The deletion check: are explanations faithful to the model?

A text's words are deleted in the order of their weights, the largest first, and the category's probability is measured
(deletion curves: Petsiuk et al. 2018). The baseline deletes the same number of random words.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.integrate import trapezoid

from aisle.client import Prediction
from aisle.errors import InputError
from aisle.preprocess.clean import content_key, prepare
from aisle.preprocess.encode import TextTokenizer
from aisle.preprocess.tables.table import column, read_rows
from aisle.preprocess.values import TextError
from aisle.train.core.checkpoint import Checkpoint
from aisle.train.core.split import is_held_out
from aisle.train.evaluation.attribution import Reading, Weights, attribute, read
from aisle.train.evaluation.explain import explanations
from aisle.train.evaluation.predictors import CheckpointPredictor, Floats, Predictor, open_predictor

SHARES = tuple(tenth / 10 for tenth in range(10))  # of deleted words; never all, because an empty text is refused
REMOVED = 0.2  # the share of deleted words for which the drop is reported
LEAST_WORDS = 5  # in a text, so that REMOVED is at least one word
DRAWS = 5  # random orders of each text
EXAMPLES = 10  # explanations in the report
RANDOM = "random"
Orders = list[list[int]]  # for each text, its words in the order of deletion


def check(
    data: Path,
    text_column: str,
    *,
    checkpoint: Path,
    url: str = "",
    rows: int,
    seed: int = 0,
    report: Path | None = None,
) -> dict[str, Any]:
    """In `rows` held-out texts, delete the words with the largest weights, and compare with deleting random words.

    With `url`, the server classifies, and occlusion is checked too. `report` is the HTML page to write.

    Raises:
        InputError: no text can be used, `checkpoint` is not a checkpoint, or the server's model is another one.
        ServerError: the server failed.
    """
    source = Checkpoint(checkpoint)
    source.check_one_category("aisle explain")
    source.check_fields(text_column)
    local = CheckpointPredictor(source)
    readings, skipped = held_out(data, text_column, local.tokenizer, rows, seed)
    with open_predictor(local, url) as predictor:
        predictions, weights, attributions = attribute(readings, local, predictor)
        orders = _orders(readings, weights, seed)
        curves, changed = delete(predictor, readings, predictions, orders)
    gaps = [abs(attribution.gap) for attribution in attributions]
    result = {
        "checkpoint": str(checkpoint),
        "url": url or None,
        "judge": url or str(checkpoint),
        "data": str(data),
        "texts": len(readings),
        "skipped": dict(skipped),
        "seed": seed,
        "draws": DRAWS,
        "removed": REMOVED,
        "shares": SHARES,
        "confidence": float(np.mean([prediction.confidence for prediction in predictions])),
        "methods": [summary(method, curves, changed) for method in orders],
        "completeness": {"mean_gap": float(np.mean(gaps)), "largest_gap": max(gaps)},
        "examples": explanations(
            readings[:EXAMPLES],
            predictions[:EXAMPLES],
            {method: of_texts[:EXAMPLES] for method, of_texts in weights.items()},
            attributions[:EXAMPLES],
        ),
    }
    if report:
        from aisle.train.evaluation.explanation_report import write_check

        write_check(result, report)
    return result


def _orders(readings: Sequence[Reading], weights: dict[str, Weights], seed: int) -> dict[str, list[Orders]]:
    """Return the orders of deletion: one for each method, and DRAWS random ones."""
    shuffler = random.Random(seed)
    orders = {
        method: [[np.argsort(-np.array(each), kind="stable").tolist() for each in of_texts]]
        for method, of_texts in weights.items()
    }
    orders[RANDOM] = [
        [shuffler.sample(range(len(reading.words)), len(reading.words)) for reading in readings] for _ in range(DRAWS)
    ]
    return orders


def held_out(
    data: Path, text_column: str, tokenizer: TextTokenizer, rows: int, seed: int
) -> tuple[list[Reading], Counter[str]]:
    """Draw held-out texts without duplicates, and count the skipped ones by reason.

    Raises:
        InputError: none has LEAST_WORDS words or more.
    """
    skipped: Counter[str] = Counter()
    texts: dict[bytes, str] = {}
    for (raw,) in column(read_rows(data), [text_column], data):
        try:
            text = prepare(raw)
        except TextError as error:
            skipped[error.reason] += 1
            continue
        if is_held_out(text):
            texts.setdefault(content_key(text), text)
    readings: list[Reading] = []
    for text in random.Random(seed).sample(list(texts.values()), len(texts)):
        reading = read(text, tokenizer)
        if len(reading.words) < LEAST_WORDS:
            skipped["too short"] += 1
            continue
        readings.append(reading)
        if len(readings) == rows:
            break
    if not readings:
        raise InputError(f"{data}: no text that training holds out has {LEAST_WORDS} words or more; add rows")
    return readings, skipped


def delete(
    predictor: Predictor,
    readings: Sequence[Reading],
    predictions: Sequence[Prediction],
    orders: dict[str, list[Orders]],
) -> tuple[dict[str, Floats], dict[str, Floats]]:
    """Delete each of SHARES in each order.

    Returns, for each method, the category's probability and how often it is no longer the top category, both
    [texts, shares] and averaged over the method's orders.
    """
    texts, categories = [], []
    for each in orders.values():
        for of_texts in each:
            for reading, prediction, order in zip(readings, predictions, of_texts, strict=True):
                texts += [reading.without(order[: how_many(share, len(order))]) for share in SHARES]
                categories += [prediction.category] * len(SHARES)
    scores = predictor.score(texts, categories, "deleting words")
    shape = (-1, len(readings), len(SHARES))
    owner = np.repeat(list(orders), [len(each) for each in orders.values()])
    probability, changed = scores.probability.reshape(shape), ~scores.is_top.reshape(shape)
    return (
        {method: probability[owner == method].mean(axis=0) for method in orders},
        {method: changed[owner == method].mean(axis=0) for method in orders},
    )


def how_many(share: float, words: int) -> int:
    """Return the number of words in a share: 0 for a share of 0, otherwise at least one and never all."""
    return min(max(round(share * words), 1), words - 1) if share else 0


def summary(method: str, curves: dict[str, Floats], changed: dict[str, npt.NDArray[Any]]) -> dict[str, Any]:
    """Return a method's figures.

    `fall` is the mean drop of the probability when REMOVED of the words are deleted, `error` its standard error over
    the texts, `changed` the share of texts that then get another category. `area` is the area under the deletion curve,
    which is the mean probability over all shares: the smaller, the better the choice of words.
    """
    at = SHARES.index(REMOVED)
    curve = curves[method]
    fall = curve[:, 0] - curve[:, at]
    return {
        "method": method,
        "fall": float(fall.mean()),
        "error": float(fall.std(ddof=1) / math.sqrt(len(fall))) if len(fall) > 1 else None,
        "changed": float(changed[method][:, at].mean()),
        "area": float(trapezoid(curve.mean(axis=0), SHARES) / SHARES[-1]),
        "curve": curve.mean(axis=0).tolist(),
    }
