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

from aisle.client import Classifier, Failure
from aisle.console import track
from aisle.errors import InputError
from aisle.preprocess.clean import TextError, clean, prepare
from aisle.preprocess.encode import Encoder
from aisle.preprocess.table import read_labelled
from aisle.train.checkpoint import load_model, read_labels
from aisle.train.data import is_held_out
from aisle.train.metrics import score

Predict = Callable[[Sequence[str]], list[str]]


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
) -> dict[str, Any]:
    """Score the predictions of a checkpoint or, with `url`, of a server.

    Rows without a label or whose text cannot be classified are skipped and counted. With `held_out`, only the rows that
    `aisle train` keeps away from training count.

    Raises:
        InputError: nothing is left to score, or a label is unknown to the checkpoint.
        ServerError: the server failed.
    """
    texts, labels, skipped = read_scorable(data, text_column, label_column, held_out)
    predict = _checkpoint_predictor(checkpoint, labels) if checkpoint else _server_predictor(url)
    start = time.perf_counter()
    predicted = predict(texts)
    seconds = time.perf_counter() - start
    result = score(labels, predicted)
    return {
        **result,
        "rows": len(texts),
        "skipped": dict(skipped),
        "seconds": round(seconds, 3),
        "texts_per_second": round(len(texts) / seconds, 1),
    }


def read_scorable(
    data: Path, text_column: str, label_column: str, held_out: bool
) -> tuple[list[str], list[str], Counter[str]]:
    """Return raw texts, cleaned labels and how many rows were skipped, by reason."""
    texts: list[str] = []
    labels: list[str] = []
    skipped: Counter[str] = Counter()
    for raw, raw_label in read_labelled(data, text_column, label_column):
        try:
            text = prepare(raw)
        except TextError as error:
            skipped[error.reason] += 1
            continue
        label = clean(raw_label or "")
        if not label:
            skipped["label missing"] += 1
        elif not held_out or is_held_out(text):
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

    def predict(texts: Sequence[str]) -> list[str]:
        tokens = encoder.tokens([prepare(text) for text in texts])
        return [names[i] for i in logits_of(model, tokens, "evaluating").argmax(axis=1)]

    return predict


def _server_predictor(url: str) -> Predict:
    def predict(texts: Sequence[str]) -> list[str]:
        with Classifier(url) as classifier:
            answers = list(track(classifier.stream(texts), "evaluating", total=len(texts)))
        return ["" if isinstance(answer, Failure) else answer.category for answer in answers]

    return predict
