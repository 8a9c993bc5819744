"""Drift: does live traffic still look like what a checkpoint was trained on? Compares a log with its held-out texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import stats
from scipy.spatial.distance import jensenshannon

from aisle.console import track
from aisle.errors import InputError
from aisle.preprocess import vocabulary
from aisle.preprocess.clean import Table, TextError, prepare
from aisle.preprocess.encode import Encoder
from aisle.preprocess.table import as_text, read_rows, require
from aisle.train.calibrate import softmax
from aisle.train.checkpoint import load_model, read_labels
from aisle.train.evaluate import logits_of
from aisle.train.metrics import SEPARATOR
from aisle.train.sample import read_sample, sample_of

LEAST = 200  # answers: fewer tell nothing
WINDOWS = 12  # of equal numbers of answers
LEAST_WINDOW = 250
BLOCK = 250  # texts of a table whose words are counted together
CELLS = 256  # that the buckets of words are folded into, so that each has words enough to compare
CLUSTERING = 2  # words that tell as much as an independent one; 1.25 in product reviews, by the spread of their mix
REST = "…"  # stands for the rare categories below a level of the path

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


class Rule(NamedTuple):
    """From where on a measure is to be watched, and from where on it is a reason to retrain (None: it never is)."""

    title: str
    unit: str
    watch: float
    retrain: float | None

    def passed(self, value: float) -> float:
        """Return the higher of the bounds that a value is above; 0 if it is above none."""
        if self.retrain is not None and value > self.retrain:
            return self.retrain
        return self.watch if value > self.watch else 0.0


# A measure must also be beyond chance. The bounds of the population stability index (PSI) are those of credit scoring,
# where it comes from: below 0.1 nothing has changed, above 0.2 the model is to be made anew (Siddiqi 2006, "Credit Risk
# Scorecards"; Yurdakul 2018, "Statistical properties of population stability index"). The others are our own choice:
# one text in 20 more is wrong, one word in 20 more is new, one text in 5 has fallen below some threshold of confidence
# above which it lay. Texts of other lengths are no harm in themselves.
RULES = {
    "label_mix": Rule("mix of the predicted categories", "PSI", 0.1, 0.2),
    "accuracy": Rule("loss of accuracy, estimated", "share of texts", 0.02, 0.05),
    "confidence": Rule("fall of confidence", "Kolmogorov-Smirnov distance", 0.1, 0.2),
    "out_of_vocabulary": Rule("rise of words out of the vocabulary", "share of words", 0.02, 0.05),
    "wording": Rule("mix of the words", "PSI", 0.1, 0.2),
    "length": Rule("lengths of the texts", "PSI", 0.1, None),
}
ALPHA = 0.001  # probability under no change below which a measure is beyond chance; there are six, looked at each day


class Words(NamedTuple):
    """The words of some texts, counted together."""

    time: float  # seconds of the epoch, of the last text; the number of the row where there is no time
    texts: int
    words: int
    unknown: float  # words that the checkpoint's vocabulary lacks, estimated
    cells: Integers  # [CELLS]


@dataclass
class Traffic:
    """Answered texts, in the order of time."""

    times: Floats  # [texts]
    dated: bool
    categories: npt.NDArray[np.object_]  # [texts]
    confidence: Floats  # [texts]
    lengths: Floats  # [texts], characters; NaN where unknown
    words: list[Words]

    def part(self, chosen: slice | npt.NDArray[np.bool_], words: list[Words]) -> Traffic:
        return Traffic(
            self.times[chosen],
            self.dated,
            self.categories[chosen],
            self.confidence[chosen],
            self.lengths[chosen],
            words,
        )


class Counting:
    """Counts words against a vocabulary."""

    def __init__(self, entries: Iterable[str]) -> None:
        self._known = np.zeros(vocabulary.BUCKETS, np.bool_)
        self._known[[vocabulary.bucket(entry) for entry in entries]] = True

    def __call__(self, time: float, texts: int, counts: Mapping[int, int]) -> Words:
        buckets = np.fromiter(counts.keys(), np.int64, len(counts))
        numbers = np.fromiter(counts.values(), np.int64, len(counts))
        # A new word falls into the bucket of a known one as often as buckets are taken: so many are new, unseen.
        unknown = float(numbers[~self._known[buckets]].sum() / max(1e-9, 1 - self._known.mean()))
        cells = np.bincount(buckets % CELLS, numbers, CELLS).astype(np.int64)
        total = int(numbers.sum())
        return Words(time, texts, total, unknown, cells)


@dataclass
class Reference:
    """What a checkpoint says of texts that it was not trained on, and how often that is true."""

    traffic: Traffic
    accuracy: float


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
    writes it; `time` and a text column are made use of if they are there.

    Args:
        data: the table that the checkpoint was trained on, if it carries no sample of it.
        days: only so many days before the log's last line count.
        report: the HTML page to write.

    Returns:
        `retrain`, the `reasons` for it, what else to `watch`, all `measures`, and their course over `windows` of time.

    Raises:
        InputError: the log cannot be read or is too short, or it is of another model.
    """
    labels = read_labels(checkpoint)
    encoder = Encoder(checkpoint / "tokenizer.json")
    counting = Counting(encoder.entries())
    live, skipped = read_log(log, labels, counting, text_column)
    if days is not None:
        live = _last(live, days, log)
    if len(live.times) < LEAST:
        raise InputError(f"{log}: {len(live.times)} answers are too few to tell drift from chance; log {LEAST} or more")
    sample = sample_of(data, text_column, label_column, labels) if data else read_sample(checkpoint)
    reference = refer(checkpoint, labels, encoder, counting, sample.held_out)
    result = {
        "checkpoint": str(checkpoint),
        "log": str(log),
        "rows": len(live.times),
        "skipped": dict(skipped),
        "reference_rows": len(reference.traffic.times),
        **_span(live),
        **judge(reference, live),
    }
    if report:
        from aisle.train.drift_report import write_report

        write_report(result, reference.traffic, live, report)
    return result


