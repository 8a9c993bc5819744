"""The deletion check: do the words that an explanation names decide, or would any others do as well?

A text's words are left out in the order of their weights, the heaviest first, and the category's probability is watched
as it falls (deletion curves: Petsiuk et al. 2018). The same number of random words is the measure.
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

from aisle.client import Prediction
from aisle.errors import InputError
from aisle.preprocess.clean import TextError, content_key, prepare
from aisle.preprocess.encode import Encoder
from aisle.preprocess.table import column, read_rows
from aisle.train.data import is_held_out
from aisle.train.explain import Checkpoint, Floats, Judge, Reading, attribute, explanations, judging, read

SHARES = tuple(tenth / 10 for tenth in range(10))  # of the words, left out; without all of them nothing can be asked
REMOVED = 0.2  # the share that the fall is told for
LEAST_WORDS = 5  # of a text, so that REMOVED is one word or more
DRAWS = 5  # random orders of each text
EXAMPLES = 10  # explanations that the report shows
RANDOM = "random"
Orders = list[list[int]]  # of each text: its words, in the order in which they are left out


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
    """Leave out the words that explanations name, and as many random ones, in `rows` texts that training held out.

    With `url`, the server judges, and occlusion is checked beside integrated gradients. `report` is the HTML page to
    write.

    Raises:
        InputError: no text can be used, the checkpoint is none, or it is not the server's.
        ServerError: the server failed.
    """
    model = Checkpoint(checkpoint)
    readings, skipped = held_out(data, text_column, model.encoder, rows, seed)
    with judging(model, url) as judge:
        answers, weights, attributions = attribute(readings, model, judge)
        shuffler = random.Random(seed)
        orders = {
            method: [[np.argsort(-np.array(each), kind="stable").tolist() for each in of_texts]]
            for method, of_texts in weights.items()
        }
        orders[RANDOM] = [
            [shuffler.sample(range(len(reading.words)), len(reading.words)) for reading in readings]
            for _ in range(DRAWS)
        ]
        curves, changed = delete(judge, readings, answers, orders)
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
        "confidence": float(np.mean([answer.confidence for answer in answers])),
        "methods": [summary(method, curves, changed) for method in orders],
        "completeness": {"mean_gap": float(np.mean(gaps)), "largest_gap": max(gaps)},
        "examples": explanations(
            readings[:EXAMPLES],
            answers[:EXAMPLES],
            {method: of_texts[:EXAMPLES] for method, of_texts in weights.items()},
            attributions[:EXAMPLES],
        ),
    }
    if report:
        from aisle.train.explanation_report import write_check

        write_check(result, report)
    return result


def held_out(
    data: Path, text_column: str, encoder: Encoder, rows: int, seed: int
) -> tuple[list[Reading], Counter[str]]:
    """Draw texts that training held out, no two of equal content; and count what was passed over, by reason.

    Raises:
        InputError: there is none of LEAST_WORDS words or more.
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
        reading = read(text, encoder)
        if len(reading.words) < LEAST_WORDS:
            skipped["too short"] += 1
            continue
        readings.append(reading)
        if len(readings) == rows:
            break
    if not readings:
        raise InputError(
            f"{data}: no text of {LEAST_WORDS} words or more among those that training holds out; add rows"
        )
    return readings, skipped


def delete(
    judge: Judge, readings: Sequence[Reading], answers: Sequence[Prediction], orders: dict[str, list[Orders]]
) -> tuple[dict[str, Floats], dict[str, Floats]]:
    """Leave out each of SHARES in each order.

    Returns, for each method, the category's probability [texts, shares] and how often it is no longer the first
    [texts, shares], both the mean over the method's orders.
    """
    texts, categories = [], []
    for each in orders.values():
        for of_texts in each:
            for reading, answer, order in zip(readings, answers, of_texts, strict=True):
                texts += [reading.without(order[: how_many(share, len(order))]) for share in SHARES]
                categories += [answer.category] * len(SHARES)
    asked = judge.ask(texts, categories, "deleting words")
    shape = (-1, len(readings), len(SHARES))
    owner = np.repeat(list(orders), [len(each) for each in orders.values()])
    probability, changed = asked.probability.reshape(shape), ~asked.kept.reshape(shape)
    return (
        {method: probability[owner == method].mean(axis=0) for method in orders},
        {method: changed[owner == method].mean(axis=0) for method in orders},
    )


def how_many(share: float, words: int) -> int:
    """Return how many words a share is: one at least, but for the share of nothing, and never all."""
    return min(max(round(share * words), 1), words - 1) if share else 0


def summary(method: str, curves: dict[str, Floats], changed: dict[str, npt.NDArray[Any]]) -> dict[str, Any]:
    """Return a method's figures.

    `fall` is the mean fall of the probability when REMOVED of the words are left out, `error` its standard error over
    the texts, `changed` the share of texts that then get another category, `area` that under the deletion curve, as the
    mean probability over all shares: the smaller, the better the words were chosen.
    """
    at = SHARES.index(REMOVED)
    curve = curves[method]
    fall = curve[:, 0] - curve[:, at]
    return {
        "method": method,
        "fall": float(fall.mean()),
        "error": float(fall.std(ddof=1) / math.sqrt(len(fall))) if len(fall) > 1 else None,
        "changed": float(changed[method][:, at].mean()),
        "area": float(np.trapz(curve.mean(axis=0), SHARES) / SHARES[-1]),
        "curve": curve.mean(axis=0).tolist(),
    }
