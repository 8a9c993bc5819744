"""Cleaning: one function for a training row and for a served request, and one pass over a labelled table."""

from __future__ import annotations

import hashlib
import html
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from aisle.errors import InputError
from aisle.preprocess.pii import scrub

MAX_BYTES = 32 * 1024  # of one text, as UTF-8

# The bounds keep a text made of unclosed comments from costing quadratic time.
_MARKUP = re.compile(r"<!--.{0,1000}?-->|<(script|style)\b[^<>]*>.{0,1000}?</\1\s*>|</?[a-zA-Z][^<>]*>", re.S | re.I)
# Zero-width characters, direction marks, soft hyphens, variation selectors and private-use characters carry no text.
_INVISIBLE = re.compile(
    "[\u00ad\u034f\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff\ufff9-\ufffb\ue000-\uf8ff]"
)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_REPEATED = re.compile(r"([!?.,;:~*_=#\-|/、。·])\1+")
_SPACE = re.compile(r"\s+")
# What two copies of one text may differ in: everything but letters, digits and decimal points.
_INCIDENTAL = re.compile(r"(?<!\d)\.|\.(?!\d)|[^\w.]|_")


class TextError(InputError):
    """A text that cannot be classified: `reason` in a word or two, the message says what to change."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def clean(text: str) -> str:
    """Return `text` without markup, entities, control characters, width variants and repeated punctuation.

    Unicode NFKC folds full-width letters, digits and punctuation to half-width (UAX #15). The result may be empty.
    """
    for _ in range(3):  # shops escape twice or thrice; a bound keeps nested entities from costing quadratic time
        unescaped = html.unescape(text)
        if unescaped == text:
            break
        text = unescaped
    text = unicodedata.normalize("NFKC", _INVISIBLE.sub("", text))
    text = _CONTROL.sub(" ", _MARKUP.sub(" ", text))
    return _SPACE.sub(" ", _REPEATED.sub(r"\1", text)).strip()


def prepare(raw: str | bytes | None, found: Counter[str] | None = None) -> str:
    """Check, clean and scrub one text: what the tokenizer sees, in training and in serving.

    Args:
        found: counts the personal data replaced, by kind, if given.

    Raises:
        TextError: the text is missing, not UTF-8, over `MAX_BYTES`, or empty once cleaned.
    """
    if raw is None:
        raise TextError("text missing", "text is missing; send a string")
    try:
        data, text = (raw, raw.decode()) if isinstance(raw, bytes) else (raw.encode(), raw)
    except UnicodeError:
        raise TextError("not UTF-8", "text is not valid UTF-8; encode it as UTF-8") from None
    if len(data) > MAX_BYTES:
        message = f"text is {len(data)} bytes long, over the limit of {MAX_BYTES}; shorten it"
        raise TextError("over-long", message)
    text = clean(text)
    if not text:
        raise TextError("empty", "text is empty once cleaned; send at least one visible character")
    return scrub(text, found)


def prepare_label(raw: str | None) -> str:
    """Check and clean one label. It is not scrubbed: a category may be numbered like a telephone.

    Raises:
        TextError: the label is missing, not UTF-8, or empty once cleaned.
    """
    label = clean(raw or "")
    if not label:
        raise TextError("label missing", "label is missing; give the row a category")
    try:
        label.encode()
    except UnicodeError:
        raise TextError("label not UTF-8", "label is not valid UTF-8; encode it as UTF-8") from None
    return label


def content(text: str) -> str:
    """Return what is left of a cleaned text without case, spaces and punctuation, or the text if that is nothing."""
    return _INCIDENTAL.sub("", text.casefold()) or text


def content_key(text: str) -> bytes:
    """Return 16 bytes, equal for texts of equal content."""
    return hashlib.blake2b(content(text).encode(), digest_size=16).digest()


@dataclass
class Table:
    """Labelled texts, cleaned: `texts[i]` belongs to `labels[i]`."""

    texts: list[str]
    labels: list[str]


@dataclass
class CleaningReport:
    """What a cleaning pass dropped and why; rows are counted from 1."""

    rows_in: int = 0
    rows_kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[int]] = field(default_factory=dict)

    def drop(self, reason: str, row: int) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        rows = self.examples.setdefault(reason, [])
        if len(rows) < 5:
            rows.append(row)


def clean_rows(rows: Iterable[tuple[str | None, str | None]]) -> tuple[Table, CleaningReport]:
    """Clean (text, label) rows: drop what cannot be learnt from, keep the first of equal texts.

    A text that occurs under two labels teaches nothing: every copy of it is dropped.
    """
    report = CleaningReport()
    first: dict[bytes, tuple[str, str]] = {}  # content -> text, label
    copies: dict[bytes, list[tuple[int, str]]] = {}  # content -> row, label of each occurrence
    for row, (raw, raw_label) in enumerate(rows, start=1):
        report.rows_in += 1
        try:
            label = prepare_label(raw_label)
            text = prepare(raw)
        except TextError as error:
            report.drop(error.reason, row)
            continue
        key = content_key(text)
        first.setdefault(key, (text, label))
        copies.setdefault(key, []).append((row, label))
    dropped = []
    for key, group in copies.items():
        if len({label for _, label in group}) > 1:
            del first[key]
            dropped += [(row, "conflicting labels") for row, _ in group]
        else:
            dropped += [(row, "duplicate") for row, _ in group[1:]]
    for row, reason in sorted(dropped):
        report.drop(reason, row)
    report.rows_kept = len(first)
    return Table([text for text, _ in first.values()], [label for _, label in first.values()]), report