def refer(checkpoint: Path, labels: list[str], encoder: Encoder, counting: Counting, table: Table) -> Reference:
    """Classify the held-out texts of a checkpoint's sample."""
    logits = logits_of(load_model(checkpoint), encoder.tokens(table.texts), "classifying held-out texts")
    predicted = np.array(labels, np.object_)[logits.argmax(axis=1)]
    traffic = Traffic(
        np.arange(len(predicted), dtype=np.float64),
        False,
        predicted,
        softmax(logits).max(axis=1).astype(np.float64),
        np.array([len(text) for text in table.texts], np.float64),
        [counting(0, len(table.texts), vocabulary.count(table.texts))],
    )
    return Reference(traffic, float(np.mean(predicted == np.array(table.labels, np.object_))))


def read_log(path: Path, labels: Sequence[str], counting: Counting, text_column: str) -> tuple[Traffic, Counter[str]]:
    """Read a log; return it with the number of rows left out, by reason.

    Raises:
        InputError: it cannot be read, lacks a column, or names a category that is none of `labels`.
    """
    names = {label: label for label in labels}  # one string for all its rows
    times, categories, confidences, lengths = [], [], [], []
    logged: list[Words] = []  # as TrafficLog counted them
    counted: list[Words] = []  # from the texts
    pending: list[str] = []
    skipped: Counter[str] = Counter()
    dated = None
    for number, row in enumerate(track(read_rows(path), "reading"), start=1):
        where = f"{path}, row {number}"
        if "words" in row and "category" not in row:
            logged.append(_counts(row, where, counting))
            continue
        if dated is None:
            require(row, ["category", "confidence"], path)
            dated = "time" in row
        if row.get("category") in (None, ""):
            skipped["not answered"] += 1
            continue
        time = _time(row.get("time"), where) if dated else float(number)
        category = names.get(str(row["category"]))
        if category is None:
            raise InputError(
                f"{where}: category {row['category']!r} is unknown to the checkpoint; was another one served?"
            )
        times.append(time)
        categories.append(category)
        confidences.append(_confidence(row.get("confidence"), where))
        text = as_text(row.get(text_column))
        length = float("nan")
        if text:
            try:
                text = prepare(text)
                length = len(text)
                pending.append(text)
            except TextError as error:
                skipped[f"words: {error.reason}"] += 1
        lengths.append(float(row["length"]) if isinstance(row.get("length"), int) else length)
        if len(pending) == BLOCK:
            counted.append(counting(time, len(pending), vocabulary.count(pending)))
            pending.clear()
    if pending:
        counted.append(counting(times[-1], len(pending), vocabulary.count(pending)))
    if not times:
        raise InputError(f"{path}: no row with a category")
    order = np.argsort(times, kind="stable")
    traffic = Traffic(
        np.array(times)[order],
        bool(dated),
        np.array(categories, np.object_)[order],
        np.array(confidences)[order],
        np.array(lengths)[order],
        sorted(logged or counted, key=lambda each: each.time),
    )
    return traffic, skipped


