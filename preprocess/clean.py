"""Cleaning: the function that cleans each text, in training and in serving, and one pass over a labelled table."""

from __future__ import annotations

import hashlib
import html
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from aisle.preprocess import labels
from aisle.preprocess.labels import Labelling
from aisle.preprocess.pii import scrub
from aisle.preprocess.values import TextError, as_text

MAX_BYTES = 32 * 1024  # of one text, as UTF-8

# The bounds prevent quadratic time on a text of unclosed comments.
_MARKUP = re.compile(r"<!--.{0,1000}?-->|<(script|style)\b[^<>]*>.{0,1000}?</\1\s*>|</?[a-zA-Z][^<>]*>", re.S | re.I)
# Zero-width characters, direction marks, soft hyphens, variation selectors and private-use characters carry no text.
_UNSEEN = "\u00ad\u034f\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff\ufff9-\ufffb\ue000-\uf8ff"
_CONTROLS = r"\x00-\x1f\x7f-\x9f\u2028\u2029"
_INVISIBLE = re.compile(f"[{_UNSEEN}]")
_CONTROL = re.compile(f"[{_CONTROLS}]")
_REPEATED = re.compile(r"([!?.,;:~*_=#\-|/、。·])\1+")
_SPACE = re.compile(r"\s+")
# A text that `clean` changes has one of these, two spaces or marks in a row, a space at an end, or is not NFKC.
_SUSPECT = re.compile(rf"[&<{_CONTROLS}{_UNSEEN}\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000]")
# Full-width ASCII, mostly punctuation. In most Chinese sentences, nothing else is not NFKC.
_WIDE = re.compile("[\uff01-\uff5e]")
# Characters that do not count when texts are compared: all but letters, digits and decimal points.
_INCIDENTAL = re.compile(r"(?<!\d)\.|\.(?!\d)|[^\w.]|_")


def clean(text: str) -> str:
    """Return `text` without markup, entities, control characters, width variants and repeated punctuation.

    Unicode NFKC folds full-width letters, digits and punctuation to half-width (UAX #15). The result may be empty.
    """
    if is_clean(text):
        return text
    for _ in range(3):  # shops escape up to three times; the bound prevents quadratic time on nested entities
        unescaped = html.unescape(text)
        if unescaped == text:
            break
        text = unescaped
    text = _WIDE.sub(_narrow, _INVISIBLE.sub("", text))  # often all that NFKC, by far the slowest step, would do
    text = unicodedata.normalize("NFKC", text)
    text = _CONTROL.sub(" ", _MARKUP.sub(" ", text))
    return _SPACE.sub(" ", _REPEATED.sub(r"\1", text)).strip()


def is_clean(text: str) -> bool:
    """Return whether `clean` would not change a text. A few scans decide; most texts of a cleaned catalogue pass."""
    return not (
        _SUSPECT.search(text)
        or "  " in text
        or text[:1] == " "
        or text[-1:] == " "
        or _REPEATED.search(text)
        or not unicodedata.is_normalized("NFKC", text)
    )


def _narrow(wide: re.Match[str]) -> str:
    return chr(ord(wide[0]) - 0xFEE0)  # its compatibility decomposition, so that NFKC of the text stays the same


def check_size(data: bytes) -> None:
    """Raise TextError if a text in UTF-8 is longer than `MAX_BYTES`."""
    if len(data) > MAX_BYTES:
        message = f"text is {len(data)} bytes long, over the limit of {MAX_BYTES}; shorten it"
        raise TextError("over-long", message)


def prepare(raw: object, found: Counter[str] | None = None) -> str:
    """Check, clean and scrub one text. The tokenizer sees the result, in training and in serving.

    Args:
        raw: a text, or another value that `aisle.preprocess.values` accepts as one.
        found: if given, counts the personal data that is replaced, by kind.

    Raises:
        TextError: the text is missing, not a text, not UTF-8, longer than `MAX_BYTES`, or empty after cleaning.
    """
    text = as_text(raw)
    if text is None:
        raise TextError("text missing", "text is missing; send a string")
    try:
        data, text = (text, text.decode()) if isinstance(text, bytes) else (text.encode(), text)
    except UnicodeError:
        raise TextError("not UTF-8", "text is not valid UTF-8; encode it as UTF-8") from None
    check_size(data)
    text = clean(text)
    if not text:
        raise TextError("empty", "text is empty once cleaned; send at least one visible character")
    return scrub(text, found)


def prepare_label(raw: object) -> str:
    """Check one label. Only spaces around it are removed, because a label is a name that the catalogue's owner chose.

    Raises:
        TextError: the label is missing, not a text, or not UTF-8.
    """
    try:
        label = as_text(raw)
    except TextError as error:
        raise TextError("label not text", str(error).replace("text", "label", 1)) from None
    try:
        label = label.decode() if isinstance(label, bytes) else label or ""
        label.encode()
    except UnicodeError:
        raise TextError("label not UTF-8", "label is not valid UTF-8; encode it as UTF-8") from None
    label = label.strip()
    if not label:
        raise TextError("label missing", "label is missing; give the row a category")
    return label


def content(text: str) -> str:
    """Return a cleaned text without case, spaces and punctuation, or the text itself if nothing is left."""
    return _INCIDENTAL.sub("", text.casefold()) or text


def content_key(text: str) -> bytes:
    """Return 16 bytes that are equal for texts of equal content."""
    return hashlib.blake2b(content(text).encode(), digest_size=16).digest()


