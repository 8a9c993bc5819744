"""Add a category to a checkpoint from a few examples, without training it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from aisle.console import say
from aisle.errors import InputError
from aisle.preprocess.clean import LabelledTexts, content_key, prepare
from aisle.preprocess.tables.table import column, fingerprint, read_rows
from aisle.preprocess.values import TextError
from aisle.train.categories import names
from aisle.train.categories.decisions import carried
from aisle.train.categories.measure import accepted, check_loss, metrics_of
from aisle.train.categories.prototype import Inputs, new_row
from aisle.train.categories.source import (
    Change,
    Layer,
    Table,
    Texts,
    below,
    check_out,
    features,
    joined,
    layer_of,
    numbers,
    read_texts,
    write_changed,
)
from aisle.train.core.checkpoint import Checkpoint
from aisle.train.core.decision_fit import fit_decisions
from aisle.train.core.decisions import Decisions, Floats
from aisle.train.core.sample import Sample
from aisle.train.core.split import is_held_out, is_validation

FEWEST = 5  # examples
FEWEST_LEARNT = 3  # of these, examples that are not held out
LOST = 0.001  # share of the old categories' texts that a new one may take when its bias is chosen
ADVICE = "give more or clearer examples, or the training table with --data, or retrain"
FEW_FOUND = 0.5  # if fewer examples are found, a note says so


def add(
    checkpoint: Path,
    name: str,
    examples: Path,
    out: Path,
    *,
    text_column: str = "text",
    table: Table | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Add a category from a few texts: one more row beside those of the output layer, which do not change.

    Examples that training would hold out are not learnt from here either. Cross-fitted logits choose the row's bias:
    as high as the old categories allow, if they may lose 0.1 points of accuracy. Held-out texts then measure the loss.

    Args:
        examples: a table of texts of the new category, five or more.
        table: the training table, for more texts of the old categories than the checkpoint's sample has.

    Returns:
        `examples`: how many there are, and how many are found by a row that has not seen them; `held_out`: the accuracy
        on the old categories before and after; `accepted`: which share of these texts is accepted, and its precision,
        before and after; `notes`.

    Raises:
        InputError: the name or the examples cannot be used, texts of the old categories are missing, or these lose more
            than 0.2 points of accuracy.
    """
    check_out(checkpoint, out, overwrite)
    source = Checkpoint(checkpoint)
    source.check_one_category("aisle category")
    source.check_fields(text_column)
    name = names.checked_name(name)
    names.check_free(name, source.labels)
    names.check_unused(name, source.labelling, names.parts_of(source.training.get("data", {}).get("cleaning", {})))
    given = read_examples(examples, text_column, name)
    texts = read_texts(source, table)
    _check_not_labelled(given, joined(*texts[:3]), examples)
    added = _Addition(source, name, given, texts)
    result = added.measure()
    details = {
        "command": "add",
        "category": name,
        "examples": {"file": examples.name, "sha256": fingerprint(examples), "column": text_column},
        "measured": result,
    }
    write_changed(
        source,
        Change({}, [name], added.after, details),
        out,
        texts=_with_examples(texts.sample, given),
        examples=joined(source.examples, given),
        decisions=added.decisions,
        metrics=added.metrics,
    )
    return {"checkpoint": str(out), "made_of": str(checkpoint), "category": name, **result}


def read_examples(path: Path, text_column: str, name: str) -> LabelledTexts:
    """Read the examples of a new category, cleaned. Rows that cannot be used and copies are left out.

    Raises:
        InputError: the table cannot be read, or too few different texts are left.
    """
    found: dict[bytes, str] = {}
    rows = unusable = 0
    for (raw,) in column(read_rows(path), [text_column], path):
        rows += 1
        try:
            text = prepare(raw)
        except TextError:
            unusable += 1
        else:
            found.setdefault(content_key(text), text)
    copies = rows - unusable - len(found)
    left_out = f" ({copies} copies and {unusable} unusable rows left out)" if copies or unusable else ""
    if len(found) < FEWEST:
        raise InputError(
            f"{path}: {len(found)} different text(s){left_out} are too few for a category; give {FEWEST} or more"
        )
    if left_out:
        say(f"{path}: {len(found)} different texts{left_out}")
    learnt = sum(not is_held_out(text) for text in found.values())
    if learnt < FEWEST_LEARNT:
        raise InputError(
            f"{path}: only {learnt} of {len(found)} texts can be learnt from, because the content of the others puts "
            "them into the held-out fifth; give more"
        )
    return LabelledTexts([*found.values()], [name] * len(found))


def _check_not_labelled(given: LabelledTexts, texts: LabelledTexts, path: Path) -> None:
    """Check that no example is a text of another category.

    Raises:
        InputError: one is.
    """
    label_of = {content_key(text): label for text, label in zip(texts.texts, texts.labels, strict=True)}
    both = [text for text in given.texts if content_key(text) in label_of]
    if both:
        raise InputError(
            f"{path}: {len(both)} example(s), such as {both[0]!r}, are in the training table as "
            f"{label_of[content_key(both[0])]!r}; leave them out, or correct them there: aisle retrain --corrections"
        )


