"""Retrain: train a checkpoint further on corrections, and compare it with the old one."""

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
from aisle.preprocess.binomial import lowest_share
from aisle.preprocess.clean import LabelledTexts, clean_rows, content_key, prepare, prepare_label
from aisle.preprocess.labels import Labelling
from aisle.preprocess.tables.table import as_text, fingerprint, read_labelled, read_rows, refuse_faulty
from aisle.preprocess.values import TextError
from aisle.preprocess.vocabulary import MANY_UNKNOWN
from aisle.train.adapt.labelling_tools import CORRECTION, Disputed, as_correction
from aisle.train.core.checkpoint import Checkpoint
from aisle.train.core.head_data import HeadData, read_heads
from aisle.train.core.heads import spans
from aisle.train.core.metrics import score
from aisle.train.core.predict import logits_of
from aisle.train.core.resume import check_replaceable
from aisle.train.core.sample import EXAMPLES
from aisle.train.core.settings import TrainingSettings
from aisle.train.core.split import is_held_out, is_learnt, is_validation, split
from aisle.train.fit.train import groups_in, train_table

CHANGES = 50  # texts whose answer changed, in the result
LEARNT = 0.8  # share of a category's corrections that the new checkpoint should get right


class Correction(NamedTuple):
    text: str  # cleaned
    label: str


@dataclass
class Corrections:
    """The corrections that people filled in, by the content of the texts."""

    by_content: dict[bytes, Correction]
    blank: int  # rows without a correction
    disputed: int = 0  # rows that people labelled differently
    used: set[bytes] = field(default_factory=set)  # the corrections of texts in the table
    seen: set[str] = field(default_factory=set)  # the categories in the table

    def apply(self, rows: Iterable[tuple[str | None, str | None]]) -> Iterator[tuple[str | None, str | None]]:
        """Yield a table's rows with corrections, then the corrected texts that are not in the table."""
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
    overwrite: bool = False,
) -> dict[str, Any]:
    """Train a checkpoint further on its table with corrections, with its own settings.

    A correction relabels every copy of its text in the table; other corrected texts are added. Training uses the whole
    table, because a model that sees corrections alone forgets the rest (McCloskey and Cohen 1989). The split is by
    content, so held-out texts stay held out, and a corrected text may be held out too.

    Args:
        corrections: tables with the columns of `aisle review`, or exports of a labelling tool; the later table wins
            for the same text.
        text_column, label_column: of the table; by default those that the checkpoint was made from.
        epochs: by default as many as the checkpoint was made with.
        new_categories: accept categories that are in neither the checkpoint nor the table; otherwise an unknown
            category is treated as a typo.

    The examples of categories that `aisle category add` added are trained too, so the table may lack them. Further
    heads are trained too, so the table needs their columns; a corrected text keeps its value.

    Returns:
        The scores of the old and the new checkpoint on the held-out fifth, on the corrections used for training and on
        the held-out corrections; `worse`, whether the new one loses held-out texts beyond chance; for each category,
        how many corrections the new one gets right; `changes`, some texts that the two answer differently, corrections
        first; and `notes`, which say this in words, and what to change.

    Raises:
        InputError: a table cannot be read, nothing is corrected, a category is unknown, or the checkpoint does not say
            how it was made.
    """
    if out.resolve() == checkpoint.resolve():
        raise InputError(f"{out} is the old checkpoint; choose another folder, so that both can be compared")
    check_replaceable(out, "training.json", overwrite)
    old = Checkpoint(checkpoint)
    old.check_one_category("aisle retrain")
    labels, examples = old.labels, old.examples
    settings, columns, labelling = _read_training(checkpoint)
    text_column, label_column = text_column or columns[0], label_column or columns[1]
    old.check_fields(text_column)
    filled = read_corrections(corrections, labelling)
    rows = filled.apply(_as_corrections(examples).apply(read_labelled(data, text_column, label_column)))
    table, cleaning = clean_rows(rows, labelling, learnable=is_learnt)
    if not new_categories:
        _check_known(filled, labels)
    say(f"{len(filled.by_content)} corrections: {len(filled.used)} of texts of the table, the others are added")
    made_from = {
        "file": data.name,
        "sha256": fingerprint(data),
        "columns": [text_column, label_column],
        "corrections": [{"file": path.name, "sha256": fingerprint(path)} for path in corrections],
        "checkpoint_sha256": old.fingerprint,
        **labelling.metadata(),
    }
    if examples.texts:
        made_from["examples"] = _take_over(examples, table, checkpoint)
    also = [head.name for head in old.heads]
    if also:
        made_from["also"] = also
    settings = replace(settings, model=str(checkpoint), folds=0, epochs=epochs or settings.epochs)
    groups = groups_in(data, text_column, label_column, settings)
    heads = read_heads(data, text_column, also, table, labelling, "a table like that of the training")
    metrics = train_table(
        table, cleaning, made_from, out, settings, groups, heads, targets=old.targets, examples=examples
    )
    return {
        "checkpoint": str(out),
        "made_of": str(checkpoint),
        "rows": metrics["rows"],
        "corrections": _count_corrections(filled, labels),
        **({"attributes": metrics["attributes"]} if also else {}),
        **_compare_checkpoints(checkpoint, out, split(table).held_out, filled, settings.epochs, heads),
        "seconds": metrics["seconds"],
    }


