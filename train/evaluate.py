"""Evaluate a checkpoint in PyTorch, or a running server, on a labelled table: the same rows, the same figures."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from aisle.client import Classifier, Failure, InvalidText, Prediction
from aisle.console import track
from aisle.errors import InputError
from aisle.preprocess.clean import TextError, prepare, prepare_label
from aisle.preprocess.encode import Encoder
from aisle.preprocess.table import read_labelled
from aisle.train import metrics
from aisle.train.calibrate import calibration, softmax
from aisle.train.checkpoint import load_model, read_labels
from aisle.train.data import is_held_out

TOP_K = 5  # categories of a text that are measured
Predict = Callable[[Sequence[str]], list[Prediction | Failure]]


def logits_of(model: Any, tokens: Sequence[Sequence[int]], description: str) -> npt.NDArray[np.float32]:
    """Return logits [texts, labels] in fp32, texts of like length together."""
    order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
    batches = [order[i : i + 64] for i in range(0, len(order), 64)]
    logits = np.empty((len(tokens), model.config.num_labels), np.float32)
    with torch.inference_mode():
        for batch in track(batches, description):
            input_ids, attention_mask = pad([tokens[i] for i in batch])
            output = model(input_ids=input_ids.to(model.device), attention_mask=attention_mask.to(model.device))
            logits[batch] = output.logits.float().cpu().numpy()
    return logits


def pad(tokens: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `input_ids` and `attention_mask`, both [texts, longest]."""
    input_ids = torch.zeros(len(tokens), max(map(len, tokens)), dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(tokens):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        attention_mask[row, : len(ids)] = 1
    return input_ids, attention_mask


def evaluate(
    data: Path,
    text_column: str,
    label_column: str,
    *,
    checkpoint: Path | None = None,
    url: str = "",
    held_out: bool,
    baselines: Path | None = None,
    report: Path | None = None,
) -> dict[str, Any]:
    """Measure what a checkpoint or, with `url`, a server says of a labelled table.

    Rows without a label or whose text cannot be classified are skipped and counted. With `held_out`, only the rows that
    `aisle train` keeps away from training count. `baselines` is the table on whose training part the baselines are
    fitted; `report` is the HTML page to write.

    Raises:
        InputError: nothing is left to score, or a label is unknown to the checkpoint.
        ServerError: the server failed.
    """
    texts, labels, skipped = read_scorable(data, text_column, label_column, held_out)
    predict = _checkpoint_predictor(checkpoint, labels) if checkpoint else _server_predictor(url)
    start = time.perf_counter()
    answers = predict(texts)
    seconds = time.perf_counter() - start
    prepared = [prepare(text) for text in texts]  # without personal data: what is shown may travel
    result = {
        "evaluated": str(checkpoint or url),
        "data": str(data),
        "held_out": held_out,
        "rows": len(texts),
        "skipped": dict(skipped),
        "seconds": round(seconds, 3),
        "texts_per_second": round(len(texts) / seconds, 1),
        **measure(prepared, labels, answers),
    }
    if baselines:
        from aisle.train.baselines import compare

        predicted = [_first(answer) for answer in answers]
        result["baselines"] = compare(baselines, text_column, label_column, prepared, labels, predicted)
    if report:
        from aisle.train.evaluation_report import write_report

        write_report(result, report)
    return result


def measure(texts: Sequence[str], labels: Sequence[str], answers: Sequence[Prediction | Failure]) -> dict[str, Any]:
    """Return all figures that follow from the answers, whoever gave them.

    A text that was refused counts as an error of no confidence; calibration leaves it out.

    Raises:
        InputError: every text was refused.
    """
    given = [(label, each) for label, each in zip(labels, answers, strict=True) if isinstance(each, Prediction)]
    refusals = [each.message for each in answers if isinstance(each, Failure)]
    if not given:
        raise InputError(f"all {len(refusals)} texts were refused, the first with: {refusals[0]}")
    predicted = [_first(answer) for answer in answers]
    confidence = np.array([each.confidence if isinstance(each, Prediction) else 0.0 for each in answers])
    correct = np.array([label == guess for label, guess in zip(labels, predicted, strict=True)])
    return {
        **metrics.score(labels, predicted),
        "refused": len(refusals),
        "top_k": metrics.top_k(labels, [each.categories if isinstance(each, Prediction) else () for each in answers]),
        "levels": metrics.upper_levels(labels, predicted),
        "confusion": metrics.confusion(labels, predicted),
        "calibration": calibration(
            [label for label, _ in given],
            [each.categories for _, each in given],
            [each.confidences for _, each in given],
        ),
        "coverage": metrics.coverage(confidence, correct),
        "errors": metrics.errors(texts, labels, predicted, confidence),
    }


def _first(answer: Prediction | Failure) -> str:
    return answer.category if isinstance(answer, Prediction) else "(refused)"


def read_scorable(
    data: Path, text_column: str, label_column: str, held_out: bool
) -> tuple[list[str], list[str], Counter[str]]:
    """Return raw texts, cleaned labels and how many rows were skipped, by reason."""
    texts: list[str] = []
    labels: list[str] = []
    skipped: Counter[str] = Counter()
    for raw, raw_label in read_labelled(data, text_column, label_column):
        try:
            text, label = prepare(raw), prepare_label(raw_label)
        except TextError as error:
            skipped[error.reason] += 1
            continue
        if not held_out or is_held_out(text):
            texts.append(raw or "")
            labels.append(label)
    if not texts:
        raise InputError(f"{data}: no row with both a text and a label")
    return texts, labels, skipped


def _checkpoint_predictor(checkpoint: Path, labels: list[str]) -> Predict:
    names = read_labels(checkpoint)
    unknown = sorted(set(labels) - set(names))
    if unknown:
        raise InputError(f"label {unknown[0]!r} was not in the training data; correct it or train anew")
    model = load_model(checkpoint).to("cuda" if torch.cuda.is_available() else "cpu")
    encoder = Encoder(checkpoint / "tokenizer.json")

    def predict(texts: Sequence[str]) -> list[Prediction | Failure]:
        tokens = encoder.tokens([prepare(text) for text in texts])
        probabilities = softmax(logits_of(model, tokens, "evaluating"))
        best = np.argsort(-probabilities, axis=1, kind="stable")[:, :TOP_K]
        confidences = np.take_along_axis(probabilities, best, axis=1)
        return [
            Prediction(tuple(names[i] for i in row), tuple(values))
            for row, values in zip(best.tolist(), confidences.tolist(), strict=True)
        ]

    return predict


def _server_predictor(url: str) -> Predict:
    def predict(texts: Sequence[str]) -> list[Prediction | Failure]:
        with Classifier.from_environment(url) as classifier:
            answers = classifier.stream(texts, largest_top_k(classifier, TOP_K))
            return list(track(answers, "evaluating", total=len(texts)))

    return predict


def largest_top_k(classifier: Classifier, wanted: int) -> int:
    """Return `wanted`, or how many categories the server has if they are fewer: it refuses to name more."""
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
