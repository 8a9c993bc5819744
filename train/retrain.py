"""Retrain: a checkpoint learns further from corrections, and is measured beside what it was."""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from aisle.console import say
from aisle.errors import InputError
from aisle.preprocess.clean import TextError, clean_rows, content_key, prepare, prepare_label
from aisle.preprocess.encode import Encoder
from aisle.preprocess.table import as_text, fingerprint, read_labelled, read_rows
from aisle.train.checkpoint import checkpoint_fingerprint, load_model, read_labels
from aisle.train.data import is_held_out, is_validation, split
from aisle.train.evaluate import logits_of
from aisle.train.metrics import score
from aisle.train.resume import check_replaceable
from aisle.train.review import CORRECTION
from aisle.train.settings import Settings
from aisle.train.train import train_table


class Correction(NamedTuple):
    text: str  # cleaned
    label: str


@dataclass
class Corrections:
    """What people filled in, by the content of the texts."""

    by_content: dict[bytes, Correction]
    blank: int  # rows without a correction
    used: set[bytes] = field(default_factory=set)  # those of texts that the table has
    seen: set[str] = field(default_factory=set)  # categories that the table has

    def apply(self, rows: Iterable[tuple[str | None, str | None]]) -> Iterator[tuple[str | None, str | None]]:
        """Yield the rows of a table, corrected, and at the end the texts that it lacks."""
        for raw, label in rows:
            try:
                self.seen.add(prepare_label(label))
                key = content_key(prepare(raw))
            except TextError:
                yield raw, label
                continue
            if key in self.by_content:
                self.used.add(key)
                label = self.by_content[key].label
            yield raw, label
        for key, correction in self.by_content.items():
            if key not in self.used:
                yield correction


def retrain(
    checkpoint: Path,
    data: Path,
    corrections: Sequence[Path],
    out: Path,
    *,
    text_column: str = "",
    label_column: str = "",
    epochs: int | None = None,
    new_categories: bool = False,
) -> dict[str, Any]:
    """Train a checkpoint further on its table with corrections, with the settings that it was made with.

    A correction gives every copy of its text in the table another label; texts that the table lacks are added. The
    whole table is learnt again with them: from corrections alone a model forgets the rest (McCloskey and Cohen 1989).
    The split is by content, so what was held out stays so, and a corrected text may be held out as well.

    Args:
        corrections: tables with the columns of `aisle review`; where two correct one text, the later table counts.
        text_column, label_column: of the table; by default those that the checkpoint was made from.
        epochs: by default as many as the checkpoint was made with.
        new_categories: take categories that neither the checkpoint nor the table knows; otherwise they are held to be
            slips of the pen.

    Returns:
        The figures of the old and the new checkpoint on the held-out fifth, and on the corrections: those that were
        learnt, and those that were not.

    Raises:
        InputError: a table cannot be read, nothing is corrected, a category is unknown, or the checkpoint does not say
            how it was made.
    """
    check_replaceable(out, "training.json")
    if out.resolve() == checkpoint.resolve():
        raise InputError(f"{out} is the old checkpoint; choose another folder, so that the two can be compared")
    labels = read_labels(checkpoint)
    settings, columns = _read_training(checkpoint)
    text_column, label_column = text_column or columns[0], label_column or columns[1]
    filled = read_corrections(corrections)
    table, cleaning = clean_rows(filled.apply(read_labelled(data, text_column, label_column)))
    if not new_categories:
        _check_known(filled, labels)
    say(f"{len(filled.by_content)} corrections: {len(filled.used)} of texts of the table, the others are added")
    made_from = {
        "file": data.name,
        "sha256": fingerprint(data),
        "columns": [text_column, label_column],
        "corrections": [{"file": path.name, "sha256": fingerprint(path)} for path in corrections],
        "checkpoint_sha256": checkpoint_fingerprint(checkpoint),
    }
    settings = replace(settings, model=str(checkpoint), folds=0, epochs=epochs or settings.epochs)
    metrics = train_table(table, cleaning, made_from, out, settings)

    held_out = split(table).held_out
    asked = [correction.text for correction in filled.by_content.values()]
    wanted = [correction.label for correction in filled.by_content.values()]
    answers = [_predict(each, [*held_out.texts, *asked]) for each in (checkpoint, out)]
    on_held_out = [each[: len(held_out.texts)] for each in answers]
    on_asked = [each[len(held_out.texts) :] for each in answers]
    learnt = [i for i, text in enumerate(asked) if not is_held_out(text) and not is_validation(text)]
    unseen = [i for i, text in enumerate(asked) if is_held_out(text)]  # validation has chosen the epoch: neither
    return {
        "checkpoint": str(out),
        "made_of": str(checkpoint),
        "rows": metrics["rows"],
        "corrections": {
            "rows": len(asked),
            "in_table": len(filled.used),
            "added": len(asked) - len(filled.used),
            "blank": filled.blank,
            "new_categories": sorted(set(wanted) - set(labels)),
        },
        "held_out": _compare(held_out.labels, *on_held_out),
        "corrections_learnt": _right(wanted, on_asked, learnt),
        "corrections_unseen": _right(wanted, on_asked, unseen),
        "seconds": metrics["seconds"],
    }


