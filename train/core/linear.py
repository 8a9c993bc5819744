"""A linear SVM over TF-IDF of character n-grams: a baseline for the BERT, and one of its possible teachers."""

from __future__ import annotations

from collections.abc import Sequence
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
PENALTY = 0.5  # C; the best of 0.1 to 1 on the validation part of real reviews, for n-grams of up to 3 and 4
Scores = npt.NDArray[np.float32]


class LinearSvm:
    """One-vs-rest SVMs over character n-grams of length 1 to 3, which suit English and also Chinese without spaces."""

    def __init__(self, train: LabelledTexts) -> None:
        """Fit it to cleaned texts of two categories or more."""
        # There is one fp64 weight for each feature and category. The bound keeps thousands of categories under 1 GB.
        features = min(300_000, 100_000_000 // len(set(train.labels)))
        self._vectorizer = TfidfVectorizer(
            analyzer="char", ngram_range=(1, 3), min_df=2, sublinear_tf=True, max_features=features
        )
        self._machine = LinearSVC(C=PENALTY, random_state=0)
        self._machine.fit(self._vectorizer.fit_transform(train.texts), train.labels)

    def predict(self, texts: Sequence[str]) -> list[str]:
        return [str(label) for label in self._machine.predict(self._vectorizer.transform(texts))]

    def scores(self, texts: Sequence[str], labels: Sequence[str]) -> Scores:
        """Return the margins [texts, labels]. A category that was not in training gets each text's lowest margin."""
        margins: Any = self._machine.decision_function(self._vectorizer.transform(texts))
        if margins.ndim == 1:  # two categories share one SVM
            margins = np.stack([-margins, margins], axis=1)
        scores = np.repeat(margins.min(axis=1, keepdims=True), len(labels), axis=1)
        scores[:, [labels.index(str(label)) for label in self._machine.classes_]] = margins
        return scores.astype(np.float32)


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
            raise InputError(f"{few}; leave --linear-share out") from error
        self.temperature = fit_temperature(scores, [labels.index(label) for label in train.labels])
        self._known = dict(zip(train.texts, scores, strict=True))

    def _fit(self, train: LabelledTexts, labels: Sequence[str]) -> Scores:
        self._whole = LinearSvm(train)
        fold = np.random.default_rng(0).permutation(len(train.texts)) % FOLDS
        scores = np.zeros((len(train.texts), len(labels)), np.float32)
        for number in track(range(FOLDS), "fitting the SVM"):
            inside = np.flatnonzero(fold == number)
            others = np.flatnonzero(fold != number)
            machine = LinearSvm(LabelledTexts([train.texts[i] for i in others], [train.labels[i] for i in others]))
            scores[inside] = machine.scores([train.texts[i] for i in inside], labels)
        return scores

    def logits(self, texts: Sequence[str]) -> Scores:
        """Return calibrated logits, [texts, labels]."""
        new = [text for text in texts if text not in self._known]
        if new:
            self._known.update(zip(new, self._whole.scores(new, self._labels), strict=True))
        logits: Scores = np.stack([self._known[text] for text in texts]) / np.float32(self.temperature)
        return logits