def _counts(row: dict[str, Any], where: str, counting: Counting) -> Words:
    try:
        return counting(_time(row["time"], where), int(row["texts"]), {int(k): int(n) for k, n in row["words"].items()})
    except (KeyError, ValueError, TypeError, AttributeError, IndexError):
        raise InputError(f"{where}: damaged counts of words; delete the line") from None


def _time(value: Any, where: str) -> float:
    try:
        time = value if isinstance(value, datetime) else datetime.fromisoformat(str(value))
    except ValueError:
        raise InputError(f"{where}: time {value!r} is none; write it as 2026-11-24T08:18:42Z") from None
    return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()


def _confidence(value: Any, where: str) -> float:
    try:
        confidence = float(value)
    except (TypeError, ValueError):
        confidence = float("nan")
    if not 0 <= confidence <= 1.0001:  # fp32 may round up
        raise InputError(f"{where}: confidence {value!r} is no probability; give one from 0 to 1")
    return confidence


def _last(live: Traffic, days: float, log: Path) -> Traffic:
    if not live.dated:
        raise InputError(f"{log}: --days needs a column 'time'")
    since = live.times[-1] - days * 86400
    return live.part(live.times >= since, [each for each in live.words if each.time >= since])


def _span(traffic: Traffic) -> dict[str, Any]:
    """Return the time of the first and the last text; where there is no time, their rows."""
    first, last = traffic.times[[0, -1]].tolist()
    if not traffic.dated:
        return {"from": f"row {first:.0f}", "to": f"row {last:.0f}"}
    return {"from": _show_time(first), "to": _show_time(last)}


def _show_time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


def judge(reference: Reference, live: Traffic) -> dict[str, Any]:
    """Return the verdict and all that it rests on.

    Each measure is judged over all traffic and over its last third, which what came before does not dilute; the graver
    finding counts.
    """
    compare = comparison(reference, live)
    measures = compare(live)
    recently = compare(_latest(live)) if len(live.times) >= 3 * LEAST else {}
    windows = []
    for part in _windows(live):
        values = compare(part)
        windows.append(
            {
                **_span(part),
                "rows": len(part.times),
                "mean_confidence": float(part.confidence.mean()),
                **{name: values[name]["value"] if name in values else None for name in RULES},
            }
        )
    reasons: list[dict[str, Any]] = []
    watch: list[dict[str, Any]] = []
    for name, rule in RULES.items():
        found = [
            (when, each[name]) for when, each in (("", measures), ("in the last third ", recently)) if name in each
        ]
        passed = [(rule.passed(each["value"]), when, each) for when, each in found if each["p_value"] < ALPHA]
        bound, when, measure = max(passed, key=lambda each: each[0], default=(0.0, "", {}))
        if bound:
            told = f"{rule.title}: {when}{measure['value']:.3f} ({rule.unit}), above {bound:g}; {_told(name, measure)}"
            (reasons if bound == rule.retrain else watch).append(
                {"measure": name, "reason": told, "since": _since(windows, name, bound)}
            )
    return {
        "retrain": bool(reasons),
        "reasons": reasons,
        "watch": watch,
        "measures": measures,
        "last_third": recently,
        "windows": windows,
    }


