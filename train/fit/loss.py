"""The classifier's loss: cross-entropy, with options for imbalanced and for hierarchical categories."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F

from aisle.errors import InputError
from aisle.preprocess.labels import SEPARATOR
from aisle.train.core.settings import TrainingSettings


class RowLoss(Protocol):
    """A loss of each row, and how far apart two predictions are."""

    def __call__(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the loss of each row, [rows], from logits [rows, labels]."""

    def divergence(self, logits: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
        """Return the sum of the rows' divergences from other logits, both [rows, labels]."""


class Loss:
    """Loss of each row, from logits [rows, labels] and targets [rows]."""

    def __init__(
        self, labels: Sequence[str], targets: torch.Tensor, settings: TrainingSettings, device: torch.device
    ) -> None:
        """`targets` [rows] are those of the whole training part; their frequencies weigh the categories."""
        self.smoothing = settings.label_smoothing
        self.focal = settings.focal
        self.level_weight = settings.level_weight
        self.weights = class_weights(targets, len(labels), settings.class_weight).to(device)
        self.levels = [level.to(device) for level in ancestors(labels)] if settings.level_weight else []

    def __call__(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = logits.float()
        loss = F.cross_entropy(logits, targets, reduction="none", label_smoothing=self.smoothing)
        if self.focal:  # Lin et al. 2017: rows that are already right count less
            right = logits.softmax(dim=1).gather(1, targets[:, None])[:, 0]
            loss = loss * (1 - right).clamp(min=1e-6) ** self.focal
        # A parent's probability is the sum of its leaves'. So one softmax over the leaves gives a loss at every level,
        # and the predictions of all levels agree.
        for level in self.levels:
            others = level != level[targets][:, None]
            parent = logits.masked_fill(others, -torch.inf).logsumexp(dim=1) - logits.logsumexp(dim=1)
            loss = loss - self.level_weight * parent
        return loss * self.weights[targets]

    def divergence(self, logits: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
        """Return the sum of the rows' Kullback-Leibler divergences from other logits, both [rows, labels]."""
        log = logits.log_softmax(dim=1), expected.log_softmax(dim=1)
        return F.kl_div(*log, reduction="sum", log_target=True)


def class_weights(targets: torch.Tensor, labels: int, exponent: float) -> torch.Tensor:
    """Return the weight of each category [labels], frequency ** -exponent; over `targets` they average 1."""
    weights = targets.bincount(minlength=labels).clamp(min=1).float() ** -exponent
    return weights / weights[targets].mean()


def check_levels(labels: Sequence[str]) -> None:
    """Check that some level above the leaves divides the categories, so that `level_weight` changes anything.

    Raises:
        InputError: none does.
    """
    if not any(1 < len(set(level.tolist())) < len(labels) for level in ancestors(labels)):
        raise InputError(
            f"--level-weight: no level groups these categories, as {labels[0]!r}; write paths as "
            f"'A{SEPARATOR}B', or leave it out"
        )


def ancestors(labels: Sequence[str]) -> list[torch.Tensor]:
    """Return, for each level above the deepest, which ancestor [labels] each category has there, as a number.

    A category that ends above a level is its own ancestor.
    """
    paths = [tuple(label.split(SEPARATOR)) for label in labels]
    levels = []
    for depth in range(1, max(map(len, paths))):
        number = {prefix: i for i, prefix in enumerate(dict.fromkeys(path[:depth] for path in paths))}
        levels.append(torch.tensor([number[path[:depth]] for path in paths]))
    return levels