def _as_corrections(examples: LabelledTexts) -> Corrections:
    """Return the examples of added categories as corrections: a copy in the table gets their category."""
    rows = zip(examples.texts, examples.labels, strict=True)
    return Corrections({content_key(text): Correction(text, label) for text, label in rows}, blank=0)


def _take_over(examples: LabelledTexts, table: LabelledTexts, checkpoint: Path) -> dict[str, Any]:
    """Say which added categories are trained now; return the entry of training.json."""
    added, left = Counter(examples.labels), set(table.labels)
    say(f"{len(examples.texts)} examples of added categories are trained: {', '.join(sorted(added))}")
    if missing := sorted(added.keys() - left):
        say(f"{', '.join(map(repr, missing))}: too few rows for --min-rows of the first training; left out or joined")
    return {"rows": dict(added), "sha256": fingerprint(checkpoint / EXAMPLES)}


def _count_corrections(filled: Corrections, labels: Sequence[str]) -> dict[str, Any]:
    corrected = {correction.label for correction in filled.by_content.values()}
    return {
        "rows": len(filled.by_content),
        "in_table": len(filled.used),
        "added": len(filled.by_content) - len(filled.used),
        "blank": filled.blank,
        "disputed": filled.disputed,
        "new_categories": sorted(corrected - set(labels)),
    }


def _compare_checkpoints(
    old: Path, new: Path, held_out: LabelledTexts, filled: Corrections, epochs: int, heads: Sequence[HeadData]
) -> dict[str, Any]:
    """Return the scores of both checkpoints on the held-out part and on the corrections, and notes about these."""
    texts = [correction.text for correction in filled.by_content.values()]
    labels = [correction.label for correction in filled.by_content.values()]
    found = [_predict(each, [*held_out.texts, *texts]) for each in (old, new)]
    answers = [each.categories for each in found]
    on_held_out = [each[: len(held_out.texts)] for each in answers]
    on_corrections = [each[len(held_out.texts) :] for each in answers]
    # Validation texts chose the epoch, so they are in neither list.
    learnt = [i for i, text in enumerate(texts) if not is_held_out(text) and not is_validation(text)]
    unseen = [i for i, text in enumerate(texts) if is_held_out(text)]
    by_category = _by_category(filled, on_corrections[1], new)
    compared = _compare(held_out.labels, *on_held_out)
    return {
        "held_out": compared,
        **({"held_out_attributes": _compare_attributes(heads, held_out.texts, found)} if heads else {}),
        "worse": _is_worse(compared),
        "corrections_learnt": _right(labels, on_corrections, learnt),
        "corrections_unseen": _right(labels, on_corrections, unseen),
        "corrections_by_category": by_category,
        "changes": _changes(
            [*texts, *held_out.texts],
            [*labels, *held_out.labels],
            *([*corrected, *others] for corrected, others in zip(on_corrections, on_held_out, strict=True)),
        ),
        "notes": [*_notes(by_category, epochs), *_notes_of_loss(compared, epochs)],
    }