def _latest(live: Traffic) -> Traffic:
    """Return the last third of the answers."""
    start = len(live.times) - len(live.times) // 3
    return live.part(slice(start, None), [each for each in live.words if each.time > live.times[start]])


def _told(name: str, measure: dict[str, Any]) -> str:
    """Say in words what a measure found."""
    if name == "label_mix":
        moved = sorted(measure["categories"], key=lambda each: -abs(each["live"] - each["reference"]))[:2]
        return ", ".join(f"{each['category']} {each['reference']:.1%} → {each['live']:.1%}" for each in moved)
    if name == "wording":
        return f"{measure['words']} words"
    change = f"{measure['reference']:.3f} → {measure['live']:.3f}"
    return {"length": "median ", "confidence": "mean "}.get(name, "") + change


def _since(windows: list[dict[str, Any]], name: str, bound: float) -> str | None:
    """Return when the window began from which on a measure stayed above its bound; None if the last was below."""
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


def comparison(reference: Reference, live: Traffic) -> Callable[[Traffic], dict[str, dict[str, Any]]]:
    """Return what measures a part of the traffic; rare categories are put together as the whole of it allows.

    Each measure has its `value`, to be held against `RULES`, its `p_value`, and more to tell of it.
    """
    usual = reference.traffic
    cell = pool(Counter(usual.categories.tolist()), [*usual.categories, *live.categories], len(live.times))
    names = sorted(set(cell.values()))
    mix = _histogram(usual.categories, cell, names)
    # Average thresholded confidence, ATC (Garg et al. 2022, arXiv:2201.04234): of the held-out texts as many lie above
    # this confidence as are right; the share above it in traffic estimates the accuracy there.
    threshold = float(np.quantile(usual.confidence, 1 - reference.accuracy))
    edges = np.unique(np.quantile(usual.lengths, np.linspace(0, 1, 11)[1:-1]))
    lengths = np.bincount(np.searchsorted(edges, usual.lengths), minlength=len(edges) + 1)
    known = usual.words[0]

    def compare(part: Traffic) -> dict[str, dict[str, Any]]:
        found = {"label_mix": _compare_mix(names, mix, _histogram(part.categories, cell, names))}
        found["accuracy"] = _compare_accuracy(reference, part, threshold)
        # One-sided: only lower confidence does harm.
        test = stats.ks_2samp(part.confidence, usual.confidence, alternative="greater", method="asymp")
        found["confidence"] = {
            "value": float(test.statistic),
            "p_value": float(test.pvalue),
            "reference": float(usual.confidence.mean()),
            "live": float(part.confidence.mean()),
        }
        if part.words:
            found |= _compare_words(known, part.words)
        measured = part.lengths[~np.isnan(part.lengths)]
        if len(measured):
            counts = np.bincount(np.searchsorted(edges, measured), minlength=len(edges) + 1)
            found["length"] = {
                "value": stability(lengths, counts),
                "p_value": _independent(np.array([lengths, counts])),
                "reference": float(np.median(usual.lengths)),
                "live": float(np.median(measured)),
            }
        return found

    return compare


def pool(counts: Counter[str], labels: Iterable[str], live: int) -> dict[str, str]:
    """Return the cell of each label: itself, or the level above it that has enough texts for a comparison.

    Five are expected of a cell in the smaller of the two sets (Cochran 1954). What has no level above is put together.
    """
    least = 5 * max(1.0, counts.total() / live)
    cell = {label: label for label in labels}
    while True:
        sizes: Counter[str] = Counter()
        for label, name in cell.items():
            sizes[name] += counts[label]
        small = {name for name, size in sizes.items() if size < least and name != REST}
        if not small:
            return cell
        cell = {label: _above(name) if name in small else name for label, name in cell.items()}


def _above(name: str) -> str:
    levels = name.removesuffix(SEPARATOR + REST).split(SEPARATOR)[:-1]
    return SEPARATOR.join([*levels, REST])