def _with_examples(sample: Sample, given: LabelledTexts) -> Sample:
    """Return the sample with the examples, each in the part that its content decides."""
    parts: list[list[str]] = [[], [], []]
    for text in given.texts:
        parts[2 if is_held_out(text) else 1 if is_validation(text) else 0].append(text)
    label = given.labels[0]
    return Sample(
        *(joined(table, LabelledTexts(part, [label] * len(part))) for table, part in zip(sample, parts, strict=True))
    )


class _Addition:
    """A new row, and what it does to the texts of all categories."""

    def __init__(self, source: Checkpoint, name: str, given: LabelledTexts, texts: Texts) -> None:
        """Fit the row.

        Raises:
            InputError: the checkpoint gets none of its texts right.
        """
        self.source = source
        self.name = name
        self.labels = source.labels
        self.texts = texts
        head = layer_of(source)
        held_out = [text for text in given.texts if is_held_out(text)]
        self.learnt = _inputs(source, head, [text for text in given.texts if not is_held_out(text)])
        self.unlearnt = _inputs(source, head, held_out)
        self.old = _inputs(source, head, [*texts.train.texts, *texts.validation.texts])
        self.held_out = _inputs(source, head, texts.held_out.texts)
        self.actual = numbers(self.labels, texts.held_out)
        self.old_actual = numbers(self.labels, joined(texts.train, texts.validation))
        correct = self.old.logits.argmax(axis=1) == self.old_actual
        if not correct.any():
            raise InputError(f"{source.folder}: the checkpoint gets none of its own texts right; train it again")
        self.fitted = new_row(self.learnt, self.old, correct, LOST)
        row = np.zeros(head.weight.shape[1])
        row[below(source)] = self.fitted.row.weight
        self.after = Layer(np.vstack([head.weight, row]), np.append(head.bias, self.fitted.row.bias))

    @property
    def held_out_logits(self) -> Floats:
        """The logits [texts, labels] of the old categories' held-out texts, the new label last."""
        return _beside(self.held_out.logits, self.fitted.row.logits(self.held_out.features))

    def measure(self) -> dict[str, Any]:
        """Return what the row finds and what it takes from the old categories.

        Raises:
            InputError: it takes too much.
        """
        found = {
            "learnt": len(self.learnt.features),
            "learnt_found": _count_above(self.fitted.examples, self.learnt.logits),
            "held_out": len(self.unlearnt.features),
            "held_out_found": _count_above(self.fitted.row.logits(self.unlearnt.features), self.unlearnt.logits),
        }
        held_out = check_loss(self.name, self.labels, self.actual, self.held_out.logits, self.held_out_logits, ADVICE)
        return {"examples": found, "held_out": held_out, "accepted": self._accepted(), "notes": _notes(found)}

    @property
    def decisions(self) -> Decisions | None:
        """The decisions on all labels; None if there were none. No text is accepted as the new one.

        They are fitted on validation texts and examples, with logits of rows that were fitted without them.
        """
        before = self.source.decisions
        if before is None:
            return None
        rows = slice(len(self.texts.train.texts), None)
        logits = np.concatenate(
            [
                _beside(self.old.logits[rows], self.fitted.texts[rows]),
                _beside(self.learnt.logits, self.fitted.examples),
            ]
        )
        actual = np.append(self.old_actual[rows], np.full(len(self.learnt.features), len(self.labels)))
        made = fit_decisions(logits, actual, [*self.labels, self.name], before.targets, alone=self.source.prototypes)
        kept = carried(before, made, [*(frozenset([i]) for i in range(len(self.labels))), frozenset()])
        # How often the examples come up in traffic is not known, so they show no precision.
        new = replace(kept.levels[0][-1], threshold=None, share=0.0)
        return replace(kept, levels=((*kept.levels[0][:-1], new), *kept.levels[1:]))

    @property
    def metrics(self) -> dict[str, Any]:
        """The scores on the held-out texts, the examples among them included."""
        logits = np.concatenate(
            [
                self.held_out_logits,
                _beside(self.unlearnt.logits, self.fitted.row.logits(self.unlearnt.features)),
            ]
        )
        actual = [*self.texts.held_out.labels, *[self.name] * len(self.unlearnt.features)]
        return metrics_of([*self.labels, self.name], actual, logits)

    def _accepted(self) -> dict[str, Any] | None:
        if self.source.decisions is None or self.decisions is None:
            return None
        before = accepted(self.source.decisions, self.held_out.logits, self.actual)
        return {"before": before, "after": accepted(self.decisions, self.held_out_logits, self.actual)}


def _inputs(source: Checkpoint, head: Layer, texts: Sequence[str]) -> Inputs:
    found = features(source, texts, "reading the texts")
    return Inputs(found[:, below(source)], head.logits(found))


def _beside(logits: Floats, column: Floats) -> Floats:
    """Return logits [texts, labels] with those of one more label."""
    return np.column_stack([logits, column])


def _count_above(own: Floats, others: Floats) -> int:
    """Return how many texts have a logit above those of all other labels."""
    return int((own > others.max(axis=1)).sum()) if len(own) else 0


def _notes(found: dict[str, int]) -> list[str]:
    rows, right = found["learnt"] + found["held_out"], found["learnt_found"] + found["held_out_found"]
    notes = [f"{right} of {rows} examples are found by a row that was fitted without them"]
    if right < FEW_FOUND * rows:
        notes.append("few are found: give more examples, or the training table with --data, or retrain")
    return notes