@dataclass
class LabelledTexts:
    """Labelled texts, cleaned: `texts[i]` belongs to `labels[i]`.

    With `multi_label`, a label is a set of categories, as in `aisle.preprocess.label_sets`.
    """

    texts: list[str]
    labels: list[str]
    multi_label: bool = False

    def like(self, texts: list[str], labels: list[str]) -> LabelledTexts:
        """Return other texts whose labels are of the same kind."""
        return LabelledTexts(texts, labels, self.multi_label)

    def categories_of(self, label: str) -> list[str]:
        """Return the categories of a label."""
        return label.split(labels.BAR) if self.multi_label else [label]

    def counts(self) -> Counter[str]:
        """Return the number of rows of each category."""
        return Counter(category for label in self.labels for category in self.categories_of(label))


@dataclass
class CleaningReport:
    """What a cleaning pass dropped and changed. Rows are counted from 1."""

    rows_in: int = 0
    rows_kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[int]] = field(default_factory=dict)
    label_variants: list[list[str]] = field(default_factory=list)  # groups that were kept apart
    folded: dict[str, str] = field(default_factory=dict)  # variant -> the label that replaced it
    merged: dict[str, str] = field(default_factory=dict)  # rare category -> the parent that it joined
    left_out: dict[str, int] = field(default_factory=dict)  # rare category without a parent -> its rows

    def drop(self, reason: str, row: int) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        rows = self.examples.setdefault(reason, [])
        if len(rows) < 5:
            rows.append(row)

    def notes(self) -> list[str]:
        """Return lines about unusual and changed labels."""
        notes = [labels.variants_warning(self.label_variants)] if self.label_variants else []
        if self.folded:
            notes.append(f"{len(self.folded)} labels were folded into others")
        if self.merged or self.left_out:
            notes.append(
                f"rare categories: {len(self.merged)} joined their parents, {len(self.left_out)} were left out"
            )
        return notes

    def note_rare(self, parents: Mapping[str, str | None], counts: Mapping[str, int]) -> None:
        """Note which rare categories joined a parent and which were left out."""
        self.merged = {label: parent for label, parent in parents.items() if parent}
        self.left_out = {label: counts[label] for label, parent in parents.items() if not parent}


RARE = "rare category"  # a reason to drop a row
Label = TypeVar("Label")
Copies = dict[bytes, list[tuple[int, Label]]]  # content key -> row and label of each copy


def clean_rows(
    rows: Iterable[tuple[object, object]],
    labelling: Labelling = Labelling(),  # noqa: B008 - it is frozen
    learnable: Callable[[str], bool] = lambda _: True,
) -> tuple[LabelledTexts, CleaningReport]:
    """Clean (text, label) rows: drop rows that cannot be used, and keep the first of equal texts.

    All copies of a text with conflicting labels are dropped, because such a text teaches nothing. Labels that differ
    only in case, spaces or width do not conflict.

    Args:
        labelling: how labels are changed.
        learnable: returns whether a cleaned text is used for training. A category without such a text counts as rare.
    """
    if labelling.multi_label:
        from aisle.preprocess.label_sets import clean_label_sets

        return clean_label_sets(rows, labelling, learnable)
    report = CleaningReport()
    texts, copies = group_copies(rows, lambda raw: _renamed(prepare_label(raw), labelling), report)
    label_of, dropped = _drop_copies(copies, labelling, report)
    counts = Counter(label_of.values())
    seen = Counter(label for key, label in label_of.items() if learnable(texts[key])) if labelling.min_rows else None
    parents = labels.merge_rare(counts, labelling.min_rows, seen)
    report.note_rare(parents, counts)
    table = LabelledTexts([], [])
    for key, label in label_of.items():
        final = parents.get(label, label)
        if final is None:
            dropped.append((copies[key][0][0], RARE))
            continue
        table.texts.append(texts[key])
        table.labels.append(final)
    for row, reason in sorted(dropped):
        report.drop(reason, row)
    report.rows_kept = len(table.texts)
    return table, report


def _renamed(label: str, labelling: Labelling) -> str:
    return labelling.renamed.get(label, label)


def group_copies(
    rows: Iterable[tuple[object, object]], read_label: Callable[[object], Label], report: CleaningReport
) -> tuple[dict[bytes, str], Copies[Label]]:
    """Return the first text of each content, and the copies of each content.

    Args:
        read_label: returns the label that a cell holds; raises TextError if it holds none.
    """
    texts: dict[bytes, str] = {}
    copies: Copies[Label] = {}
    for row, (raw, raw_label) in enumerate(rows, start=1):
        report.rows_in += 1
        try:
            label = read_label(raw_label)
            text = prepare(raw)
        except TextError as error:
            report.drop(error.reason, row)
            continue
        key = content_key(text)
        texts.setdefault(key, text)
        copies.setdefault(key, []).append((row, label))
    return texts, copies


def _drop_copies(
    copies: Copies[str], labelling: Labelling, report: CleaningReport
) -> tuple[dict[bytes, str], list[tuple[int, str]]]:
    """Return the label of each content that has one, and the rows to drop, with the reason."""
    written = Counter(label for group in copies.values() for _, label in group)
    report.folded = labels.fold_variants(written, labelling.known) if labelling.fold else {}
    report.label_variants = [] if labelling.fold else labels.variant_groups(written)
    variant_key = {label: labels.variant_key(label) for label in written}
    label_of: dict[bytes, str] = {}
    dropped = []
    for key, group in copies.items():
        if len({variant_key[label] for _, label in group}) > 1:
            dropped += [(row, "conflicting labels") for row, _ in group]
        else:
            label_of[key] = report.folded.get(group[0][1], group[0][1])
            dropped += [(row, "duplicate") for row, _ in group[1:]]
    return label_of, dropped
