"""Merge, rename and move the categories of a checkpoint without training it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import logsumexp

from aisle.errors import InputError
from aisle.train.categories import names
from aisle.train.categories.decisions import carried, undecided
from aisle.train.categories.measure import check_loss, metrics_of
from aisle.train.categories.prototype import Row, merged_row
from aisle.train.categories.source import (
    Change,
    Layer,
    Table,
    Texts,
    check_out,
    features,
    joined,
    layer_of,
    numbers,
    old_metrics,
    own_sample,
    prototypes_after,
    read_texts,
    relabelled,
    relabelled_sample,
    write_changed,
)
from aisle.train.core.checkpoint import Checkpoint
from aisle.train.core.decision_fit import fit_decisions
from aisle.train.core.decisions import Decisions, Floats

ADVICE = "give the training table with --data, or keep the categories and map them in what reads the answers"


def rename(checkpoint: Path, old: str, new: str, out: Path, *, overwrite: bool = False) -> dict[str, Any]:
    """Give a category another name. The model and its answers stay as they are.

    Raises:
        InputError: there is no such category, or the new name cannot be used.
    """
    check_out(checkpoint, out, overwrite)
    source = Checkpoint(checkpoint)
    source.check_one_category("aisle category")
    names.check_known(old, source.labels)
    return _rename(source, {old: names.checked_name(new)}, out, "rename")


def move(checkpoint: Path, old: str, new: str, out: Path, *, overwrite: bool = False) -> dict[str, Any]:
    """Move a category, or a level with all categories below it, to another path.

    Raises:
        InputError: there is nothing at the old path, or a new name cannot be used.
    """
    check_out(checkpoint, out, overwrite)
    source = Checkpoint(checkpoint)
    source.check_one_category("aisle category")
    path = names.checked_name(new)
    moved = names.below_path(old, source.labels)
    if not moved:
        raise names.unknown(old, {*source.labels, *names.upper_paths(source.labels)})
    return _rename(source, {label: path + label[len(old) :] for label in moved}, out, "move")


def _rename(source: Checkpoint, changes: dict[str, str], out: Path, command: str) -> dict[str, Any]:
    changes = {old: new for old, new in changes.items() if old != new}
    if not changes:
        raise InputError("the new name is the old one; nothing to do")
    _check_names(source, changes)
    change = Change(changes, details={"command": command, "names": changes})
    decisions, labels = source.decisions, change.labels(source.labels)
    lost: list[str] = []
    if decisions:
        made = carried(decisions, undecided(decisions, labels), [frozenset([i]) for i in range(len(labels))])
        lost = _undecided_levels(decisions, made)
        decisions = made
    write_changed(
        source,
        change,
        out,
        texts=relabelled_sample(own_sample(source), changes),
        examples=relabelled(source.examples, changes),
        decisions=decisions,
        metrics=old_metrics(source, changes),
    )
    note = f"no text is decided at the level {', '.join(map(repr, lost))} until thresholds are fitted: aisle decide"
    return {
        "checkpoint": str(out),
        "made_of": str(source.folder),
        "renamed": changes,
        "notes": [note] if lost else [],
    }


def _undecided_levels(old: Decisions, new: Decisions) -> list[str]:
    """Return the upper levels that hold other labels than before, and so lost their thresholds."""
    if not any(each.threshold is not None for level in old.levels[1:] for each in level):
        return []
    labels = set(new.labels)
    return [
        each.name
        for level in new.levels[1:]
        for each in level
        if each.threshold is None and each.rows == 0 and each.name not in labels
    ]


def _check_names(source: Checkpoint, changes: names.Changes) -> None:
    """Check that the new names fit beside the other categories and the training table.

    Raises:
        InputError: one does not.
    """
    others = [label for label in source.labels if label not in changes]
    for name in dict.fromkeys(changes.values()):
        names.check_free(name, others)
    names.labelling_after(source.labelling, source.training.get("data", {}).get("cleaning", {}), changes)


def merge(
    checkpoint: Path,
    merged: Sequence[str],
    into: str,
    out: Path,
    *,
    table: Table | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Merge several categories into one, which may have the name of one of them.

    The probability of the merged category should be the sum of theirs. One row of the output layer cannot give it
    exactly, so it is fitted to it; held-out texts measure the agreement.

    Args:
        table: the training table, for more texts than the checkpoint's sample has.

    Returns:
        `held_out`: the accuracy with the sum of the probabilities (`before`) and with the new row, and in how many of
        these texts both give the same category (`agreement`); and `notes`.

    Raises:
        InputError: a category is unknown, fewer than two would be left, the name cannot be used, or the new row loses
            more than 0.2 points of accuracy.
    """
    check_out(checkpoint, out, overwrite)
    source = Checkpoint(checkpoint)
    source.check_one_category("aisle category")
    for each in merged:
        names.check_known(each, source.labels)
    changes = dict.fromkeys(merged, names.checked_name(into))
    labels = names.changed(source.labels, changes)
    if len(changes) < 2:
        raise InputError(f"only {merged[0]!r} is named; name two categories or more, or see: aisle category rename")
    if len(labels) < 2:
        raise InputError("all categories would become one, which no model can tell apart; leave one out")
    _check_names(source, changes)
    texts = read_texts(source, table)
    merging = _Merging(source, changes, labels, texts)
    details = {"command": "merge", "names": changes, "measured": (result := merging.measure())}
    write_changed(
        source,
        Change(changes, layer=merging.after, details=details),
        out,
        texts=relabelled_sample(texts.sample, changes),
        examples=relabelled(source.examples, changes),
        decisions=merging.decisions,
        metrics=metrics_of(labels, relabelled(texts.held_out, changes).labels, merging.logits),
    )
    return {
        "checkpoint": str(out),
        "made_of": str(checkpoint),
        "merged": [*merged],
        "into": changes[merged[0]],
        **result,
    }