def _histogram(categories: Iterable[str], cell: Mapping[str, str], names: Sequence[str]) -> Integers:
    counts = Counter(cell[category] for category in categories)
    return np.array([counts[name] for name in names])


def stability(reference: Integers, live: Integers) -> float:
    """Return the population stability index of two histograms, less what chance alone makes of it.

    Where nothing has changed, it is (cells - 1) (1 / n + 1 / m) on average (Yurdakul 2018).
    """
    occupied = (reference + live) > 0
    p, q = _shares(reference[occupied]), _shares(live[occupied])
    chance = (len(p) - 1) * float(1 / reference.sum() + 1 / live.sum())
    return max(0.0, float(((q - p) * np.log(q / p)).sum()) - chance)


def _shares(counts: Integers) -> Floats:
    """Return shares, none of which is zero."""
    shares: Floats = (counts + 0.5) / (counts + 0.5).sum()
    return shares


def _independent(counts: npt.NDArray[Any]) -> float:
    """Return the p-value of Pearson's chi-squared test of counts [2, cells]: that both rows are of one mix."""
    counts = counts[:, counts.sum(axis=0) > 0]
    return float(stats.chi2_contingency(counts, correction=False).pvalue) if counts.shape[1] > 1 else 1.0


def _compare_mix(names: Sequence[str], reference: Integers, live: Integers) -> dict[str, Any]:
    p, q = reference / reference.sum(), live / live.sum()
    return {
        "value": stability(reference, live),
        "p_value": _independent(np.array([reference, live])),
        "jensen_shannon": float(jensenshannon(p, q, base=2) ** 2),  # scipy gives the root; bits, from 0 to 1
        "categories": [
            {"category": name, "reference": a, "live": b}
            for name, a, b in zip(names, p.tolist(), q.tolist(), strict=True)
        ],
    }


def _compare_accuracy(reference: Reference, part: Traffic, threshold: float) -> dict[str, Any]:
    """Estimate the accuracy in two ways, and take the worse: where one is blind, the other may see."""
    usual = reference.traffic.confidence
    above = [int((each >= threshold).sum()) for each in (usual, part.confidence)]
    below = [len(usual) - above[0], len(part.confidence) - above[1]]
    thresholded = above[0] / len(usual) - above[1] / len(part.confidence)
    # Difference of confidences, DoC (Guillory et al. 2021, arXiv:2107.03315): calibrated, they fall as accuracy does.
    difference = float(usual.mean() - part.confidence.mean())
    if thresholded > difference:
        value, p_value = thresholded, _independent(np.array([above, below]).T)
    else:
        test = stats.ttest_ind(usual, part.confidence, equal_var=False, alternative="greater")
        value, p_value = difference, float(test.pvalue)
    return {
        "value": max(0.0, value),
        "p_value": p_value,
        "reference": reference.accuracy,
        "live": min(1.0, reference.accuracy - value),
        "by_thresholded_confidence": min(1.0, reference.accuracy - thresholded),
        "by_difference_of_confidences": min(1.0, reference.accuracy - difference),
    }


def _compare_words(known: Words, blocks: Sequence[Words]) -> dict[str, dict[str, Any]]:
    texts, words = sum(each.texts for each in blocks), sum(each.words for each in blocks)
    if not words or not known.words:
        return {}
    cells = np.sum([each.cells for each in blocks], axis=0)
    usual, live = min(1.0, known.unknown / known.words), min(1.0, sum(each.unknown for each in blocks) / words)
    # New words come in company, so a text counts once here, not each of its words.
    shares = np.array([[usual * known.texts, live * texts], [(1 - usual) * known.texts, (1 - live) * texts]]).T
    return {
        "out_of_vocabulary": {
            "value": max(0.0, live - usual),
            "p_value": _independent(shares),
            "reference": usual,
            "live": live,
        },
        "wording": {
            "value": stability(known.cells, cells),
            "p_value": _independent(np.array([known.cells, cells]) / CLUSTERING),
            "words": words,
        },
    }
