"""Evaluate a checkpoint in PyTorch, or a running server, on a labelled table."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from aisle.client import Classifier, Failure, Prediction
from aisle.console import say
from aisle.errors import InputError
from aisle.preprocess.clean import prepare, prepare_label
from aisle.preprocess.labels import Labelling, variant_groups, variants_warning
from aisle.preprocess.tables.table import read_labelled
from aisle.preprocess.values import TextError
from aisle.train.core import metrics
from aisle.train.core.calibration import calibration
from aisle.train.core.checkpoint import Checkpoint
from aisle.train.core.split import is_held_out
from aisle.train.evaluation.attributes import measure_attributes
from aisle.train.evaluation.decision_metrics import measure_decisions
from aisle.train.evaluation.predictors import CheckpointPredictor, open_predictor

TOP_K = 5  # the number of categories measured for each text


def evaluate(
    data: Path,
    text_column: str,
    label_column: str,
    *,
    checkpoint: Path | None = None,
    url: str = "",
    held_out: bool,
    baselines: Path | None = None,
    report: Path | None = None,
    labelling: Labelling = Labelling(),  # noqa: B008 - it is frozen
    membership: bool = False,
) -> dict[str, Any]:
    """Measure the predictions of a checkpoint or, with `url`, of a server on a labelled table.

    Rows without a label or a usable text are skipped and counted. Rows whose label is unknown to the model are
    reported separately, in `unseen_labels`.

    Args:
        held_out: measure only the rows that `aisle train` holds out.
        baselines: the table on whose training part the baselines are fitted.
        report: the HTML page to write.
        labelling: how the labels of both tables are changed, after the changes of the checkpoint. Variants fold into
            the labels of the model.
        membership: attack the checkpoint too, as `measure_membership`; `data` is the table that it was trained on.

    Raises:
        InputError: nothing is left to score, no label is known to the model, or it cannot be attacked.
        ServerError: the server failed.
    """
    source = Checkpoint(checkpoint) if checkpoint else None
    if source:
        source.check_fields(text_column)
        labelling = labelling.after(source.labelling)
    else:
        next(iter(read_labelled(data, text_column, label_column)), None)  # refuses a bad table before asking the server
    attack = _attack(source, data, text_column, label_column) if membership and source else None
    if source.multi_label if source else _serves_multi_label(url):
        from aisle.train.evaluation.multi_label import evaluate_multi_label

        if baselines:
            raise InputError("--baselines gives a text one category, but the model is multi-label; leave it out")
        return evaluate_multi_label(
            data, text_column, label_column, labelling, source=source, url=url, held_out=held_out, report=report
        )
    texts, labels, skipped = read_scorable(data, text_column, label_column, held_out)
    answers, known, speed = _predict(source, url, texts, [*labels, *labelling.apply(labels)])
    labelling = replace(labelling, known=tuple(sorted(known)))
    labels = labelling.apply(labels)
    unseen = measure_unseen(labels, answers, known)
    _warn_of_variants({each["label"] for each in unseen}, known)
    seen = [i for i, label in enumerate(labels) if label in known]
    if not seen:
        raise InputError(
            f"{data}: the model knows none of the labels, such as {labels[0]!r}; was it trained on another catalogue?"
        )
    strange = [answer for label, answer in zip(labels, answers, strict=True) if label not in known]
    texts, labels, answers = [texts[i] for i in seen], [labels[i] for i in seen], [answers[i] for i in seen]
    prepared = [prepare(text) for text in texts]  # without personal data, because reports are shared
    result = {
        "evaluated": str(checkpoint or url),
        "data": str(data),
        "held_out": held_out,
        "rows": len(texts),
        "unseen_labels": unseen,
        "skipped": dict(skipped),
        **speed,
        **measure(prepared, labels, answers),
        "decisions": measure_decisions(labels, answers, strange),
    }
    heads = source.heads if source else ()
    if attributes := measure_attributes(data, text_column, prepared, answers, labelling, heads):
        result["attributes"] = attributes
    if attack:
        result["membership"] = attack
    if baselines:
        from aisle.train.evaluation.baselines import compare

        predicted = [_first(answer) for answer in answers]
        result["baselines"] = compare(baselines, text_column, label_column, prepared, labels, predicted, labelling)
    if report:
        from aisle.train.evaluation.evaluation_report import write_report

        write_report(result, report)
    return result


def _attack(source: Checkpoint, data: Path, text_column: str, label_column: str) -> dict[str, Any]:
    from aisle.train.evaluation.membership import measure_membership  # imports torch, which --url does without

    return measure_membership(source, data, text_column, label_column)


def _serves_multi_label(url: str) -> bool:
    with Classifier.from_environment(url) as classifier:
        return classifier.models().multi_label


def _predict(
    source: Checkpoint | None, url: str, texts: Sequence[str], labels: Sequence[str]
) -> tuple[list[Prediction | Failure], set[str], dict[str, float]]:
    """Return the answers to the texts, the categories that the model knows, and the time taken."""
    local = CheckpointPredictor(source, attributes=True) if source else None
    with open_predictor(local, "" if local else url) as predictor:
        start = time.perf_counter()
        answers = predictor.top_k(texts, TOP_K)
        seconds = time.perf_counter() - start
        known = predictor.known_categories(labels, answers)
    return answers, known, {"seconds": round(seconds, 3), "texts_per_second": round(len(texts) / seconds, 1)}


def _warn_of_variants(unseen: AbstractSet[str], known: AbstractSet[str]) -> None:
    """Say which unseen labels differ only in case, spaces or width from labels that the model knows."""
    groups = variant_groups([*sorted(known), *sorted(unseen)])
    mixed = [group for group in groups if unseen & set(group) and known & set(group)]
    if mixed:
        say(variants_warning(mixed))


def measure(texts: Sequence[str], labels: Sequence[str], answers: Sequence[Prediction | Failure]) -> dict[str, Any]:
    """Return all metrics of some predictions.

    A refused text counts as an error with confidence 0; calibration leaves it out.

    Raises:
        InputError: every text was refused.
    """
    given = [(label, each) for label, each in zip(labels, answers, strict=True) if isinstance(each, Prediction)]
    refusals = [each.message for each in answers if isinstance(each, Failure)]
    if not given:
        raise InputError(f"all {len(refusals)} texts were refused, the first with: {refusals[0]}")
    predicted = [_first(answer) for answer in answers]
    confidence = np.array([each.confidence if isinstance(each, Prediction) else 0.0 for each in answers])
    correct = np.array([label == guess for label, guess in zip(labels, predicted, strict=True)])
    return {
        **metrics.score(labels, predicted),
        "refused": len(refusals),
        "top_k": metrics.top_k(labels, [each.categories if isinstance(each, Prediction) else () for each in answers]),
        "levels": metrics.upper_levels(labels, predicted),
        "confidence_by_category": metrics.mean_confidence(
            [each.category for _, each in given], np.array([each.confidence for _, each in given])
        ),
        "confusion": metrics.confusion(labels, predicted),
        "calibration": calibration(
            [label for label, _ in given],
            [each.categories for _, each in given],
            [each.confidences for _, each in given],
        ),
        "coverage": metrics.coverage(confidence, correct),
        "errors": metrics.errors(texts, labels, predicted, confidence),
    }


def measure_unseen(
    labels: Sequence[str], answers: Sequence[Prediction | Failure], known: Collection[str]
) -> list[dict[str, Any]]:
    """Return what the model predicts for each label that is not among `known`, most rows first.

    `category` is the most frequent prediction, `share` its share of the rows, `confidence` the mean over all rows.
    """
    rows: dict[str, list[Prediction | Failure]] = {}
    for label, answer in zip(labels, answers, strict=True):
        if label not in known:
            rows.setdefault(label, []).append(answer)
    found = []
    for label, own in sorted(rows.items(), key=lambda each: (-len(each[1]), each[0])):
        ((category, count),) = Counter(map(_first, own)).most_common(1)
        confidences = [each.confidence for each in own if isinstance(each, Prediction)]
        confidence = float(np.mean(confidences)) if confidences else None
        shares = {"category": category, "share": count / len(own), "confidence": confidence}
        found.append({"label": label, "rows": len(own), **shares})
    return found


def _first(answer: Prediction | Failure) -> str:
    return answer.category if isinstance(answer, Prediction) else "(refused)"


def read_scorable(
    data: Path, text_column: str, label_column: str, held_out: bool
) -> tuple[list[str], list[str], Counter[str]]:
    """Return raw texts, cleaned labels and how many rows were skipped, by reason."""
    texts: list[str] = []
    labels: list[str] = []
    skipped: Counter[str] = Counter()
    for raw, raw_label in read_labelled(data, text_column, label_column):
        try:
            text, label = prepare(raw), prepare_label(raw_label)
        except TextError as error:
            skipped[error.reason] += 1
            continue
        if not held_out or is_held_out(text):
            texts.append(raw or "")
            labels.append(label)
    if not texts:
        raise InputError(f"{data}: no row with both a text and a label")
    return texts, labels, skipped