class _Merging:
    """One row in place of several, and how near it comes to the sum of their probabilities."""

    def __init__(self, source: Checkpoint, changes: names.Changes, labels: Sequence[str], texts: Texts) -> None:
        """Fit the row."""
        self.source = source
        self.labels = labels
        self.prototypes = prototypes_after(source, changes)
        self.members = [number for number, label in enumerate(source.labels) if label in changes]
        self.texts = [relabelled(part, changes) for part in texts[:3]]
        head = layer_of(source)
        fitted_on = features(source, joined(texts.train, texts.validation).texts, "reading the texts")
        row = merged_row(head.weight, fitted_on, head.logits(fitted_on), self.members)
        self.after = self._merged_layer(head, row)
        self.validation = self.after.logits(fitted_on[len(texts.train.texts) :])
        measured_on = features(source, texts.held_out.texts, "reading the texts")
        self.before = head.logits(measured_on)
        self.logits = self.after.logits(measured_on)

    def _merged_layer(self, head: Layer, row: Row) -> Layer:
        return Layer(self._merged(head.weight.T, row.weight).T, self._merged(head.bias[None], row.bias)[0])

    def _merged(self, columns: Floats, own: Floats | float) -> Floats:
        """Return columns [rows, labels] in which one column takes the place of the merged ones."""
        return np.insert(np.delete(columns, self.members, axis=1), self.members[0], own, axis=1)

    def measure(self) -> dict[str, Any]:
        """Return how the row compares with the sum of the probabilities on held-out texts.

        Raises:
            InputError: it loses too much accuracy.
        """
        exact = self._merged(self.before, logsumexp(self.before[:, self.members], axis=1))
        actual = numbers(self.labels, self.texts[2])
        name = self.labels[self.members[0]]
        loss = check_loss(name, self.labels, actual, exact, self.logits, ADVICE)
        agreement = float((exact.argmax(axis=1) == self.logits.argmax(axis=1)).mean())
        note = f"the merged row gives the category of the summed probabilities for {agreement:.2%} of held-out texts"
        return {"held_out": {**loss, "agreement": agreement}, "notes": [note]}

    @property
    def decisions(self) -> Decisions | None:
        """The decisions: thresholds of other categories stay, that of the merged one is fitted on validation texts."""
        old = self.source.decisions
        if old is None:
            return None
        actual = numbers(self.labels, self.texts[1])
        made = fit_decisions(self.validation, actual, self.labels, old.targets, alone=self.prototypes)
        kept = [frozenset([number]) for number in range(len(self.source.labels)) if number not in self.members]
        kept.insert(self.members[0], frozenset(self.members))
        return carried(old, made, kept)
