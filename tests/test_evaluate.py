import json
import random
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aisle.cli import run
from aisle.client import Classifier, Failure, Prediction
from aisle.errors import InputError
from aisle.preprocess.clean import LabelledTexts
from aisle.preprocess.labels import Labelling, fold_variants
from aisle.preprocess.tables.table import read_rows
from aisle.preprocess.tables.writing import write_rows
from aisle.train.core import metrics
from aisle.train.core.calibration import calibration, fit_temperature, softmax
from aisle.train.core.checkpoint import Checkpoint
from aisle.train.core.sample import sample_of
from aisle.train.evaluation.baselines import KEYWORDS, apply_rules, compare, learn_rules, words
from aisle.train.evaluation.evaluate import TOP_K, evaluate, measure
from aisle.train.evaluation.predictors import largest_top_k

from .conftest import Server, aisle
from .test_train import FRUIT, table


@pytest.fixture(scope="module")
def calibrated() -> tuple[Any, Any]:
    """Logits [20000, 6] and targets drawn from their own softmax."""
    draw = np.random.default_rng(0)
    logits = 2 * draw.normal(size=(20000, 6))
    return logits, (softmax(logits).cumsum(axis=1) > draw.random((20000, 1))).argmax(axis=1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_the_temperature_is_recovered(calibrated: tuple[Any, Any], temperature: float) -> None:
    logits, targets = calibrated
    assert fit_temperature(logits * temperature, targets) == pytest.approx(temperature, rel=0.02)


def test_few_or_perfect_texts_give_no_extreme_temperature() -> None:
    assert fit_temperature(np.zeros((0, 3)), []) == 1
    assert 0.5 < fit_temperature(3 * np.eye(4), np.arange(4)) < 2  # all correct; without a limit this would be zero


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_calibration_is_measured_from_a_servers_answers(calibrated: tuple[Any, Any], temperature: float) -> None:
    """The three most probable of six categories are enough to measure the calibration error and the temperature."""
    logits, targets = calibrated
    probabilities = softmax(logits * temperature)
    best = np.argsort(-probabilities, axis=1)[:, :3]
    ranked = [[str(i) for i in row] for row in best]
    measured = calibration(list(map(str, targets)), ranked, np.take_along_axis(probabilities, best, axis=1).tolist())
    assert measured["temperature"] == pytest.approx(temperature, rel=0.1)
    right = np.mean(best[:, 0] == targets)
    gap = measured["mean_confidence"] - right
    for error in (measured["ece"], measured["ece_mass"]):
        assert error < 0.015 if temperature == 1 else error == pytest.approx(abs(gap), abs=0.01)
    assert np.sign(gap) == np.sign(temperature - 1) or temperature == 1
    assert sum(each["rows"] for each in measured["bins"]) == len(targets)


def test_calibration_by_hand() -> None:
    measured = calibration(["a", "b"], [["a", "b"], ["a", "b"]], [[0.9, 0.1], [0.9, 0.1]])
    assert measured["ece"] == pytest.approx(0.4)
    assert measured["brier"] == pytest.approx((0.1**2 + 0.9**2) / 2)
    assert measured["nll"] == pytest.approx(-(np.log(0.9) + np.log(0.1)) / 2)
    assert measured["bins"] == [{"rows": 2, "confidence": pytest.approx(0.9), "accuracy": 0.5}]


def test_coverage_by_hand() -> None:
    """Texts with equal confidence are accepted together or not at all."""
    confidence = np.array([0.6, 0.95, 0.8, 0.8, 0.2])
    correct = np.array([True, True, True, False, False])
    result = metrics.coverage(confidence, correct)
    assert result["thresholds"][0] == {"threshold": 0.5, "coverage": 0.8, "accuracy": 0.75}
    assert result["thresholds"][-1] == {"threshold": 0.99, "coverage": 0.0, "accuracy": None}
    assert result["wanted"][0] == {"wanted": 0.9, "threshold": 0.95, "coverage": 0.2, "accuracy": 1.0}
    assert [point["coverage"] for point in result["curve"]] == [0.2, 0.6, 0.6, 0.8, 1.0]
    nothing = metrics.coverage(confidence, np.zeros(5, bool))["wanted"]
    assert nothing[0] == {"wanted": 0.9, "threshold": None, "coverage": 0.0, "accuracy": None}


def test_a_target_accuracy_is_reached_with_the_largest_coverage(rng: random.Random) -> None:
    confidence = np.array([round(rng.random(), 2) for _ in range(3000)])
    correct = np.array([rng.random() < 0.5 + c / 2 for c in confidence])
    for point in metrics.coverage(confidence, correct)["wanted"]:
        if point["threshold"] is None:
            assert all(correct[confidence >= c].mean() < point["wanted"] for c in confidence)
            continue
        assert point["accuracy"] == correct[confidence >= point["threshold"]].mean() >= point["wanted"]
        assert point["coverage"] == np.mean(confidence >= point["threshold"])
        for lower in np.unique(confidence[confidence < point["threshold"]]):
            assert correct[confidence >= lower].mean() < point["wanted"]


def test_each_level_of_the_path_is_scored() -> None:
    actual = ["食品 > 水果 > 苹果", "食品 > 水果 > 梨", "食品 > 乳品", "数码 > 手机 > 手机壳"]
    predicted = ["食品 > 水果 > 梨", "食品 > 水果 > 梨", "食品 > 水果 > 梨", "食品 > 乳品"]
    levels = metrics.upper_levels(actual, predicted)
    assert [each["level"] for each in levels] == [1, 2]
    assert [each["accuracy"] for each in levels] == [0.75, 0.5]
    assert levels[0]["per_class"]["食品"] == {
        "precision": 0.75,
        "recall": 1.0,
        "f1": pytest.approx(6 / 7),
        "support": 3,
    }
    assert metrics.upper_levels(["a", "b"], ["a", "a"]) == []


def test_measure_by_hand() -> None:
    """A refused text is an error without confidence."""
    answers: list[Prediction | Failure] = [
        Prediction(("a", "b"), (0.9, 0.1)),
        Prediction(("a", "b"), (0.6, 0.4)),
        Prediction(("a", "b"), (0.8, 0.2)),
        Failure("text is too long"),
    ]
    result = measure(["1", "2", "3", "4"], ["a", "b", "b", "a"], answers)
    assert result["accuracy"] == result["micro_f1"] == 0.25
    assert result["refused"] == 1
    assert result["top_k"] == {"1": 0.25, "2": 0.75}
    assert result["confidence_by_category"] == {"a": pytest.approx((0.9 + 0.6 + 0.8) / 3)}
    assert result["confusion"] == {"categories": ["(refused)", "a", "b"], "counts": [[0, 0, 0], [1, 1, 0], [0, 2, 0]]}
    assert result["errors"][0] == {
        "actual": "b",
        "predicted": "a",
        "rows": 2,
        "share_of_actual": 1.0,
        "examples": [{"text": "3", "confidence": 0.8}, {"text": "2", "confidence": 0.6}],
    }
    with pytest.raises(InputError, match="all 1 texts were refused, the first with: text is too long"):
        measure(["1"], ["a"], [Failure("text is too long")])


def test_many_categories_get_pairs_instead_of_a_matrix() -> None:
    labels = [f"c{i}" for i in range(3000)]
    result = measure(labels, labels, [Prediction(("c7", label), (0.5, 0.4)) for label in labels])
    assert result["confusion"] is None
    assert result["top_k"] == {"1": 1 / 3000, "2": 1.0}
    assert len(result["errors"]) == metrics.GROUPS


TRAIN = LabelledTexts(
    [f"红富士苹果 {i}斤 顺丰" for i in range(30)] + [f"Phone case 手机壳 第{i}款 顺丰" for i in range(30)],
    ["水果"] * 30 + ["配件"] * 30,
)


def test_keyword_rules_are_what_people_would_write() -> None:
    rules = learn_rules(TRAIN)
    assert {"phone", "case"} <= set(rules["配件"])
    assert any("苹果" in word for word in rules["水果"])
    assert all("顺丰" not in keywords for keywords in rules.values())  # without information
    assert all(len(keywords) <= KEYWORDS for keywords in rules.values())
    chinese = [word for word in rules["水果"] if not word.isascii()]
    assert not any(a != b and a in b for a in chinese for b in chinese)

    assert words("全新的手机 iPhone15") == {"全新", "新的手", "手机", "iphone15"}
    known = {"水果": ["苹果", "新鲜"], "配件": ["手机", "phone"]}
    texts = ["苹果手机 PHONE", "苹果手机", "新鲜苹果 phone", "headphones"]
    assert apply_rules(known, texts) == ["配件", "水果", "水果", None]


def test_baselines_need_two_categories(tmp_path: Path) -> None:
    data = tmp_path / "a.csv"
    data.write_text("text,category\n" + "".join(f"苹果 {i},水果\n" for i in range(20)), "utf-8")
    with pytest.raises(InputError, match="has 1 categories; baselines need two or more"):
        compare(data, "text", "category", ["苹果"], ["水果"], ["水果"])


def test_a_checkpoint_and_its_server_give_the_same_measurements(
    checkpoint: Path, sample: Path, server: Server, tmp_path: Path
) -> None:
    page = tmp_path / "pages" / "evaluation.html"
    local = evaluate(sample, "text", "category", checkpoint=checkpoint, held_out=True, baselines=sample, report=page)
    assert json.loads(page.with_suffix(".json").read_text("utf-8"))["accuracy"] == local["accuracy"]
    done = aisle("evaluate", "--url", server.url, sample, "--held-out", "--baselines", sample, "--json")
    assert done.returncode == 0, done.stderr
    served = json.loads(done.stdout)

    assert _shape(local) == _shape(served)
    assert served["evaluated"] == server.url
    assert [len(result["top_k"]) for result in (local, served)] == [TOP_K, TOP_K]
    for name in ("accuracy", "macro_f1", "weighted_f1", "top_k"):
        assert served[name] == pytest.approx(local[name], abs=2e-3), name
    for name in ("ece", "ece_mass", "brier", "nll", "temperature"):
        assert served["calibration"][name] == pytest.approx(local["calibration"][name], abs=2e-3), name
    assert [level["accuracy"] for level in local["levels"]] == sorted(
        (level["accuracy"] for level in local["levels"]), reverse=True
    )

    svm, rules = local["baselines"]
    assert svm["accuracy"] > rules["accuracy"] > 1 / server.labels
    assert svm["only_model_right"] - svm["only_baseline_right"] == round(
        (local["accuracy"] - svm["accuracy"]) * local["rows"]
    )
    assert 0 <= svm["p_value"] <= 1

    html = page.read_text("utf-8")
    assert html.count("<svg") == 2  # more categories than a heat map shows
    assert not re.search(r"<(script|link|img)\b|\b(src|href)=\"(?!#)", html)  # loads nothing from elsewhere
    worst = local["errors"][0]
    assert worst["actual"].replace(">", "&gt;") in html
    for heading in (
        "Comparison with the baselines",
        "Levels of the category path",
        "Errors and their texts",
        "The keyword rules",
    ):
        assert f">{heading}</h2>" in html


def _shape(value: Any) -> Any:
    """Return the keys and types of a result, without categories and error counts."""
    if isinstance(value, dict):
        return {key: _shape(each) for key, each in value.items() if key not in ("per_class", "rules", "skipped")}
    if isinstance(value, list):
        return [_shape(value[0])] if value else []
    return type(value)


def test_a_heat_map_names_its_categories(tmp_path: Path) -> None:
    """Texts are shown literally, never as markup."""
    from aisle.train.evaluation.evaluation_report import write_report

    texts, labels = ["<script>alert(1)</script>", "2", "3"], ["水果", "配件", "配件"]
    answers = [Prediction(("配件", "水果"), (0.75, 0.25))] * 3
    facts = {
        "evaluated": "x",
        "data": "y",
        "held_out": False,
        "rows": 3,
        "skipped": {},
        "seconds": 1.0,
        "unseen_labels": [],
    }
    result = {**facts, "texts_per_second": 3.0, **measure(texts, labels, answers)}
    write_report(result, tmp_path / "a.html")
    html = (tmp_path / "a.html").read_text("utf-8")
    assert html.count("<svg") == 3
    assert re.search(r"<text[^>]*>水果  1</text>", html)
    assert "&lt;script&gt;alert(1)" in html
    assert "<script" not in html
    with pytest.raises(InputError, match="cannot write"):
        write_report(result, tmp_path / "a.html" / "b.html")


def test_top_k_is_cut_to_what_the_server_has(classifier: Classifier, server: Server) -> None:
    assert largest_top_k(classifier, server.labels + 3) == server.labels
    assert largest_top_k(classifier, 2) == 2


def test_the_command_shows_the_measurements(checkpoint: Path, sample: Path) -> None:
    done = aisle("evaluate", checkpoint, sample, "--held-out", "--baselines", sample)
    assert done.returncode == 0, done.stderr
    for part in ("accuracy", "level 1", "calibration error", "keyword rules", "TF-IDF + linear SVM"):
        assert part in done.stdout


@pytest.mark.parametrize("served", [False, True])
def test_labels_unknown_to_the_model_are_reported_separately(
    served: bool, server: Server, checkpoint: Path, sample: Path, tmp_path: Path
) -> None:
    source: dict[str, Any] = {"url": server.url} if served else {"checkpoint": checkpoint}
    rows = list(read_rows(sample))[:300]
    strange = [{"text": f"红富士苹果 {i}斤", "category": "礼品 > 水果"} for i in range(3)]
    for name, written in (("known", rows), ("mixed", [*rows, *strange]), ("strange", strange)):
        write_rows(tmp_path / f"{name}.csv", partial(iter, written), ["text", "category"])
    known, mixed = (
        evaluate(tmp_path / f"{name}.csv", "text", "category", held_out=False, report=tmp_path / "page.html", **source)
        for name in ("known", "mixed")
    )
    assert known["unseen_labels"] == []
    (apart,) = mixed["unseen_labels"]
    assert (apart["label"], apart["rows"]) == ("礼品 > 水果", 3)
    assert apart["category"] in Checkpoint(checkpoint).labels
    assert 0 < apart["confidence"] <= 1
    assert 1 / 3 <= apart["share"] <= 1
    for name in ("rows", "accuracy", "macro_f1", "per_class", "skipped"):
        assert mixed[name] == known[name]
    assert "礼品" in (tmp_path / "page.html").read_text("utf-8")
    with pytest.raises(InputError, match="knows none of the labels"):
        evaluate(tmp_path / "strange.csv", "text", "category", held_out=False, **source)


@pytest.mark.parametrize("served", [False, True])
def test_labels_are_folded_into_those_of_the_model_and_renamed(
    served: bool, server: Server, checkpoint: Path, sample: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = Checkpoint(checkpoint).labels
    rows = [row for row in read_rows(sample) if row["category"] in own][:200]
    first, second, *_ = sorted({row["category"] for row in rows})
    renamed = {first: "旧 名", second: second.replace(" > ", ">").upper()}
    written = [{**row, "category": renamed.get(row["category"], row["category"])} for row in rows]
    for name, content in (("own", rows), ("other", written)):
        write_rows(tmp_path / f"{name}.csv", partial(iter, content), ["text", "category"])
    (tmp_path / "map.csv").write_text(f"from,to\n旧 名,{first}\n", "utf-8")
    source = ["--url", server.url] if served else [str(checkpoint)]

    def measured(name: str, *options: str) -> dict[str, Any]:
        assert run(["evaluate", *source, str(tmp_path / f"{name}.csv"), "--json", *options]) == 0
        printed = capsys.readouterr()
        measured_as: dict[str, Any] = json.loads(printed.out)
        return measured_as | {"notes": " ".join(printed.err.split())}

    known, raw = measured("own"), measured("other")
    assert {each["label"] for each in raw["unseen_labels"]} == set(renamed.values())
    assert "--fold-labels" in raw["notes"]
    assert "--fold-labels" not in known["notes"]
    mended = measured("other", "--fold-labels", "--label-map", str(tmp_path / "map.csv"))
    for name in ("rows", "accuracy", "macro_f1", "per_class", "unseen_labels"):
        assert mended[name] == known[name]


def test_a_table_gets_the_same_label_processing_as_in_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [(text, {"水果": "fruit" if i % 3 else "FRUIT"}.get(label, label)) for i, (text, label) in enumerate(FRUIT)]
    data, out = table(tmp_path / "a.csv", rows), tmp_path / "out"
    (tmp_path / "map.csv").write_text("from,to\n配件,parts\n", "utf-8")
    small = ["--layers", "2", "--hidden-size", "64", "--epochs", "1"]
    labels = ["--fold-labels", "--label-map", str(tmp_path / "map.csv")]
    assert run(["train", str(data), "-o", str(out), *small, *labels]) == 0
    assert Checkpoint(out).labels == ["fruit", "parts"]
    capsys.readouterr()
    assert run(["evaluate", str(out), str(data), "--baselines", str(data), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["unseen_labels"], found["rows"]) == ([], len(rows))
    assert sample_of(data, "text", "category", ["fruit", "parts"], Checkpoint(out).labelling).train.texts
    assert run(["distil", str(out), str(data), "-o", str(tmp_path / "student"), "--epochs", "1", "--layers", "1"]) == 0
    assert Checkpoint(tmp_path / "student").labels == Checkpoint(out).labels
    assert Checkpoint(tmp_path / "student").labelling == Checkpoint(out).labelling


def test_folding_prefers_the_names_of_a_model() -> None:
    assert fold_variants({"a b": 5, "A B": 9, "c": 1}, ["a b"]) == {"A B": "a b"}
    assert fold_variants({"a b": 5, "A B": 9, "ab": 1}, ["a b", "A B"]) == {"ab": "A B"}
    assert fold_variants({"a b": 5, "A B": 9}) == {"a b": "A B"}
    assert Labelling({"x": "y", "p": "z"}).after(Labelling({"a": "x"}, fold=True)) == Labelling(
        {"a": "y", "x": "y", "p": "z"}, fold=True
    )
