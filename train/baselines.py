"""What a classifier has to beat: TF-IDF with a linear SVM, and keyword rules as people write them."""

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
from aisle.preprocess.clean import Table, clean_rows
from aisle.preprocess.table import read_labelled
from aisle.train.data import is_held_out
from aisle.train.linear import LinearSvm
from aisle.train.metrics import score

KEYWORDS = 20  # of a category: what a person would keep up
RAREST = 3  # texts that a keyword must occur in
Rules = dict[str, list[str]]
_PARTICLES = "的了是很也都就在和我"  # no keyword begins or ends with one
_RUNS = re.compile(r"[\u3400-\u9fff]+|[^\W_\u3400-\u9fff]+")


def compare(
    data: Path,
    text_column: str,
    label_column: str,
    texts: Sequence[str],
    actual: Sequence[str],
    predicted: Sequence[str],
) -> list[dict[str, Any]]:
    """Fit the baselines on the training part of a table and score them on cleaned texts, beside a model's predictions.

    `only_model_right` and `only_baseline_right` count the texts on which the two differ; `p_value` is how probable so
    uneven a division would be if both were equally good (McNemar's test, by the normal distribution).

    Raises:
        InputError: the table's training part has fewer than two categories.
    """
    table, _ = clean_rows(read_labelled(data, text_column, label_column))
    rows = [row for row in zip(table.texts, table.labels, strict=True) if not is_held_out(row[0])]
    train = Table([text for text, _ in rows], [label for _, label in rows])
    if len(set(train.labels)) < 2:
        raise InputError(
            f"{data}: the training part has {len(set(train.labels))} categories; baselines need two or more"
        )
    say(f"fitting the baselines on {len(rows)} texts")

    start = time.perf_counter()
    svm = LinearSvm(train).predict(texts)
    svm_seconds = time.perf_counter() - start
    start = time.perf_counter()
    rules = learn_rules(train)
    commonest = Counter(train.labels).most_common(1)[0][0]
    matches = apply_rules(rules, texts)
    rules_seconds = time.perf_counter() - start
    matched = [(label, match) for label, match in zip(actual, matches, strict=True) if match is not None]
    return [
        {"name": "TF-IDF + linear SVM", "seconds": round(svm_seconds, 1), **_versus(actual, predicted, svm)},
        {
            "name": "keyword rules",
            "seconds": round(rules_seconds, 1),
            **_versus(actual, predicted, [commonest if match is None else match for match in matches]),
            "matched": len(matched) / len(actual),
            "accuracy_where_matched": sum(a == b for a, b in matched) / len(matched) if matched else None,
            "rules": rules,
        },
    ]


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
    """Return what a keyword may be: a word, or 2 or 3 neighbouring Chinese characters."""
    return set(_words(text.casefold()))


def _words(text: str) -> Iterator[str]:
    for run in _RUNS.findall(text):
        if run[0] < "\u3400" or run[0] > "\u9fff":
            yield run
        else:
            pieces = (run[i : i + n] for n in (2, 3) for i in range(len(run) - n + 1))
            yield from (piece for piece in pieces if not {piece[0], piece[-1]} & set(_PARTICLES))


def learn_rules(train: Table) -> Rules:
    """Return the most telling words of each category by chi-squared, as people choose them from experience.

    No Chinese keyword is part of another of its category: one occurrence would count twice.
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
    """Return chi-squared of a 2 × 2 table of text counts; 0 where the word speaks against the category."""
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
