"""The linear SVM: a baseline, and a teacher for distillation."""

import random

import numpy as np
import pytest
import torch

from aisle.errors import InputError
from aisle.preprocess.clean import LabelledTexts
from aisle.train.core.linear import LinearSvm, LinearTeacher

LABELS = ["水果", "配件", "鞋"]
WORDS = {
    "水果": ["苹果", "香蕉", "红富士", "脆甜"],
    "配件": ["手机壳", "防摔", "耳机", "数据线"],
    "鞋": ["运动鞋", "跑步"],
}


def shop(rows: int, wrong: float, seed: int = 0) -> LabelledTexts:
    """Titles with words of their category; a share of them has a wrong category."""
    rng = random.Random(seed)
    table = LabelledTexts([], [])
    for _ in range(rows):
        label = rng.choice(LABELS)
        table.texts.append(" ".join(rng.choices(WORDS[label], k=3)) + f" {rng.getrandbits(96):x}")
        table.labels.append(rng.choice(LABELS) if rng.random() < wrong else label)
    return table


def test_the_svm_learns() -> None:
    train = shop(100, wrong=0)
    svm = LinearSvm(train)
    texts = ["苹果 红富士 一箱", "手机壳 防摔"]
    assert svm.predict(texts) == ["水果", "配件"]
    assert svm.scores(texts, LABELS).argmax(axis=1).tolist() == [0, 1]


def test_an_unseen_category_is_ranked_last() -> None:
    table = shop(100, wrong=0)
    rows = [each for each in zip(table.texts, table.labels, strict=True) if each[1] != "鞋"]
    svm = LinearSvm(LabelledTexts([text for text, _ in rows], [label for _, label in rows]))
    scores = svm.scores(["苹果 脆甜", "防摔 耳机"], ["鞋", "水果", "配件"])
    assert scores.argmax(axis=1).tolist() == [1, 2]
    assert np.array_equal(scores[:, 0], scores.min(axis=1))


def test_cross_fitting_prevents_overconfidence_on_training_texts() -> None:
    """Many labels are wrong: an SVM memorizes them, a cross-fitted one does not."""
    train, new = shop(400, wrong=0.5), shop(400, wrong=0.5, seed=1)
    teacher = LinearTeacher(train, LABELS)

    def loss(table: LabelledTexts) -> float:
        logits = torch.from_numpy(teacher.logits(table.texts))
        return float(torch.nn.functional.cross_entropy(logits, torch.tensor([*map(LABELS.index, table.labels)])))

    by_heart = LinearSvm(train).predict(train.texts)
    assert np.mean([a == b for a, b in zip(by_heart, train.labels, strict=True)]) > 0.9
    assert loss(train) == pytest.approx(loss(new), abs=0.1)
    assert 0.7 < loss(new) < np.log(3)  # calibrated: better than not knowing


def test_too_few_texts_for_cross_fitting_are_refused() -> None:
    with pytest.raises(InputError, match="too few for an SVM to teach; add texts, or leave out --linear-share"):
        LinearTeacher(LabelledTexts(["苹果 红富士", "手机壳 防摔"], ["水果", "配件"]), ["水果", "配件"])
