"""Propose what a model's categories are in another taxonomy, such as Google's or Shopify's; a person confirms it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from aisle.client.taxonomy import COLUMNS
from aisle.console import say
from aisle.errors import InputError
from aisle.preprocess.clean import LabelledTexts, clean
from aisle.preprocess.labels import SEPARATOR
from aisle.preprocess.tables.opening import open_lines
from aisle.preprocess.tables.writing import file_format, replacing, write_rows
from aisle.train.categories.source import Table, joined, read_texts
from aisle.train.core.calibration import softmax
from aisle.train.core.checkpoint import Checkpoint
from aisle.train.core.predict import logits_of
from aisle.train.core.retrieval import terms

Scores = npt.NDArray[np.float64]  # [categories, entries], from 0 to 1
# "3237 - Animals > Live Animals" of Google; "gid://shopify/TaxonomyCategory/ap-1 : Animals > Live Animals" of Shopify.
LINE = re.compile(r"(?:(?P<google>\d+) - |(?P<shopify>gid://\S+)\s+: )?(?P<path>.*)")
ALIKE = 0.15  # from this name score on, names share a word
LEAF = 0.7  # weight of the last level's name beside the whole path
# The weights of the three scores, chosen on 10 categories of English titles beside 88 lines of Google's taxonomy.
WEIGHTS = {"name_score": 0.4, "words_score": 0.4, "model_score": 0.2}


class Entry(NamedTuple):
    """A category of the other taxonomy."""

    id: str  # empty if the file has none
    path: str  # its levels, separated by " > "

    @property
    def leaf(self) -> str:
        """The name of the last level."""
        return self.path.rpartition(SEPARATOR)[2]


def read_taxonomy(path: Path) -> list[Entry]:
    """Read a taxonomy as Google (with or without ids) and Shopify publish it: one path in each line.

    Raises:
        InputError: it cannot be read, has no path, an empty level, or a path twice.
    """
    found: dict[str, Entry] = {}
    ids: dict[str, int] = {}
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        match = LINE.fullmatch(line.strip())
        levels = [level.strip() for level in match["path"].split(">")] if match else []
        if not match or not all(levels):
            raise InputError(f"{path}, line {number}: {line[:80]!r} has an empty level; write it as '12 - A > B'")
        entry = Entry(match["google"] or match["shopify"] or "", SEPARATOR.join(levels))
        if entry.id and ids.setdefault(entry.id, number) != number:
            raise InputError(f"{path}, line {number}: line {ids[entry.id]} has the same id; remove one of them")
        if found.setdefault(entry.path, entry) is not entry:
            raise InputError(f"{path}, line {number}: {entry.path!r} is there twice; remove one line")
    if not found:
        raise InputError(f"{path} has no category; give a taxonomy with one path in each line, such as '12 - A > B'")
    return [*found.values()]


def _lines(path: Path) -> Iterator[str]:
    """Yield the lines of a text file, in the encoding of `--encoding` or UTF-8."""
    with open_lines(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.isascii() and any("\ud800" <= each <= "\udfff" for each in line):
                raise InputError(f"{path}, line {number} is not in its encoding; name the right one with --encoding")
            yield line.rstrip("\r\n")


def propose(
    checkpoint: Path, taxonomy: Path, out: Path, *, table: Table | None = None, candidates: int = 3
) -> dict[str, Any]:
    """Write the entries of a taxonomy that each category most probably corresponds to, the best first.

    Three things speak for an entry: its name resembles the category's; its name consists of words of the category's
    texts; and the model gives the category to the name. `score` is their mean, weighted by `WEIGHTS`.

    Args:
        table: texts of the categories, instead of the checkpoint's own sample.
        candidates: the number of entries for each category.

    Returns the number of categories and of entries, and the best entry of each category.

    Raises:
        InputError: the checkpoint, its texts or the taxonomy cannot be read, or the output cannot be written.
    """
    kind = file_format(out)  # fails early if the name cannot be written
    source, entries = Checkpoint(checkpoint), read_taxonomy(taxonomy)
    texts = read_texts(source, table)
    scores = _scores(source, joined(texts.train, texts.validation), entries)
    total: Scores = sum((WEIGHTS[name] * own for name, own in scores.items()), np.zeros((1, 1)))
    order = np.argsort(-total, axis=1, kind="stable")[:, :candidates]
    rows = [
        {
            "category": label,
            "taxonomy_id": entries[j].id,
            "taxonomy": entries[j].path,
            "score": round(float(total[i, j]), 3),
            **{name: round(float(own[i, j]), 3) for name, own in scores.items()},
            "confirmed": "",
        }
        for i, label in enumerate(source.labels)
        for j in order[i]
    ]
    with replacing(out) as writing:
        write_rows(writing, lambda: iter(rows), [*COLUMNS, "score", *scores, "confirmed"], kind)
    _warn_of_another_language(scores["name_score"], taxonomy)
    best = rows[:: min(candidates, len(entries))]
    return {
        "checkpoint": str(checkpoint),
        "taxonomy": taxonomy.name,
        "categories": len(source.labels),
        "entries": len(entries),
        "best": [{name: row[name] for name in ("category", "taxonomy", "score")} for row in best],
        "output": str(out),
    }


def _warn_of_another_language(name_scores: Scores, taxonomy: Path) -> None:
    """Say so if hardly any category has a name like one in the taxonomy."""
    alike = int((name_scores.max(axis=1) >= ALIKE).sum())
    if alike < len(name_scores) / 4:
        say(
            f"only {alike} of {len(name_scores)} categories have a name like one in {taxonomy.name}; give the taxonomy "
            "in the language of the categories"
        )


def _scores(source: Checkpoint, texts: LabelledTexts, entries: Sequence[Entry]) -> dict[str, Scores]:
    leaves = [clean(entry.leaf) for entry in entries]
    return {
        "name_score": LEAF * _similarity([clean(label.rpartition(SEPARATOR)[2]) for label in source.labels], leaves)
        + (1 - LEAF) * _similarity([*map(clean, source.labels)], [clean(entry.path) for entry in entries]),
        "words_score": _words(source.labels, texts, leaves),
        "model_score": _predicted(source, leaves),
    }


def _similarity(names: Sequence[str], others: Sequence[str]) -> Scores:
    """Return the cosine similarity of names' character n-grams, [names, others]."""
    vectors = terms().fit([*names, *others])
    found: Scores = (vectors.transform(names) @ vectors.transform(others).T).toarray()
    return found


def _words(labels: Sequence[str], texts: LabelledTexts, leaves: Sequence[str]) -> Scores:
    """Return the cosine similarity of the mean vector of each category's texts to the names, [categories, names]."""
    vectors = terms().fit(texts.texts)
    rows, actual = vectors.transform(texts.texts), np.array(texts.labels)
    means = np.stack([np.asarray(rows[actual == label].sum(axis=0))[0] for label in labels])
    means /= np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)
    found: Scores = (vectors.transform(leaves) @ means.T).T
    return found


def _predicted(source: Checkpoint, leaves: Sequence[str]) -> Scores:
    """Return the probability that the model gives each category for a name, [categories, names]."""
    logits = logits_of(source.model, source.tokenizer.tokens(leaves), "classifying the names")
    return softmax(logits.astype(np.float64)).T
