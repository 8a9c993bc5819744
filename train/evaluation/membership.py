"""Membership inference: how well the loss tells the texts that a checkpoint was trained on from others.

Yeom et al. 2018, arXiv:1709.01604: a text with a low loss is taken for a member. The held-out fifth of the same table
has no member, and a hash of the text drew it, so that nothing else distinguishes the two.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.metrics import roc_auc_score, roc_curve

from aisle.errors import InputError
from aisle.preprocess.clean import LabelledTexts, clean_rows
from aisle.preprocess.tables.table import fingerprint, read_labelled
from aisle.train.core.calibration import softmax
from aisle.train.core.checkpoint import Checkpoint
from aisle.train.core.predict import logits_of
from aisle.train.core.split import is_learnt, split

FALSE_ALARMS = 0.01  # share of the others that are taken for members, where the members that are found are counted


def measure_membership(source: Checkpoint, data: Path, text_column: str, label_column: str) -> dict[str, Any]:
    """Attack a checkpoint with the table that it was trained on.

    Returns `auc`: the probability that a member has a lower loss than another text, 0.5 for a coin; and
    `found`: the share of the members that are found if 1 % of the others are taken for members (Carlini et al. 2022,
    arXiv:2112.03570).

    Raises:
        InputError: it was trained on another table, or does not give one category.
    """
    source.check_one_category("--membership")
    if source.training.get("data", {}).get("sha256") != fingerprint(data):
        raise InputError(
            f"--membership: {source.folder} was not trained on {data}; give the table that it was trained on"
        )
    table, _ = clean_rows(read_labelled(data, text_column, label_column), source.labelling, learnable=is_learnt)
    parts = split(table)
    members, others = (_losses(source, part) for part in (parts.train, parts.held_out))
    is_member = np.repeat([1, 0], [len(members), len(others)])
    closeness = -np.concatenate([members, others])
    alarms, found, _ = roc_curve(is_member, closeness)
    return {
        "auc": float(roc_auc_score(is_member, closeness)),
        "found": float(found[alarms <= FALSE_ALARMS].max()),
        "members": len(members),
        "others": len(others),
        "loss_of_members": float(members.mean()),
        "loss_of_others": float(others.mean()),
    }


def _losses(source: Checkpoint, part: LabelledTexts) -> npt.NDArray[np.float64]:
    """Return the cross-entropy of each text, [texts]."""
    number = {name: i for i, name in enumerate(source.labels)}
    wanted = [number[label] for label in part.labels]
    logits = logits_of(source.model, source.tokenizer.tokens(part.texts), "attacking").astype(np.float64)
    losses: npt.NDArray[np.float64] = -np.log(np.maximum(softmax(logits)[np.arange(len(wanted)), wanted], 1e-300))
    return losses