def read_corrections(paths: Sequence[Path]) -> Corrections:
    """Read what people filled in.

    Raises:
        InputError: a table cannot be read, nothing is filled in, a text cannot be used, or one table corrects equal
            texts to different categories.
    """
    found: dict[bytes, Correction] = {}
    blank = 0
    for path in paths:
        here: dict[bytes, tuple[int, Correction]] = {}
        for number, row in enumerate(read_rows(path), start=1):
            if not {"text", CORRECTION} <= row.keys():
                raise InputError(
                    f"{path}, row {number}: no column 'text' or {CORRECTION!r}; fill in what aisle review wrote"
                )
            correction = as_text(row[CORRECTION]) or ""
            if not correction.strip():
                blank += 1
                continue
            try:
                text, label = prepare(as_text(row["text"])), prepare_label(correction)
            except TextError as error:
                raise InputError(f"{path}, row {number}: {error}") from None
            before = here.setdefault(content_key(text), (number, Correction(text, label)))
            if before[1].label != label:
                raise InputError(
                    f"{path}: rows {before[0]} and {number} correct equal texts to {before[1].label!r} and {label!r}; "
                    "decide for one"
                )
        found |= {key: correction for key, (_, correction) in here.items()}
    if not found:
        raise InputError(f"{', '.join(map(str, paths))}: nothing is filled in; write into the column {CORRECTION!r}")
    return Corrections(found, blank)


def _check_known(filled: Corrections, labels: Sequence[str]) -> None:
    known = {*labels, *filled.seen}
    unknown = Counter(each.label for each in filled.by_content.values() if each.label not in known)
    for label, rows in unknown.most_common(1):
        near = difflib.get_close_matches(label, known, 1, 0.6)
        meant = f"did you mean {near[0]!r}? " if near else ""
        raise InputError(
            f"{rows} correction(s) to {label!r}, a category that is nowhere else; {meant}"
            "correct it, or take it with --new-categories"
        )


def _read_training(checkpoint: Path) -> tuple[Settings, tuple[str, str]]:
    """Return the settings and the columns that a checkpoint was made with."""
    try:
        training = json.loads((checkpoint / "training.json").read_text("utf-8"))
        told: dict[str, Any] = {
            each.name: training["settings"][each.name] for each in fields(Settings) if each.name in training["settings"]
        }
        settings = Settings(**{**told, "augment": tuple(told["augment"])})
        columns = training["data"]["columns"]
        if settings.from_scratch:  # its rate was for random weights
            settings = replace(settings, learning_rate=None, layer_decay=None)
        return settings, (str(columns[0]), str(columns[1]))
    except OSError:
        raise InputError(
            f"{checkpoint} does not say how it was made (training.json); train with: aisle train"
        ) from None
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise InputError(f"{checkpoint}/training.json is damaged: {error}") from None


def _predict(checkpoint: Path, texts: Sequence[str]) -> list[str]:
    labels = read_labels(checkpoint)
    tokens = Encoder(checkpoint / "tokenizer.json").tokens(texts)
    logits = logits_of(load_model(checkpoint), tokens, f"evaluating {checkpoint.name}")
    return [labels[i] for i in logits.argmax(axis=1)]


def _compare(actual: Sequence[str], old: Sequence[str], new: Sequence[str]) -> dict[str, Any]:
    """Return both checkpoints' figures, and on how many texts only one of them is right."""
    right = [(label == before, label == now) for label, before, now in zip(actual, old, new, strict=True)]
    return {
        "rows": len(actual),
        "old": score(actual, old),
        "new": score(actual, new),
        "only_old_right": right.count((True, False)),
        "only_new_right": right.count((False, True)),
    }


def _right(wanted: Sequence[str], answers: Sequence[Sequence[str]], chosen: Iterable[int]) -> dict[str, Any]:
    """Return how many of some corrections each checkpoint answers as corrected."""
    rows = list(chosen)
    old, new = (sum(each[i] == wanted[i] for i in rows) for each in answers)
    return {"rows": len(rows), "old_right": old, "new_right": new}
