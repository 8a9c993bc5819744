"""Training of further heads: the cross-entropies of the attributes are added to that of the category.

A text without a value takes no part in the loss of that head. The gradients of all heads reach the same encoder
(Caruana 1997, "Multitask Learning").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from aisle.console import say
from aisle.train.core.calibration import fit_temperature
from aisle.train.core.checkpoint import Checkpoint
from aisle.train.core.head_data import NONE, HeadData
from aisle.train.core.head_rows import NAME, add_rows, kept_rows, new_rows
from aisle.train.core.heads import FILE, spans
from aisle.train.core.metrics import score
from aisle.train.core.settings import TrainingSettings
from aisle.train.fit.loss import Loss, RowLoss

WEIGHT = 0.5  # of each attribute in the loss and in the score; the category's is 1
Logits = npt.NDArray[np.float32]


class LossOfAll:
    """Loss of each row, from logits [rows, categories + values] and targets [rows, 1 + heads]."""

    def __init__(self, category: RowLoss, heads: Sequence[RowLoss], places: Sequence[slice]) -> None:
        """`places` are the logits of each head; those of the categories come before them."""
        self.category, self.heads, self.places = category, heads, places

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        loss = self.category(logits[:, : self.places[0].start], targets[:, 0])
        for head, place, numbers in zip(self.heads, self.places, targets[:, 1:].T, strict=True):
            own = head(logits[:, place], numbers.clamp(min=0))
            loss = loss + WEIGHT * own.where(numbers != NONE, 0.0)
        return loss

    def divergence(self, logits: Tensor, expected: Tensor) -> Tensor:
        """Return the sum of the rows' divergences from other logits, both [rows, categories + values]."""
        first = slice(0, self.places[0].start)
        total = self.category.divergence(logits[:, first], expected[:, first])
        for head, place in zip(self.heads, self.places, strict=True):
            total = total + WEIGHT * head.divergence(logits[:, place], expected[:, place])
        return total


def targets_of(heads: Sequence[HeadData], categories: npt.NDArray[Any], texts: Sequence[str]) -> npt.NDArray[np.int64]:
    """Return the numbers of the category and of each attribute, [texts, 1 + heads], given those of the category."""
    return np.column_stack([categories, *(each.numbers(texts) for each in heads)]).astype(np.int64)


def loss_of_all(
    category: RowLoss, heads: Sequence[HeadData], categories: int, targets: Tensor, settings: TrainingSettings
) -> LossOfAll:
    """Return the loss of all heads. The options of the loss count for each, except those of levels.

    Args:
        targets: of the whole training part, [rows, 1 + heads].
    """
    own = replace(settings, level_weight=0.0)
    losses = [
        Loss(each.head.labels, numbers[numbers != NONE], own, targets.device)
        for each, numbers in zip(heads, targets[:, 1:].T, strict=True)
    ]
    return LossOfAll(category, losses, spans(categories, [each.head for each in heads]))


def add_heads(model: Any, heads: Sequence[HeadData], source: str) -> Any:
    """Give a model the rows of further heads. From a checkpoint, they keep the rows of values that both have.

    Args:
        source: the name or folder of the model.
    """
    folder = Path(source)
    old = Checkpoint(folder).head_rows if (folder / FILE).is_file() else None
    if not heads:
        if old:
            names = " ".join(f"--also {head.name}" for head in old.heads)
            say(f"the further heads of {source} are left out; give {names} to train them")
        return model
    rows = new_rows(model, tuple(each.head for each in heads))
    return add_rows(model, kept_rows(rows, old) if old else rows)


def accuracies(heads: Sequence[HeadData], logits: Logits, targets: npt.NDArray[Any]) -> dict[str, float]:
    """Return the accuracy of each attribute on the texts that have a value; without such a text it is left out."""
    found = {}
    categories = logits.shape[1] - sum(len(each.head.labels) for each in heads)
    for each, place, numbers in zip(heads, spans(categories, [h.head for h in heads]), targets[:, 1:].T, strict=True):
        known = numbers != NONE
        if known.any():
            found[each.head.name] = float((logits[known, place].argmax(axis=1) == numbers[known]).mean())
    return found


def score_of_all(category: float, attributes: dict[str, float]) -> float:
    """Return the mean of the accuracies, weighted as the losses are."""
    return (category + WEIGHT * sum(attributes.values())) / (1 + WEIGHT * len(attributes))


def temperatures(
    heads: Sequence[HeadData], logits: Logits, targets: npt.NDArray[Any]
) -> list[tuple[str, slice, float]]:
    """Return each head's name, its logits, and the temperature that calibrates them on the texts that have a value.

    Args:
        logits: of the heads alone, [texts, values].
        targets: [texts, 1 + heads].
    """
    places = spans(0, [each.head for each in heads])
    return [
        (each.head.name, place, fit_temperature(logits[numbers != NONE, place], numbers[numbers != NONE]))
        for each, place, numbers in zip(heads, places, targets[:, 1:].T, strict=True)
    ]


def calibrate_heads(model: Any, found: Sequence[tuple[str, slice, float]]) -> dict[str, float]:
    """Put the temperatures of `temperatures` into the weights of a model's heads; return them by name."""
    layer = getattr(model, NAME)
    with torch.no_grad():
        for _, place, temperature in found:
            layer.weight[place] /= temperature
            layer.bias[place] /= temperature
    return {name: temperature for name, _, temperature in found}


def measure_heads(heads: Sequence[HeadData], logits: Logits, categories: int, texts: Sequence[str]) -> dict[str, Any]:
    """Return the scores of each attribute on the texts that have a value, and the number of these; None without any."""
    found: dict[str, Any] = {}
    for each, place in zip(heads, spans(categories, [each.head for each in heads]), strict=True):
        numbers = np.array(each.numbers(texts))
        known = numbers != NONE
        best = logits[known, place].argmax(axis=1)
        named = [[each.head.labels[i] for i in own] for own in (numbers[known], best)]
        found[each.head.name] = {**score(*named), "rows": int(known.sum())} if known.any() else None
    return found