def read_corrections(paths: Sequence[Path], labelling: Labelling = Labelling()) -> Corrections:  # noqa: B008 - frozen
    """Read the corrections that people filled in. They may have names from before a category was renamed or merged.

    Args:
        labelling: which labels have another name now.

    Raises:
        InputError: a table cannot be read, nothing is filled in, a text cannot be used, or a table corrects equal
            texts to different categories.
    """
    found: dict[bytes, Correction] = {}
    blank = disputed = 0
    for path in paths:
        here: dict[bytes, tuple[int, Correction]] = {}
        for number, row in enumerate(refuse_faulty(read_rows(path), path), start=1):
            try:
                row = as_correction(row)
            except Disputed:
                disputed += 1
                continue
            except TextError as error:
                raise InputError(f"{path}, row {number}: {error}") from None
            if not {"text", CORRECTION} <= row.keys():
                raise InputError(
                    f"{path}, row {number}: no column 'text' or {CORRECTION!r}; fill in a table of aisle review"
                )
            correction = as_text(row[CORRECTION])
            if correction is None or (isinstance(correction, str) and not correction.strip()):
                blank += 1
                continue
            try:
                text, label = prepare(as_text(row["text"])), prepare_label(correction)
                label = labelling.renamed.get(label, label)
            except TextError as error:
                raise InputError(f"{path}, row {number}: {error}") from None
            before = here.setdefault(content_key(text), (number, Correction(text, label)))
            if before[1].label != label:
                raise InputError(
                    f"{path}: rows {before[0]} and {number} correct equal texts to {before[1].label!r} and {label!r}; "
                    "keep one of them"
                )
        found |= {key: correction for key, (_, correction) in here.items()}
    if not found:
        why = f"{blank} rows without a correction" + (f", {disputed} disputed" if disputed else "")
        raise InputError(f"{', '.join(map(str, paths))}: nothing is filled in ({why}); fill in {CORRECTION!r}")
    return Corrections(found, blank, disputed)


def _check_known(filled: Corrections, labels: Sequence[str]) -> None:
    known = {*labels, *filled.seen}
    unknown = Counter(each.label for each in filled.by_content.values() if each.label not in known)
    for label, rows in unknown.most_common(1):
        near = difflib.get_close_matches(label, known, 1, 0.6)
        meant = f"did you mean {near[0]!r}? " if near else ""
        raise InputError(
            f"{rows} correction(s) to {label!r}, which is not a known category; {meant}"
            "correct it, or accept it with --new-categories"
        )


def _read_training(checkpoint: Path) -> tuple[TrainingSettings, tuple[str, str], Labelling]:
    """Return the settings, the columns and the labelling that a checkpoint was trained with."""
    try:
        training = json.loads((checkpoint / "training.json").read_text("utf-8"))
        known: dict[str, Any] = {
            each.name: training["settings"][each.name]
            for each in fields(TrainingSettings)
            if each.name in training["settings"]
        }
        settings = TrainingSettings(**{**known, "augment": tuple(known["augment"])})
        columns = training["data"]["columns"]
        if settings.from_scratch:  # its learning rate was for random weights
            settings = replace(settings, learning_rate=None, layer_decay=None)
        named = str(columns[0]), str(columns[1])
    except OSError:
        raise InputError(
            f"{checkpoint} has no training.json, which says how it was made; train a new one with: aisle train"
        ) from None
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise InputError(f"{checkpoint}/training.json is damaged: {error}") from None
    return settings, named, Checkpoint(checkpoint).labelling


class _Answers(NamedTuple):
    categories: list[str]  # [texts]
    attributes: dict[str, list[str]]  # of each head, [texts]


def _predict(folder: Path, texts: Sequence[str]) -> _Answers:
    checkpoint = Checkpoint(folder)
    logits = logits_of(checkpoint.whole_model, checkpoint.tokenizer.tokens(texts), f"evaluating {folder.name}")
    categories = len(checkpoint.labels)
    attributes = {
        head.name: [head.labels[i] for i in logits[:, place].argmax(axis=1)]
        for head, place in zip(checkpoint.heads, spans(categories, checkpoint.heads), strict=True)
    }
    return _Answers([checkpoint.labels[i] for i in logits[:, :categories].argmax(axis=1)], attributes)


def _compare_attributes(
    heads: Sequence[HeadData], texts: Sequence[str], answers: Sequence[_Answers]
) -> dict[str, dict[str, Any]]:
    """Return both checkpoints' accuracy of each attribute on the texts that have a value, and the number of these."""
    found = {}
    for each in heads:
        name, actual = each.head.name, [each.value_of.get(content_key(text)) for text in texts]
        known = [i for i, value in enumerate(actual) if value is not None]
        if known:
            right = [sum(own.attributes[name][i] == actual[i] for i in known) / len(known) for own in answers]
            found[name] = {"rows": len(known), "old": right[0], "new": right[1]}
    return found


