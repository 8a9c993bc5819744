"""A linear SVM over TF-IDF of character n-grams: a baseline for the BERT, and one of its possible teachers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.svm import LinearSVC

from aisle.console import track
from aisle.errors import InputError
from aisle.preprocess.clean import LabelledTexts
from aisle.train.core.calibration import fit_temperature

FOLDS = 5
WEIGHTS = 100_000_000  # of all categories together
CELLS = 4_000_000  # margins in memory at a time: texts × categories
PENALTY = 0.5  # C; the best of 0.1 to 1 on the validation part of real reviews, for n-grams of up to 3 and 4
Scores = npt.NDArray[np.float32]


class LinearSvm:
    """One-vs-rest SVMs over character n-grams of length 1 to 3, which suit English and also Chinese without spaces."""

    def __init__(self, train: LabelledTexts) -> None:
        """Fit it to cleaned texts of two categories or more."""
        self._vectorizer = _vectorizer(len(set(train.labels)))
        self._machine = _machine().fit(self._vectorizer.fit_transform(train.texts), train.labels)

    def predict(self, texts: Sequence[str]) -> list[str]:
        return [str(label) for label in self._machine.predict(self._vectorizer.transform(texts))]

    def scores(self, texts: Sequence[str], labels: Sequence[str]) -> Scores:
        """Return the margins [texts, labels]. A category that was not in training gets each text's lowest margin."""
        return _margins(self._machine, self._vectorizer.transform(texts), labels)


def _vectorizer(categories: int) -> Any:
    # There is one fp64 weight for each feature and category. The bound keeps thousands of categories under 1 GB.
    features = min(300_000, WEIGHTS // categories)
    return TfidfVectorizer(analyzer="char", ngram_range=(1, 3), min_df=2, sublinear_tf=True, max_features=features)


def _machine() -> Any:
    return LinearSVC(C=PENALTY, random_state=0)


def _margins(machine: Any, vectors: Any, labels: Sequence[str]) -> Scores:
    margins = machine.decision_function(vectors)
    if margins.ndim == 1:  # two categories share one SVM
        margins = np.stack([-margins, margins], axis=1)
    scores = np.repeat(margins.min(axis=1, keepdims=True).astype(np.float32), len(labels), axis=1)
    column = {label: number for number, label in enumerate(labels)}
    scores[:, [column[str(label)] for label in machine.classes_]] = margins
    return scores


def cross_fit(table: LabelledTexts, labels: Sequence[str]) -> Iterator[tuple[npt.NDArray[np.int64], Scores]]:
    """Yield the numbers of some texts and their margins [texts, labels], until each text had its turn.

    An SVM that was fitted to the other `FOLDS` - 1 folds scores a text, so it has not seen the text's label. The folds
    are random, and the texts of each category are spread over them, so that a category of two texts or more is known to
    every SVM that scores one of its texts. The n-grams, which need no label, are those of all texts. A part is random
    within its fold and has at most `CELLS` margins.

    Raises:
        ValueError: a fold leaves only one category, or no n-gram occurs twice.
    """
    shuffled = np.random.default_rng(0).permutation(len(table.texts))
    given = np.array(table.labels)
    fold = np.empty(len(shuffled), np.int64)
    _, categories = np.unique(given, return_inverse=True)
    fold[shuffled[np.argsort(categories[shuffled], kind="stable")]] = np.arange(len(shuffled)) % FOLDS
    vectors = _vectorizer(len(set(table.labels))).fit_transform(table.texts)
    size = max(1, CELLS // len(labels))
    for number in track(range(FOLDS), "fitting the SVM"):
        others = np.flatnonzero(fold != number)
        machine = _machine().fit(vectors[others], given[others])
        inside = shuffled[fold[shuffled] == number]
        for start in range(0, len(inside), size):
            part = inside[start : start + size]
            yield part, _margins(machine, vectors[part], labels)


class LinearTeacher:
    """The SVM as a teacher.

    An SVM is overconfident on its own training texts. So each training text is scored by an SVM that was fitted to the
    other folds (cross-fitting). A fitted temperature turns the margins into calibrated logits.
    """

    def __init__(self, train: LabelledTexts, labels: Sequence[str]) -> None:
        """Fit it.

        Raises:
            InputError: a fold leaves too little to learn from.
        """
        self._labels = labels
        try:
            scores = self._fit(train, labels)
        except ValueError as error:  # from scikit-learn: only one category, or no n-gram that occurs twice
            few = f"{len(train.texts)} texts are too few for an SVM to teach"
            raise InputError(f"{few}; add texts, or leave out --linear-share or --recipe best") from error
        self.temperature = fit_temperature(scores, [labels.index(label) for label in train.labels])
        self._known = dict(zip(train.texts, scores, strict=True))

    def _fit(self, train: LabelledTexts, labels: Sequence[str]) -> Scores:
        self._whole = LinearSvm(train)
        scores = np.zeros((len(train.texts), len(labels)), np.float32)
        for part, margins in cross_fit(train, labels):
            scores[part] = margins
        return scores

    def logits(self, texts: Sequence[str]) -> Scores:
        """Return calibrated logits, [texts, labels]."""
        new = [text for text in texts if text not in self._known]
        if new:
            self._known.update(zip(new, self._whole.scores(new, self._labels), strict=True))
        logits: Scores = np.stack([self._known[text] for text in texts]) / np.float32(self.temperature)
        return logits
