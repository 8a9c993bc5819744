"""The task of giving texts several categories: binary cross-entropy for each category."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score
from torch import Tensor

from aisle.errors import InputError
from aisle.preprocess.clean import LabelledTexts
from aisle.preprocess.label_sets import indicators
from aisle.train.core.binary import binary_divergence
from aisle.train.core.families import output_layer
from aisle.train.core.multi_label import PROBLEM, is_multi_label, sigmoid
from aisle.train.core.predict import logits_of
from aisle.train.core.settings import TrainingSettings
from aisle.train.fit.classification import Classification
from aisle.train.fit.loop import Scalars

# Settings that are for one category per text. Each must have its default.
FOR_ONE = (
    *("class_floor", "mixup", "class_weight", "focal", "label_smoothing", "level_weight", "contrastive", "folds"),
)


def check_multi_label(settings: TrainingSettings) -> None:
    """Check that no setting is for models with one category per text.

    Raises:
        InputError: one is; the message names it.
    """
    for each in fields(settings):
        if each.name in FOR_ONE and getattr(settings, each.name) != each.default:
            option = each.name.replace("_", "-")
            raise InputError(f"--{option} is for one category per text; leave out --{option} or --multi-label")


def set_problem(model: Any, table: LabelledTexts, labels: Sequence[str]) -> None:
    """Say in the model's configuration whether texts have one category or several.

    The biases of new categories of a multi-label model start at the logit of their frequency (Lin et al. 2017,
    arXiv:1708.02002, section 3.3). Most texts lack most categories, so it would take many steps to learn this.
    """
    if not table.multi_label:
        if is_multi_label(model.config):
            model.config.problem_type = None
        return
    model.config.problem_type = PROBLEM
    shares = torch.tensor(indicators(table.labels, labels).mean(axis=0)).clamp(1e-4, 0.5)
    bias = output_layer(model).bias
    with torch.no_grad():
        bias.copy_(torch.where(bias == 0, shares.logit().to(bias.dtype), bias))


class MultiLabelLoss:
    """Loss of each row, from logits [rows, labels] and targets [rows, labels]."""

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the binary cross-entropy, summed over the categories, so that it is about as large as that of one."""
        return F.binary_cross_entropy_with_logits(logits.float(), targets.float(), reduction="none").sum(dim=1)

    def divergence(self, logits: Tensor, expected: Tensor) -> Tensor:
        """Return the sum of the rows' divergences from other logits, both [rows, labels]."""
        return binary_divergence(expected, logits).sum()


class MultiLabelClassification(Classification):
    """Binary cross-entropy over the categories, with augmentation and unknown characters."""

    def encoded(self, labels: Sequence[str], names: Sequence[str]) -> npt.NDArray[Any]:
        return indicators(labels, names)

    def make_loss(self, names: Sequence[str]) -> MultiLabelLoss:
        return MultiLabelLoss()

    def validate(self, model: Any) -> Scalars | None:
        """Return the micro-averaged average precision, which needs no threshold, as the score."""
        if not self.validation:
            return None
        logits = logits_of(model, self.validation, "validating")
        targets = self.validation_targets
        loss = MultiLabelLoss()(torch.from_numpy(logits), torch.from_numpy(targets)).mean()
        precision = average_precision_score(targets.astype(np.int8), sigmoid(logits), average="micro")
        return {"score": float(precision), "loss": float(loss)}
