"""Fitting and applying decisions: precision, unknown texts, prediction sets."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from aisle.client import Prediction
from aisle.errors import InputError
from aisle.preprocess.binomial import interval, lowest_share
from aisle.train.core.checkpoint import Checkpoint
from aisle.train.core.decision_fit import fit_decisions, grouped
from aisle.train.core.decisions import ACCEPT, NONE, REVIEW, UNKNOWN, Category, Decisions, levels_of, scores
from aisle.train.core.settings import DecisionTargets
from aisle.train.evaluation.decision_metrics import measure_decisions
from aisle.train.fit.train import _accepted

from .conftest import aisle

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
FLAT = [f"c{i}" for i in range(8)]
TARGETS = DecisionTargets()


def drawn(draw: np.random.Generator, rows: int, labels: int = 8, spread: float = 4) -> tuple[Floats, Ints]:
    """Return logits [rows, labels] of a calibrated model, and categories drawn from their softmax."""
    logits = spread * draw.normal(size=(rows, labels))
    return logits, (scores(logits).probabilities.cumsum(axis=1) > draw.random((rows, 1))).argmax(axis=1)


def of_names(labels: list[str], thresholds: dict[str, float], **given: Any) -> Decisions:
    levels = tuple(
        tuple(Category(name, thresholds.get(name), 1, 1, 0.0) for name in level) for level in levels_of(labels)
    )
    values = {"rows": 1, "largest_energy": None, "least_probability": 0.0, **given}
    return Decisions(targets=TARGETS, levels=levels, **values)


def log(*probabilities: float) -> Floats:
    return np.log([probabilities])


# ---- fitting


def test_the_precision_holds_on_texts_that_were_not_fitted_on() -> None:
    """In 95 % of the draws or more, for each group of categories; the share accepted is that expected."""
    draw = np.random.default_rng(0)
    fresh, truth = drawn(draw, 100_000, spread=6)
    missed = tried = 0
    expected, found = [], []
    for _ in range(60):
        made = fit_decisions(*drawn(draw, 4000, spread=6), FLAT, DecisionTargets(0.95, unknown_share=0))
        decided = made.apply(fresh)
        accepted = decided.outcome == ACCEPT
        groups: dict[float, list[int]] = {}
        for number, category in enumerate(made.levels[0]):
            assert category.threshold is not None
            groups.setdefault(category.threshold, []).append(number)
        for members in groups.values():
            own = accepted & np.isin(decided.category, members)
            tried, missed = tried + 1, missed + bool((truth[own] == decided.category[own]).mean() < 0.95)
        expected.append(made.summary()["accepted"])
        found.append(accepted.mean())
    assert tried >= 120
    assert missed <= 0.05 * tried
    assert np.mean(expected) == pytest.approx(np.mean(found), abs=0.02)
    assert np.mean(found) > 0.3


@pytest.mark.parametrize("error", [0.05, 0.1, 0.3])
def test_prediction_sets_hold_the_category_at_the_promised_rate(error: float) -> None:
    """On average over draws: at least 1 - error, and at most 1 / (rows + 1) more."""
    draw = np.random.default_rng(1)
    fresh, truth = drawn(draw, 20_000, spread=1.5)
    covered = []
    for _ in range(200):
        made = fit_decisions(*drawn(draw, 300, spread=1.5), FLAT, DecisionTargets(set_error=error))
        sizes = made.apply(fresh).set_size
        ranks = (scores(fresh).probabilities > scores(fresh).probabilities[np.arange(len(truth)), truth, None]).sum(1)
        assert sizes.min() >= 1
        covered.append((ranks < sizes).mean())
    assert 1 - error - 0.006 < np.mean(covered) < 1 - error + 1 / 301 + 0.006


def test_few_texts_of_known_categories_are_called_unknown_and_most_others_are() -> None:
    draw = np.random.default_rng(2)
    labels = draw.integers(0, 8, 6000)
    logits = draw.normal(size=(6000, 8)) + 9 * np.eye(8)[labels]
    strange = draw.normal(size=(2000, 8))
    made = fit_decisions(logits[:3000], labels[:3000], FLAT, TARGETS)
    assert (made.apply(logits[3000:]).outcome == UNKNOWN).mean() == pytest.approx(0.01, abs=0.008)
    decided = made.apply(strange)
    assert (decided.outcome == UNKNOWN).mean() > 0.95
    assert set(decided.category[decided.outcome == UNKNOWN]) == {NONE}
    none = fit_decisions(logits[:3000], labels[:3000], FLAT, DecisionTargets(unknown_share=0))
    assert none.largest_energy is None
    assert not (none.apply(strange).outcome == UNKNOWN).any()


@pytest.mark.parametrize("rows", [1, 5, 40])
def test_with_few_texts_nothing_is_promised(rows: int) -> None:
    """No text is accepted or unknown, and with fewer than 19 texts a set holds all categories."""
    logits = 20 * np.eye(8)[np.zeros(rows, int)]
    made = fit_decisions(logits, np.zeros(rows, int), FLAT, TARGETS)
    decided = made.apply(np.concatenate([logits, np.zeros((1, 8))]))
    assert set(decided.outcome) == {REVIEW}
    assert set(decided.category) == {NONE}
    assert decided.set_size[0] == (8 if rows < 19 else 1)


def test_equal_confidences_are_accepted_together() -> None:
    """Half of the texts have one confidence; half of these are wrong, so that none of them can be accepted."""
    sure, unsure = 9 * np.eye(8)[np.zeros(1000, int)], 2 * np.eye(8)[np.zeros(1000, int)]
    actual = np.concatenate([np.zeros(1000, int), np.arange(1000) % 2])
    made = fit_decisions(np.concatenate([sure, unsure]), actual, FLAT, DecisionTargets(unknown_share=0))
    limit = made.levels[0][0].threshold
    assert limit is not None
    low, high = (scores(each[:1]).probabilities.max() for each in (unsure, sure))
    assert limit == pytest.approx((low + high) / 2)  # halfway, so that rounding changes nothing
    assert made.levels[0][0].share == 0.5


def test_a_sure_parent_of_unsure_labels_is_found() -> None:
    """Two labels that look alike have the same parent, which is known."""
    draw = np.random.default_rng(3)
    labels = ["a > x", "a > y", "b"]
    actual = draw.integers(0, 2, 3000)
    logits = np.array([5.0, 5.0, 0.0]) + 0.1 * draw.normal(size=(3000, 3))
    made = fit_decisions(logits, actual, labels, DecisionTargets(unknown_share=0))
    assert [each.threshold for each in made.levels[0]] == [None] * 3
    assert [each.name for each in made.levels[1]] == ["a", "b"]
    decided = made.apply(logits)
    assert set(decided.outcome) == {REVIEW}
    assert {made.names[i] for i in decided.category} == {"a"}
    assert made.levels[1][1].threshold is None  # a label that stands alone on a level was not sure enough before
    assert made.summary()["parents"] == pytest.approx(1, abs=0.05)


def test_categories_with_few_texts_share_a_threshold() -> None:
    best = np.repeat([0, 1, 2, 3, 4], [500, 40, 60, 10, 5])
    confidence = np.repeat([0.9, 0.5, 0.8, 0.7, 0.4], [500, 40, 60, 10, 5])
    everything = np.arange(6)
    assert grouped(best, confidence, everything, 100) == [[0], [2, 3, 1, 4, 5]]  # the surest first
    assert grouped(best, confidence, everything, 50) == [[0], [2], [3, 1, 4, 5]]
    assert grouped(best, confidence, everything, 600) == [[0, 2, 3, 1, 4, 5]]
    assert grouped(best, confidence, everything, 10_000) == [[0, 2, 3, 1, 4, 5]]
    assert grouped(best[:0], confidence[:0], everything, 10) == [[0, 1, 2, 3, 4, 5]]


def test_bounds_of_a_share() -> None:
    """Known values: with no error in n texts the lower bound is error ** (1 / n)."""
    assert float(lowest_share(149, 149, 0.05)) == pytest.approx(0.05 ** (1 / 149))
    assert float(lowest_share(0, 10, 0.05)) == 0
    assert interval(5, 10) == pytest.approx((0.1871, 0.8129), abs=1e-4)  # as in tables of Clopper and Pearson
    assert interval(10, 10)[1] == 1


# ---- applying


def test_decisions_by_hand() -> None:
    labels = ["a > x", "a > y", "b"]
    made = of_names(labels, {"a > x": 0.6, "a > y": 0.9, "a": 0.8}, least_probability=0.19)
    rows = [
        (log(0.7, 0.2, 0.1), ACCEPT, "a > x", 2),
        (log(0.2, 0.7, 0.1), REVIEW, "a", 2),  # sure of the parent only
        (log(0.3, 0.35, 0.35), REVIEW, "", 3),
        (log(0.05, 0.05, 0.9), REVIEW, "", 1),  # a category without a threshold
    ]
    for logits, outcome, category, size in rows:
        decided = made.apply(logits + 3)
        assert (decided.outcome[0], made.names[decided.category[0]], decided.set_size[0]) == (outcome, category, size)
        assert decided.energy[0] == pytest.approx(-3)
    strict = of_names(labels, {"a > x": 0.6}, largest_energy=-3.5, least_probability=0.99)
    decided = strict.apply(log(0.7, 0.2, 0.1) + 3)
    assert (decided.outcome[0], decided.category[0], decided.set_size[0]) == (UNKNOWN, NONE, 1)  # a set is never empty


def test_levels_of_paths_of_different_depth() -> None:
    labels = ["a > x > 1", "b", "a > x > 2", "a > y"]
    assert levels_of(labels) == [labels, ["a > x", "b", "a > y"], ["a", "b"]]
    assert levels_of(["p", "q"]) == [["p", "q"]]
    made = of_names(labels, {"a": 0.75, "a > x": 0.75})
    for probabilities, category in (
        ((0.4, 0.2, 0.4, 0.0), "a > x"),
        ((0.4, 0.2, 0.2, 0.2), "a"),
        ((0.3, 0.7, 0, 0), ""),
    ):
        assert made.names[made.apply(log(*np.maximum(probabilities, 1e-9))).category[0]] == category


def test_decisions_are_written_and_read(tmp_path: Path) -> None:
    made = fit_decisions(*drawn(np.random.default_rng(0), 3000), FLAT, TARGETS)
    made.save(tmp_path)
    assert Decisions.load(tmp_path, FLAT) == made
    with pytest.raises(InputError, match=r"decisions\.json is for other categories; fit it again: aisle decide"):
        Decisions.load(tmp_path, FLAT[1:])
    whole = json.loads((tmp_path / "decisions.json").read_text("utf-8"))
    first, *others = whole["levels"][0]
    for damage in (
        *("{", "[]", "{}", '{"levels": 3}', json.dumps({**whole, "levels": [[]]}), json.dumps({**whole, "more": 1})),
        json.dumps({**whole, "least_probability": "0.1"}),
        json.dumps({**whole, "levels": [[{**first, "threshold": "high"}, *others]]}),
    ):
        (tmp_path / "decisions.json").write_text(damage)
        with pytest.raises(InputError, match=r"decisions\.json is damaged"):
            Decisions.load(tmp_path, FLAT)
    (tmp_path / "decisions.json").unlink()
    assert Decisions.load(tmp_path, FLAT) is None


# ---- measuring


def answer(decision: str, decided: str, members: tuple[str, ...], energy: float = -5.0) -> Prediction:
    return Prediction((members[0],), (0.5,), 1, 0.0, decision, decided, members, energy)


def test_measures_by_hand() -> None:
    labels = ["a > x", "a > x", "a > y", "b", "b"]
    answers = [
        answer("accept", "a > x", ("a > x",)),
        answer("accept", "b", ("b",)),
        answer("review", "a", ("a > x", "a > y")),
        answer("review", "", ("b", "a > x", "a > y")),
        answer("unknown", "", ("b",), -1.0),
    ]
    result = measure_decisions(
        labels, answers, [answer("unknown", "", ("b",), -2.0), answer("accept", "b", ("b",), -6)]
    )
    assert result is not None
    assert result["accepted"] == {
        "share": 0.4,
        "rows": 2,
        "precision": 0.5,
        "low": interval(1, 2)[0],
        "high": interval(1, 2)[1],
    }
    assert (result["parents"]["rows"], result["parents"]["precision"]) == (1, 1)
    assert (result["review"], result["unknown"]) == (0.4, 0.2)
    assert (result["sets"]["coverage"], result["sets"]["mean_size"], result["sets"]["largest_size"]) == (0.8, 1.6, 3)
    own = result["per_category"]["b"]
    assert (own["rows"], own["accepted"]["rows"], own["accepted"]["precision"]) == (2, 1, 0)
    assert (own["sets"]["coverage"], own["sets"]["mean_size"]) == (1, 2)
    assert result["unseen"] == {"rows": 2, "unknown": 0.5, "accepted": 0.5, "auroc": pytest.approx(4 / 10)}
    assert measure_decisions(["a"], [Prediction(("a",), (0.5,))], []) is None


# ---- commands


def test_decisions_are_fitted_again_to_other_targets(checkpoint: Path, sample: Path, tmp_path: Path) -> None:
    copy = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, copy)
    trained = Checkpoint(copy).decisions
    assert trained is not None
    assert trained.targets == DecisionTargets(0.95)
    done = aisle("decide", copy, sample, "--accept-precision", 0.95, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"] == trained.rows  # the same texts as in training
    again = Checkpoint(copy).decisions
    assert again is not None
    assert again.least_probability == pytest.approx(trained.least_probability, abs=1e-5)
    assert again.summary()["accepted"] == trained.summary()["accepted"] > 0

    done = aisle("decide", copy, "--accept-precision", 0.7, "--set-error", 0.2, "--json")
    assert done.returncode == 0, done.stderr
    looser = json.loads(done.stdout)
    assert looser["rows"] == len(Checkpoint(copy).sample.validation.texts)
    assert looser["targets"] == {"accept_precision": 0.7, "set_error": 0.2, "unknown_share": 0.01}
    assert looser["accepted"] > trained.summary()["accepted"]
    assert "expected" in aisle("decide", copy).stdout


def test_a_table_that_was_not_trained_on_gives_more_texts(checkpoint: Path, sample: Path, tmp_path: Path) -> None:
    copy = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, copy)
    shutil.copy(sample, tmp_path / "fresh.csv")
    with (tmp_path / "fresh.csv").open("a", encoding="utf-8") as file:
        file.write("".join(f"完全不同的东西 {i},未知\n" for i in range(5)))
    rows = [
        json.loads(aisle("decide", copy, tmp_path / "fresh.csv", "--json", *more).stdout)["rows"]
        for more in ((), ("--untrained",))
    ]
    assert rows[1] > 5 * rows[0]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--untrained",), "--untrained: needs DATA"),
        (("--accept-precision", 1), "--accept-precision"),
        (("--set-error", 0), "--set-error"),
        (("--unknown-share", 0.9), "--unknown-share"),
    ],
)
def test_bad_arguments_of_decide(checkpoint: Path, arguments: tuple[Any, ...], complaint: str) -> None:
    done = aisle("decide", checkpoint, *arguments)
    assert done.returncode == 2
    assert complaint in done.stderr


def test_decide_needs_a_checkpoint(tmp_path: Path) -> None:
    done = aisle("decide", tmp_path / "missing")
    assert done.returncode == 2
    assert "no such folder" in done.stderr


def test_decide_on_another_table_says_so(checkpoint: Path, tmp_path: Path) -> None:
    """The table has categories of one row, so nobody has trained on it."""
    (tmp_path / "few.csv").write_text("text,category\n苹果,a\n梨,b\n", "utf-8")
    done = aisle("decide", checkpoint, tmp_path / "few.csv")
    assert done.returncode == 2
    assert "give that one, or --untrained" in done.stderr


def test_decide_on_a_model_from_elsewhere(checkpoint: Path, sample: Path, tmp_path: Path) -> None:
    """It has no texts of its own; the messages name its folder, and the next step works."""
    folder = tmp_path / "hf"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        shutil.copy(checkpoint / name, folder / name)
    done = aisle("decide", folder)
    assert done.returncode == 2
    assert f"{folder} has no sample of its texts" in " ".join(done.stderr.split())
    done = aisle("decide", folder, sample, "--untrained")
    assert done.returncode == 0, done.stderr
    assert f"aisle build {folder} --held-out {sample}" in " ".join(done.stderr.split())


@pytest.mark.parametrize(
    ("rows", "says"), [(1000, "of the validation texts are accepted"), (20, "no text is accepted")]
)
def test_training_says_what_is_accepted(rows: int, says: str) -> None:
    logits = 20 * np.eye(8)[np.zeros(rows, int)]
    assert says in _accepted(fit_decisions(logits, np.zeros(rows, int), FLAT, TARGETS))