def _compare(actual: Sequence[str], old: Sequence[str], new: Sequence[str]) -> dict[str, Any]:
    """Return both checkpoints' scores, and the number of texts that only one of them gets right."""
    right = [(label == before, label == now) for label, before, now in zip(actual, old, new, strict=True)]
    return {
        "rows": len(actual),
        "old": score(actual, old),
        "new": score(actual, new),
        "only_old_right": right.count((True, False)),
        "only_new_right": right.count((False, True)),
    }


def _is_worse(compared: dict[str, Any]) -> bool:
    """Return whether the new checkpoint loses more held-out texts than it gains, beyond chance (sign test, 5 %)."""
    lost, gained = compared["only_old_right"], compared["only_new_right"]
    return bool(lowest_share(lost, lost + gained, 0.025) > 0.5)


def _notes_of_loss(compared: dict[str, Any], epochs: int) -> list[str]:
    if not _is_worse(compared):
        return []
    old, new = (compared[age]["accuracy"] for age in ("old", "new"))
    return [
        f"the new checkpoint is worse: accuracy {new:.4f} instead of {old:.4f} on {compared['rows']} held-out texts; "
        f"train longer, --epochs {2 * epochs}, and look at the corrections before you deploy it"
    ]


def _changes(
    texts: Sequence[str], labels: Sequence[str], old: Sequence[str], new: Sequence[str]
) -> list[dict[str, str]]:
    """Return the first texts that the two checkpoints answer differently."""
    found: dict[str, dict[str, str]] = {}  # a corrected text may be held out too
    for text, label, before, now in zip(texts, labels, old, new, strict=True):
        if before != now and len(found) < CHANGES:
            found.setdefault(text, {"text": text, "label": label, "old": before, "new": now})
    return list(found.values())


def _by_category(filled: Corrections, answers: Sequence[str], out: Path) -> list[dict[str, Any]]:
    """Return, for each corrected category, how many corrections the new checkpoint gets right, the lowest share first.

    `unknown` is the mean share of unknown tokens in its texts.
    """
    corrections = list(filled.by_content.values())
    unknown = Checkpoint(out).tokenizer([correction.text for correction in corrections]).unknown[:, 0]
    found: dict[str, list[tuple[bool, float]]] = {}
    for correction, answer, share in zip(corrections, answers, unknown, strict=True):
        found.setdefault(correction.label, []).append((answer == correction.label, float(share)))
    rows = [
        {
            "category": label,
            "rows": len(each),
            "right": sum(right for right, _ in each),
            "unknown": round(sum(share for _, share in each) / len(each), 4),
        }
        for label, each in found.items()
    ]
    return sorted(rows, key=_share_right)


def _share_right(row: dict[str, Any]) -> float:
    return float(row["right"] / row["rows"])


def _notes(by_category: Sequence[dict[str, Any]], epochs: int) -> list[str]:
    """Say how many corrections the new checkpoint gets right, and for categories with few, what to change."""
    right, rows = (sum(each[name] for each in by_category) for name in ("right", "rows"))
    notes = [f"the new checkpoint gets {right} of {rows} corrections right"]
    for each in by_category:
        if _share_right(each) >= LEARNT:
            continue
        few = f"only {each['right']} of {each['rows']} corrections to {each['category']!r} are right"
        more = f"give --epochs {2 * epochs}"
        if each["unknown"] >= MANY_UNKNOWN:
            notes.append(
                f"{few}: the checkpoint's tokenizer does not know {each['unknown']:.0%} of their text; {more}, or add "
                "them to the table and train from it with aisle train, whose tokenizer will know them"
            )
        else:
            notes.append(f"{few}; {more}, or correct more texts of this category")
    return notes


def _right(wanted: Sequence[str], answers: Sequence[Sequence[str]], chosen: Iterable[int]) -> dict[str, Any]:
    """Return how many corrections each checkpoint predicts."""
    rows = list(chosen)
    old, new = (sum(each[i] == wanted[i] for i in rows) for each in answers)
    return {"rows": len(rows), "old_right": old, "new_right": new}
