"""A linear SVM over TF-IDF of neighbouring characters: what a BERT has to beat, and what can help to teach it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.svm import LinearSVC

from aisle.console import track
from aisle.errors import InputError
from aisle.preprocess.clean import Table
from aisle.train.calibrate import fit_temperature

FOLDS = 5
PENALTY = 0.5  # C: of 0.1 to 1, with runs of up to 3 and 4 characters, best on the validation part of real reviews
Scores = npt.NDArray[np.float32]


class LinearSvm:
    """One machine a category, over runs of 1 to 3 characters: they serve Chinese, which has no spaces, and English."""

    def __init__(self, train: Table) -> None:
        """Fit it to cleaned texts of two categories or more."""
        # One weight a feature and category, in fp64: the bound keeps thousands of categories under a gigabyte.
        features = min(300_000, 100_000_000 // len(set(train.labels)))
        self._vectorizer = TfidfVectorizer(
            analyzer="char", ngram_range=(1, 3), min_df=2, sublinear_tf=True, max_features=features
        )
        self._machine = LinearSVC(C=PENALTY, random_state=0)
        self._machine.fit(self._vectorizer.fit_transform(train.texts), train.labels)

    def predict(self, texts: Sequence[str]) -> list[str]:
        return [str(label) for label in self._machine.predict(self._vectorizer.transform(texts))]

    def scores(self, texts: Sequence[str], labels: Sequence[str]) -> Scores:
        """Return the margins [texts, labels]; a category that it was not fitted to gets each text's least."""
        margins: Any = self._machine.decision_function(self._vectorizer.transform(texts))
        if margins.ndim == 1:  # of two categories there is one machine
            margins = np.stack([-margins, margins], axis=1)
        scores = np.repeat(margins.min(axis=1, keepdims=True), len(labels), axis=1)
        scores[:, [labels.index(str(label)) for label in self._machine.classes_]] = margins
        return scores.astype(np.float32)


class LinearTeacher:
    """The SVM as a teacher: of each text that it was fitted to, it says what it would say of a new one.

    A machine is all too sure of the texts it was fitted to. So each of these is scored by one that was fitted to other
    folds (cross-fitting), and the margins become logits by the temperature at which those are calibrated.
    """

    def __init__(self, train: Table, labels: Sequence[str]) -> None:
        """Fit it.

        Raises:
            InputError: a fold leaves too little to learn from.
        """
        self._labels = labels
        try:
            scores = self._fit(train, labels)
        except ValueError as error:  # scikit-learn's: one category, or no run of characters twice
            few = f"{len(train.texts)} texts are too few for an SVM to teach"
            raise InputError(f"{few}; leave --linear-share out") from error
        self.temperature = fit_temperature(scores, [labels.index(label) for label in train.labels])
        self._known = dict(zip(train.texts, scores, strict=True))

    def _fit(self, train: Table, labels: Sequence[str]) -> Scores:
        self._whole = LinearSvm(train)
        fold = np.random.default_rng(0).permutation(len(train.texts)) % FOLDS
        scores = np.zeros((len(train.texts), len(labels)), np.float32)
        for number in track(range(FOLDS), "fitting the SVM"):
            inside = np.flatnonzero(fold == number)
            others = np.flatnonzero(fold != number)
            machine = LinearSvm(Table([train.texts[i] for i in others], [train.labels[i] for i in others]))
            scores[inside] = machine.scores([train.texts[i] for i in inside], labels)
        return scores

    def logits(self, texts: Sequence[str]) -> Scores:
        """Return calibrated logits, [texts, labels]."""
        new = [text for text in texts if text not in self._known]
        if new:
            self._known.update(zip(new, self._whole.scores(new, self._labels), strict=True))
        logits: Scores = np.stack([self._known[text] for text in texts]) / np.float32(self.temperature)
        return logits
