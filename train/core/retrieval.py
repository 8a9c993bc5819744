"""How well embeddings find another text of the same group: recall at 10, beside TF-IDF."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from aisle.preprocess.clean import content_key

NEAREST = 10
QUERIES = 2_000
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
    """Return the recall of TF-IDF over character 2- to 4-grams, which finds equal words and numbers."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    terms = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), sublinear_tf=True, dtype=np.float32)
    return recall(terms.fit_transform(found_in.texts), found_in)
