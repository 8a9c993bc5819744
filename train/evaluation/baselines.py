"""Baselines: TF-IDF with a linear SVM, and keyword rules such as people write."""

from __future__ import annotations

import math
import re
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from aisle.console import say, track
from aisle.errors import InputError
from aisle.preprocess.clean import LabelledTexts, clean_rows
from aisle.preprocess.han import HAN
from aisle.preprocess.labels import Labelling
from aisle.preprocess.tables.table import read_labelled
from aisle.train.core.linear import LinearSvm
from aisle.train.core.metrics import score
from aisle.train.core.split import is_held_out

KEYWORDS = 20  # for each category, about as many as a person would maintain
RAREST = 3  # a keyword must occur in at least this number of texts
Rules = dict[str, list[str]]
_PARTICLES = "的了是很也都就在和我"  # no keyword begins or ends with one
_RUNS = re.compile(rf"(?P<han>[{HAN}]+)|[^\W_{HAN}]+")


def compare(
    data: Path,
    text_column: str,
    label_column: str,
    texts: Sequence[str],
    actual: Sequence[str],
    predicted: Sequence[str],
    labelling: Labelling = Labelling(),  # noqa: B008 - it is frozen
) -> list[dict[str, Any]]:
    """Fit the baselines on the training part of a table and score them on cleaned texts, beside a model's predictions.

    `only_model_right` and `only_baseline_right` count the texts that only one of the two gets right. `p_value` is the
    p-value of McNemar's test (normal approximation) that both are equally good.

    Raises:
        InputError: the table's training part has fewer than two categories.
    """
    table, _ = clean_rows(read_labelled(data, text_column, label_column), labelling)
    rows = [row for row in zip(table.texts, table.labels, strict=True) if not is_held_out(row[0])]
    train = LabelledTexts([text for text, _ in rows], [label for _, label in rows])
    if len(set(train.labels)) < 2:
        raise InputError(
            f"{data}: the training part has {len(set(train.labels))} categories; baselines need two or more"
        )
    say(f"fitting the baselines on {len(rows)} texts")

    start = time.perf_counter()
    svm = LinearSvm(train).predict(texts)
    seconds = round(time.perf_counter() - start, 1)
    return [
        {"name": "TF-IDF + linear SVM", "seconds": seconds, **_versus(actual, predicted, svm)},
        _measure_rules(train, texts, actual, predicted),
    ]


def _measure_rules(
    train: LabelledTexts, texts: Sequence[str], actual: Sequence[str], predicted: Sequence[str]
) -> dict[str, Any]:
    """Return the scores of keyword rules; texts without a keyword get the most frequent category."""
    start = time.perf_counter()
    rules = learn_rules(train)
    most_frequent = Counter(train.labels).most_common(1)[0][0]
    matches = apply_rules(rules, texts)
    seconds = time.perf_counter() - start
    matched = [(label, match) for label, match in zip(actual, matches, strict=True) if match is not None]
    return {
        "name": "keyword rules",
        "seconds": round(seconds, 1),
        **_versus(actual, predicted, [most_frequent if match is None else match for match in matches]),
        "matched": len(matched) / len(actual),
        "accuracy_where_matched": sum(a == b for a, b in matched) / len(matched) if matched else None,
        "rules": rules,
    }


def _versus(actual: Sequence[str], model: Sequence[str], baseline: Sequence[str]) -> dict[str, Any]:
    pairs = [(a == m, a == b) for a, m, b in zip(actual, model, baseline, strict=True)]
    ours, theirs = pairs.count((True, False)), pairs.count((False, True))
    deviation = max(0, abs(ours - theirs) - 1) / math.sqrt(max(1, ours + theirs))
    scores = score(actual, baseline)
    del scores["per_class"]
    return {
        **scores,
        "only_model_right": ours,
        "only_baseline_right": theirs,
        "p_value": math.erfc(deviation / math.sqrt(2)),
    }


def words(text: str) -> set[str]:
    """Return the possible keywords: words, and runs of 2 or 3 Chinese characters."""
    return set(_words(text.casefold()))


def _words(text: str) -> Iterator[str]:
    for found in _RUNS.finditer(text):
        run = found[0]
        if not found["han"]:
            yield run
        else:
            pieces = (run[i : i + n] for n in (2, 3) for i in range(len(run) - n + 1))
            yield from (piece for piece in pieces if not {piece[0], piece[-1]} & set(_PARTICLES))


def learn_rules(train: LabelledTexts) -> Rules:
    """Return the words of each category with the highest chi-squared.

    No Chinese keyword is part of another of its category, because one occurrence would count twice.
    """
    total = Counter(word for text in track(train.texts, "counting words") for word in words(text))
    frequent = {word: n for word, n in total.items() if n >= RAREST}
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for text, label in zip(train.texts, train.labels, strict=True):
        found[label].update(words(text) & frequent.keys())
    sizes = Counter(train.labels)
    rules: Rules = {}
    for label in sorted(found):
        weights = {
            word: _chi_squared(n, frequent[word], sizes[label], len(train.texts)) for word, n in found[label].items()
        }
        chosen: list[str] = []
        for word in sorted(weights, key=lambda word: (-weights[word], word)):
            if len(chosen) == KEYWORDS or weights[word] <= 0:
                break
            if word.isascii() or not any(word in other or other in word for other in chosen):
                chosen.append(word)
        rules[label] = chosen
    return rules


def _chi_squared(both: int, word: int, label: int, texts: int) -> float:
    """Return chi-squared of a 2 × 2 table of text counts; 0 where the word is rarer in the category than elsewhere."""
    excess = both * texts - word * label
    return texts * excess**2 / (word * (texts - word) * label * (texts - label)) if excess > 0 and word < texts else 0.0


def apply_rules(rules: Rules, texts: Sequence[str]) -> list[str | None]:
    """Return the category with the most keywords in each text, the first of equals; None where no keyword occurs."""
    categories: dict[str, list[str]] = defaultdict(list)
    for label, keywords in rules.items():
        for keyword in keywords:
            categories[keyword].append(label)
    answers: list[str | None] = []
    for text in texts:
        votes = Counter(label for word in sorted(words(text)) for label in categories.get(word, ()))
        answers.append(min(votes, key=lambda label: (-votes[label], label)) if votes else None)
    return answers
