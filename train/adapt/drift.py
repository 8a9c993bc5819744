"""Drift: compare live traffic with a checkpoint's held-out texts, and decide whether to retrain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from aisle.console import say
from aisle.errors import InputError
from aisle.preprocess import vocabulary
from aisle.preprocess.clean import LabelledTexts
from aisle.train.adapt.drift_log import Traffic, WordCounter, last_days, read_log, time_span
from aisle.train.adapt.drift_statistics import ALPHA, RULES, Reference, comparison
from aisle.train.core.calibration import softmax
from aisle.train.core.checkpoint import Checkpoint
from aisle.train.core.predict import logits_of
from aisle.train.core.sample import sample_of

LEAST = 200  # answers; fewer are too few for the tests
WINDOWS = 12  # of equal numbers of answers
LEAST_WINDOW = 250


def drift(
    checkpoint: Path,
    log: Path,
    *,
    text_column: str = "text",
    label_column: str = "category",
    data: Path | None = None,
    days: float | None = None,
    report: Path | None = None,
) -> dict[str, Any]:
    """Compare a log of answered texts with texts like those that a checkpoint was trained on.

    The log is what `TrafficLog` writes, or a table with the columns `category` and `confidence`, as `aisle classify -o`
    writes it. A `time` column and a text column are used if present.

    Args:
        data: the table that the checkpoint was trained on, if it carries no sample of it.
        days: use only this many days before the log's last line.
        report: the HTML page to write.

    Returns:
        `retrain`, the `reasons` for it, what else to `watch`, all `measures`, and their course over `windows` of time.

    Raises:
        InputError: the log cannot be read, is too short, or belongs to another model.
    """
    source = Checkpoint(checkpoint)
    source.check_one_category("aisle drift")
    labels = source.labels
    counter = WordCounter(source.tokenizer.entries())
    live, skipped = read_log(log, labels, counter, text_column)
    if days is not None:
        live = last_days(live, days, log)
    if len(live.times) < LEAST:
        raise InputError(
            f"{log}: {len(live.times)} answers are too few to distinguish drift from chance; log {LEAST} or more"
        )
    sample = sample_of(data, text_column, label_column, labels, source.labelling) if data else source.sample
    if len(sample.held_out.texts) < LEAST:
        say(f"only {len(sample.held_out.texts)} texts are held out, so only large changes can be detected")
    reference = classify_reference(source, counter, sample.held_out)
    result = {
        "checkpoint": str(checkpoint),
        "log": str(log),
        "rows": len(live.times),
        "skipped": dict(skipped),
        "reference_rows": len(reference.traffic.times),
        **time_span(live),
        **verdict(reference, live),
    }
    if report:
        from aisle.train.adapt.drift_report import write_report

        write_report(result, reference.traffic, live, report)
    return result


def classify_reference(checkpoint: Checkpoint, counter: WordCounter, table: LabelledTexts) -> Reference:
    """Classify the held-out texts of a checkpoint's sample."""
    logits = logits_of(checkpoint.model, checkpoint.tokenizer.tokens(table.texts), "classifying held-out texts")
    predicted = np.array(checkpoint.labels, np.object_)[logits.argmax(axis=1)]
    traffic = Traffic(
        np.arange(len(predicted), dtype=np.float64),
        False,
        predicted,
        softmax(logits).max(axis=1).astype(np.float64),
        np.array([len(text) for text in table.texts], np.float64),
        [counter(0, len(table.texts), vocabulary.count(table.texts))],
    )
    return Reference(traffic, float(np.mean(predicted == np.array(table.labels, np.object_))))


def verdict(reference: Reference, live: Traffic) -> dict[str, Any]:
    """Return the verdict, its reasons and its measures.

    Each measure is taken over all traffic and over its last third, which older traffic does not dilute. The worse
    one counts.
    """
    compare = comparison(reference, live)
    measures = compare(live)
    recently = compare(_latest(live)) if len(live.times) >= 3 * LEAST else {}
    windows = [_measure_window(part, compare(part)) for part in _windows(live)]
    reasons: list[dict[str, Any]] = []
    watch: list[dict[str, Any]] = []
    for name, rule in RULES.items():
        found = [
            (when, each[name]) for when, each in (("", measures), ("in the last third ", recently)) if name in each
        ]
        exceeded = [(rule.exceeded(each["value"]), when, each) for when, each in found if each["p_value"] < ALPHA]
        bound, when, measure = max(exceeded, key=lambda each: each[0], default=(0.0, "", {}))
        if bound:
            value = f"{when}{measure['value']:.3f} ({rule.unit}), above {bound:g}"
            reason = f"{rule.title}: {value}; {_describe(name, measure)}"
            (reasons if bound == rule.retrain else watch).append(
                {"measure": name, "reason": reason, "since": _since(windows, name, bound)}
            )
    return {
        "retrain": bool(reasons),
        "reasons": reasons,
        "watch": watch,
        "measures": measures,
        "last_third": recently,
        "windows": windows,
    }


def _measure_window(part: Traffic, measures: dict[str, Any]) -> dict[str, Any]:
    """Return a window's figures; None for a measure that it lacks."""
    return {
        **time_span(part),
        "rows": len(part.times),
        "mean_confidence": float(part.confidence.mean()),
        **{name: measures[name]["value"] if name in measures else None for name in RULES},
    }


def _latest(live: Traffic) -> Traffic:
    """Return the last third of the answers."""
    start = len(live.times) - len(live.times) // 3
    return live.part(slice(start, None), [each for each in live.words if each.time > live.times[start]])


def _describe(name: str, measure: dict[str, Any]) -> str:
    """Describe a measure in words."""
    if name == "label_mix":
        moved = sorted(measure["categories"], key=lambda each: -abs(each["live"] - each["reference"]))[:2]
        return ", ".join(f"{each['category']} {each['reference']:.1%} → {each['live']:.1%}" for each in moved)
    if name == "wording":
        return f"{measure['words']} words"
    change = f"{measure['reference']:.3f} → {measure['live']:.3f}"
    return {"length": "median ", "confidence": "mean "}.get(name, "") + change


def _since(windows: list[dict[str, Any]], name: str, bound: float) -> str | None:
    """Return the start of the window since which a measure is above its bound; None if the last window is below."""
    since = None
    for window in reversed(windows):
        if window[name] is not None and window[name] <= bound:
            break
        since = window["from"] if window[name] is not None else since
    return since


def _windows(live: Traffic) -> list[Traffic]:
    """Divide traffic into windows of equally many answers."""
    count = max(1, min(WINDOWS, len(live.times) // LEAST_WINDOW))
    bounds = np.linspace(0, len(live.times), count + 1).astype(int)
    parts, words = [], list(live.words)
    for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        last = live.times[end - 1] if end < len(live.times) else np.inf
        inside = [each for each in words if each.time <= last]
        words = words[len(inside) :]
        parts.append(live.part(slice(start, end), inside))
    return parts
