"""Evaluate a multi-label checkpoint in PyTorch, or a running server, on a table of texts with their categories."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from aisle.client import Classifier, Failure
from aisle.console import track
from aisle.errors import InputError
from aisle.preprocess.clean import LabelledTexts, clean_rows
from aisle.preprocess.label_sets import indicators, joined
from aisle.preprocess.labels import Labelling
from aisle.preprocess.tables.table import read_labelled
from aisle.train.core.checkpoint import Checkpoint
from aisle.train.core.metrics import score_sets
from aisle.train.core.multi_label import Assigned
from aisle.train.core.split import is_held_out
from aisle.train.evaluation.predictors import MOST_CATEGORIES, largest_top_k


class Answers(NamedTuple):
    """The categories that a model gives some texts."""

    assigned: Assigned
    refused: int = 0  # texts that the server refused; they count as texts without any category


class MultiLabelPredictor(Protocol):
    """A multi-label model."""

    names: list[str]  # its categories

    def assign(self, texts: Sequence[str]) -> Answers:
        """Return the categories of cleaned texts, in the order of `names`."""


def evaluate_multi_label(
    data: Path,
    text_column: str,
    label_column: str,
    labelling: Labelling,
    *,
    source: Checkpoint | None,
    url: str,
    held_out: bool,
    report: Path | None,
) -> dict[str, Any]:
    """Measure as `evaluate` does, on a table that is cleaned as in training: copies of a text are one text.

    Categories that the model does not know are counted in `unseen_labels`, and no other figure counts them.

    Raises:
        InputError: nothing is left to score.
        ServerError: the server failed.
    """
    with _open(source, url) as predictor:
        labelling = replace(labelling, multi_label=True, known=tuple(predictor.names))
        table, cleaning = clean_rows(read_labelled(data, text_column, label_column), labelling)
        texts, sets, unseen = _known_sets(table, predictor.names, held_out)
        if not texts:
            other = f", such as {next(iter(unseen))!r}" if unseen else ""
            raise InputError(f"{data}: no row with a text and a category that the model knows{other}")
        start = time.perf_counter()
        answers = predictor.assign(texts)
        seconds = time.perf_counter() - start
    result = {
        "evaluated": str(source.folder if source else url),
        "data": str(data),
        "held_out": held_out,
        "rows": len(texts),
        "unseen_labels": [{"label": label, "rows": count} for label, count in unseen.most_common()],
        "skipped": cleaning.dropped,
        "refused": answers.refused,
        "seconds": round(seconds, 3),
        "texts_per_second": round(len(texts) / seconds, 1),
        **score_sets(indicators(sets, predictor.names), answers.assigned, predictor.names),
    }
    if report:
        from aisle.train.evaluation.evaluation_report import write_multi_label_report

        write_multi_label_report(result, report)
    return result


def _known_sets(
    table: LabelledTexts, known: Sequence[str], held_out: bool
) -> tuple[list[str], list[str], Counter[str]]:
    """Return the texts with a category that the model knows, their known categories, and the rows of each other one."""
    texts, sets, among = [], [], set(known)
    unseen: Counter[str] = Counter()
    for text, label in zip(table.texts, table.labels, strict=True):
        if held_out and not is_held_out(text):
            continue
        names = table.categories_of(label)
        unseen.update(name for name in names if name not in among)
        if kept := joined(name for name in names if name in among):
            texts.append(text)
            sets.append(kept)
    return texts, sets, unseen


class _OfCheckpoint:
    """A checkpoint in PyTorch, on the GPU if there is one."""

    def __init__(self, source: Checkpoint) -> None:
        self.names = source.labels
        self._source = source

    def assign(self, texts: Sequence[str]) -> Answers:
        import torch  # imported here because a server's answers do not need it

        from aisle.train.core.predict import logits_of

        assert self._source.thresholds
        model = self._source.model.to("cuda" if torch.cuda.is_available() else "cpu")
        logits = logits_of(model, self._source.tokenizer.tokens(texts), "evaluating")
        return Answers(self._source.thresholds.apply(logits))


class _OfServer:
    """A running server. It is asked for the categories that reach their thresholds, and for every probability."""

    def __init__(self, classifier: Classifier) -> None:
        self._classifier = classifier
        (probe,) = classifier.classify(["probe"], largest_top_k(classifier, MOST_CATEGORIES))
        self.names = sorted(probe.categories)

    def assign(self, texts: Sequence[str]) -> Answers:
        """Return the categories of the texts.

        Raises:
            InputError: different versions answered.
        """
        number = {name: place for place, name in enumerate(self.names)}
        shape = len(texts), len(number)
        probabilities, reached, refused = np.zeros(shape), np.zeros(shape, np.bool_), 0
        versions: set[int] = set()
        pairs = zip(self._classifier.stream(texts), self._classifier.stream(texts, len(number)), strict=True)
        for row, (given, ranked) in enumerate(track(pairs, "evaluating", len(texts))):
            if isinstance(given, Failure) or isinstance(ranked, Failure):
                refused += 1
                continue
            versions |= {given.version, ranked.version}
            reached[row, [number[name] for name in given.categories]] = True
            probabilities[row, [number[name] for name in ranked.categories]] = ranked.confidences
        if len(versions) > 1:
            names = ", ".join(map(str, sorted(versions)))
            raise InputError(f"versions {names} answered; evaluate again after the rollout")
        return Answers(Assigned(probabilities, reached), refused)


@contextmanager
def _open(source: Checkpoint | None, url: str) -> Iterator[MultiLabelPredictor]:
    if source:
        yield _OfCheckpoint(source)
        return
    with Classifier.from_environment(url) as classifier:
        yield _OfServer(classifier)
