"""Fit the decisions of a checkpoint again, to other targets or on other texts, without training."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from aisle.console import say
from aisle.errors import InputError
from aisle.preprocess.clean import LabelledTexts, clean_rows
from aisle.preprocess.encode import TextTokenizer
from aisle.preprocess.tables.table import read_labelled
from aisle.train.core.checkpoint import Checkpoint
from aisle.train.core.decision_fit import fit_decisions
from aisle.train.core.decisions import Decisions
from aisle.train.core.predict import logits_of
from aisle.train.core.settings import DecisionTargets
from aisle.train.core.split import is_learnt, split


def decide(
    checkpoint: Checkpoint,
    data: Path | None,
    text_column: str,
    label_column: str,
    targets: DecisionTargets,
    *,
    untrained: bool = False,
) -> Decisions:
    """Return decisions for a checkpoint, fitted on texts that training did not learn from.

    Args:
        data: a table with the texts; by default the validation part of the checkpoint's sample.
        untrained: the checkpoint was not trained on this table. Then all its texts are used except the held-out fifth,
            which `evaluate --held-out` measures; otherwise only those that training takes for validation.

    Raises:
        InputError: the table cannot be read, or no text is left.
    """
    checkpoint.check_one_category("aisle decide")
    table = _labelled(checkpoint, data, text_column, label_column, untrained) if data else checkpoint.sample.validation
    if not table.texts:
        raise InputError(
            f"{data or checkpoint.folder}: no text is left to fit decisions on; give a table with more rows"
        )
    model, tokenizer, labels = checkpoint.model, checkpoint.tokenizer, checkpoint.labels
    return fit_on_texts(model, tokenizer, labels, table, targets, alone=checkpoint.prototypes)


def fit_on_texts(
    model: Any,
    tokenizer: TextTokenizer,
    labels: list[str],
    table: LabelledTexts,
    targets: DecisionTargets,
    *,
    alone: Collection[str] = (),
) -> Decisions:
    """Return decisions fitted on cleaned texts, whose categories the model knows; `alone` as in `fit_decisions`."""
    number = {label: i for i, label in enumerate(labels)}
    logits = logits_of(model, tokenizer.tokens(table.texts), "fitting decisions")
    return fit_decisions(logits, np.array([number[label] for label in table.labels]), labels, targets, alone=alone)


def _labelled(
    checkpoint: Checkpoint, data: Path, text_column: str, label_column: str, untrained: bool
) -> LabelledTexts:
    """Return the usable texts of a table with their categories."""
    checkpoint.check_fields(text_column)
    raw = read_labelled(data, text_column, label_column)
    table, _ = clean_rows(raw, checkpoint.labelling, learnable=is_learnt)
    if not untrained:
        try:
            table = split(table).validation
        except InputError:
            raise InputError(
                f"{data} cannot be the table that the checkpoint was trained on; give that one, or --untrained"
            ) from None
    rows = [each for each in zip(table.texts, table.labels, strict=True) if is_learnt(each[0])]
    known = set(checkpoint.labels)
    kept = [(text, label) for text, label in rows if label in known]
    if len(kept) < len(rows):
        say(f"{len(rows) - len(kept)} rows with categories that the checkpoint does not know are left out")
    return LabelledTexts([text for text, _ in kept], [label for _, label in kept])
