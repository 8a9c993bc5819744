"""How well embeddings find other texts of the same group: recall at 10 beside TF-IDF, and pairs by similarity."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from aisle.preprocess.clean import content_key

NEAREST = 10
QUERIES = 2_000
SIMILARITIES = (0.8, 0.85, 0.9, 0.93, 0.95, 0.97)
BLOCK = 256  # queries compared at once, which bounds the memory


class Lookup(NamedTuple):
    """Texts in which others of the same group are looked for."""

    texts: list[str]
    groups: list[str | None]  # of each text
    queries: list[int]  # texts whose group has another text


def lookup(texts: Sequence[str], groups: Mapping[bytes, str], wanted: Callable[[str], bool], most: int) -> Lookup:
    """Choose up to `QUERIES` queries among the texts of the groups that are `wanted`, and the texts that are searched.

    Args:
        most: texts to search; those of the queries' groups come first.
    """
    # The order of the content keys is random, and the same in every run.
    keyed = sorted((content_key(text), text) for text in texts)
    of = [groups.get(key) for key, _ in keyed]
    counts = Counter(of)
    asked = {group for group in counts if group is not None and counts[group] > 1 and wanted(group)}
    order = sorted(range(len(keyed)), key=lambda i: of[i] not in asked)[:most]
    chosen = [of[i] for i in order]
    left = Counter(chosen)
    found = [place for place, group in enumerate(chosen) if group in asked and left[group] > 1]
    return Lookup([keyed[i][1] for i in order], chosen, found[:QUERIES])


def recall(vectors: Any, found_in: Lookup) -> float:
    """Return the share of the queries with a text of their group among the ten most similar other texts.

    Args:
        vectors: [texts, size] of length 1; dense or sparse.
    """
    names = {group: number for number, group in enumerate(dict.fromkeys(found_in.groups))}
    groups = np.array([names[group] for group in found_in.groups])
    nearest = min(NEAREST, len(groups) - 1)
    hits = 0
    for start in range(0, len(found_in.queries), BLOCK):
        asked = np.array(found_in.queries[start : start + BLOCK])
        product = vectors[asked] @ vectors.T
        scores: npt.NDArray[np.float32] = product if isinstance(product, np.ndarray) else product.toarray()
        scores[np.arange(len(asked)), asked] = -np.inf
        best = np.argpartition(-scores, nearest - 1, axis=1)[:, :nearest]
        hits += int((groups[best] == groups[asked][:, None]).any(axis=1).sum())
    return hits / len(found_in.queries)


def tfidf_recall(found_in: Lookup) -> float:
    """Return the recall of TF-IDF, as `terms` counts it."""
    return recall(terms(np.float32).fit_transform(found_in.texts), found_in)


def terms(dtype: type = np.float64) -> Any:
    """Return a vectorizer: TF-IDF of character 2- to 4-grams within words, which finds equal words and numbers."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), sublinear_tf=True, dtype=dtype)


def pairs_by_similarity(vectors: Any, groups: Sequence[str]) -> list[dict[str, float]]:
    """Return for each of `SIMILARITIES` how many pairs are so similar, and what share of these is of one group.

    Args:
        vectors: [texts, size] of length 1.
        groups: of each text.

    Returns `pairs`, their `precision`, and `recall`, the share of all pairs of one group; all shares are 0 without such
    pairs.
    """
    names = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    of, similar, right, together = np.array([names[group] for group in groups]), Counter[float](), Counter[float](), 0
    for start in range(0, len(of), BLOCK):
        rows = np.arange(start, min(start + BLOCK, len(of)))
        later = np.arange(len(of)) > rows[:, None]  # each pair once
        same, scores = (of == of[rows][:, None]) & later, vectors[rows] @ vectors.T
        together += int(same.sum())
        for least in SIMILARITIES:
            near = (scores >= least) & later
            similar[least] += int(near.sum())
            right[least] += int((near & same).sum())
    return [
        {
            "similarity": least,
            "pairs": similar[least],
            "precision": right[least] / max(1, similar[least]),
            "recall": right[least] / max(1, together),
        }
        for least in SIMILARITIES
    ]
