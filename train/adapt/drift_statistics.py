"""Drift's measures: how far a part of the traffic is from the held-out texts, and the bounds of each measure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import stats
from scipy.spatial.distance import jensenshannon

from aisle.preprocess.labels import SEPARATOR
from aisle.train.adapt.drift_log import Floats, Integers, Traffic, WordCounts

CLUSTERING = 2  # words that weigh as much as one independent word; in product reviews, 1.25 were measured
REST = "…"  # stands for the rare categories below a level of the path


class Rule(NamedTuple):
    """The bounds of a measure: above `watch` it needs attention, above `retrain` (if any) a retraining."""

    title: str
    unit: str
    watch: float
    retrain: float | None

    def exceeded(self, value: float) -> float:
        """Return the highest bound that a value exceeds; 0 if it exceeds none."""
        if self.retrain is not None and value > self.retrain:
            return self.retrain
        return self.watch if value > self.watch else 0.0


# A measure counts only if it is also significant. The bounds of the population stability index (PSI) come from credit
# scoring: below 0.1 nothing has changed, above 0.2 the model is rebuilt (Siddiqi 2006, "Credit Risk Scorecards";
# Yurdakul 2018, "Statistical properties of population stability index"). The other bounds are our choice: one more
# text in 20 is wrong, one more word in 20 is new, or one text in 5 has fallen below some threshold of confidence.
# A change of the lengths alone does no harm.
RULES = {
    "label_mix": Rule("mix of the predicted categories", "PSI", 0.1, 0.2),
    "accuracy": Rule("loss of accuracy, estimated", "share of texts", 0.02, 0.05),
    "confidence": Rule("fall of confidence", "Kolmogorov-Smirnov distance", 0.1, 0.2),
    "out_of_vocabulary": Rule("rise of words out of the vocabulary", "share of words", 0.02, 0.05),
    "wording": Rule("mix of the words", "PSI", 0.1, 0.2),
    "length": Rule("lengths of the texts", "PSI", 0.1, None),
}
ALPHA = 0.001  # significance level; it is low because there are six measures, perhaps every day


@dataclass
class Reference:
    """A checkpoint's predictions on held-out texts, and their accuracy."""

    traffic: Traffic
    accuracy: float


def comparison(reference: Reference, live: Traffic) -> Callable[[Traffic], dict[str, dict[str, Any]]]:
    """Return a function that measures a part of the traffic. All traffic decides which rare categories are merged.

    Each measure has a `value`, which `RULES` bounds, a `p_value`, and further figures.
    """
    usual = reference.traffic
    cell = pool(Counter(usual.categories.tolist()), [*usual.categories, *live.categories], len(live.times))
    names = sorted(set(cell.values()))
    mix = _histogram(usual.categories, cell, names)
    # Average thresholded confidence, ATC (Garg et al. 2022, arXiv:2201.04234): the share of held-out texts above this
    # threshold equals their accuracy. So the share of traffic above it estimates the accuracy on traffic.
    threshold = float(np.quantile(usual.confidence, 1 - reference.accuracy))
    edges = np.unique(np.quantile(usual.lengths, np.linspace(0, 1, 11)[1:-1]))
    lengths = np.bincount(np.searchsorted(edges, usual.lengths), minlength=len(edges) + 1)
    known = usual.words[0]

    def compare(part: Traffic) -> dict[str, dict[str, Any]]:
        found = {"label_mix": _compare_mix(names, mix, _histogram(part.categories, cell, names))}
        found["accuracy"] = _compare_accuracy(reference, part, threshold)
        found["confidence"] = _compare_confidence(usual, part)
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


def _compare_confidence(usual: Traffic, part: Traffic) -> dict[str, Any]:
    # One-sided, because only lower confidence does harm.
    test = stats.ks_2samp(part.confidence, usual.confidence, alternative="greater", method="asymp")
    return {
        "value": float(test.statistic),
        "p_value": float(test.pvalue),
        "reference": float(usual.confidence.mean()),
        "live": float(part.confidence.mean()),
    }


def pool(counts: Counter[str], labels: Iterable[str], live: int) -> dict[str, str]:
    """Return the cell of each label: itself, or the lowest level above it with enough texts for a comparison.

    A cell needs five expected texts in the smaller of the two sets (Cochran 1954). Labels without a parent are merged.
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
    """Return the population stability index of two histograms, minus its expected value if nothing has changed.

    That is (cells - 1) (1 / n + 1 / m) (Yurdakul 2018).
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
    """Return the p-value of Pearson's chi-squared test that both rows of counts [2, cells] have the same mix."""
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
    """Estimate the accuracy in two ways and take the lower, because each can miss a loss that the other finds."""
    usual = reference.traffic.confidence
    above = [int((each >= threshold).sum()) for each in (usual, part.confidence)]
    below = [len(usual) - above[0], len(part.confidence) - above[1]]
    thresholded = above[0] / len(usual) - above[1] / len(part.confidence)
    # Difference of confidences, DoC (Guillory et al. 2021, arXiv:2107.03315): if calibrated, it falls with accuracy.
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


def _compare_words(known: WordCounts, blocks: Sequence[WordCounts]) -> dict[str, dict[str, Any]]:
    texts, words = sum(each.texts for each in blocks), sum(each.words for each in blocks)
    if not words or not known.words:
        return {}
    cells = np.sum([each.cells for each in blocks], axis=0)
    usual, live = min(1.0, known.unknown / known.words), min(1.0, sum(each.unknown for each in blocks) / words)
    # New words occur together, so each text counts once in the test, not each of its words.
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
