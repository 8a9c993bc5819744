"""Several categories per text: sets in tables, training, thresholds, the gate, the server, files, and refusals."""

from __future__ import annotations

import csv
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyarrow import parquet

from aisle.build.build import build
from aisle.build.gate import GATES, HeldOut, accuracy
from aisle.client import Classifier, Prediction, TrafficLog
from aisle.deploy.rest.models import answer_of
from aisle.errors import InputError
from aisle.preprocess.clean import clean_rows
from aisle.preprocess.label_sets import JOINED, indicators, note_on_sets, read_label_set
from aisle.preprocess.labels import Labelling
from aisle.preprocess.values import TextError
from aisle.train.core.calibration import fit_sigmoid_temperature
from aisle.train.core.checkpoint import Checkpoint
from aisle.train.core.metrics import score_sets
from aisle.train.core.multi_label import Assigned, Threshold, Thresholds, sigmoid
from aisle.train.core.predict import logits_of
from aisle.train.core.settings import TrainingSettings
from aisle.train.core.split import is_held_out, split
from aisle.train.core.threshold_fit import DEFAULT, best_threshold, fit_thresholds
from aisle.train.fit.train import train

from .conftest import Server, aisle, held_server
from .front import NDJSON, front

WORDS = {
    "水果": ("苹果", "香蕉", "葡萄", "西瓜", "樱桃"),
    "电子": ("耳机", "充电器", "键盘", "鼠标", "音箱"),
    "日化": ("洗发水", "牙膏", "香皂", "面霜", "护手霜"),
    "促销": ("特价", "清仓", "秒杀", "包邮", "满减"),
}
NOISE = "abc def ghi"  # a text without a known word
MULTI = Labelling(multi_label=True)


def rows_of(count: int) -> list[tuple[str, list[str]]]:
    """Return texts with the categories of their words."""
    rng = random.Random(0)
    rows = []
    for _ in range(count):
        names = sorted(rng.sample(list(WORDS), rng.choice((1, 1, 2, 3))))
        words = [word for name in names for word in rng.sample(WORDS[name], 2)]
        rng.shuffle(words)
        rows.append((" ".join(words), names))
    return rows


def write_table(path: Path, rows: Sequence[tuple[str, list[str]]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "category"])
        writer.writerows([text, "|".join(names)] for text, names in rows)
    return path


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_table(tmp_path_factory.mktemp("multi") / "table.csv", rows_of(2000))


@pytest.fixture(scope="module")
def multi(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("multi") / "checkpoint"
    settings = TrainingSettings(epochs=6, layers=2, hidden_size=128, learning_rate=1e-3, batch_size=16)
    train(table, "text", "category", folder, settings, labelling=MULTI)
    _raise_thresholds(folder)
    return folder


def _raise_thresholds(folder: Path) -> None:
    """Raise the thresholds until `NOISE` reaches none, so that some texts have no category."""
    checkpoint = Checkpoint(folder)
    assert checkpoint.thresholds
    logits = logits_of(checkpoint.model, checkpoint.tokenizer.tokens([NOISE]), "")
    raised = [
        replace(each, threshold=max(each.threshold, (1 + probability) / 2))
        for each, probability in zip(checkpoint.thresholds.categories, sigmoid(logits)[0].tolist(), strict=True)
    ]
    replace(checkpoint.thresholds, categories=tuple(raised)).save(folder)


@pytest.fixture(scope="module")
def repository(multi: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("multi") / "repository"
    build(multi, folder, "openvino", "fp32")
    return folder


@pytest.fixture(scope="module")
def server(repository: Path, multi: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with held_server(repository, multi, tmp_path_factory.mktemp("server") / "folder") as each:
        yield each


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Texts of every kind: of one, of several and of no category, and one twice."""
    unseen = [text for text, _ in rows_of(2000) if is_held_out(text)][:40]
    return [*dict.fromkeys(unseen), NOISE, unseen[0]]


@pytest.fixture(scope="module")
def expected(multi: Path, texts: list[str]) -> list[dict[str, float]]:
    """The categories that the checkpoint gives each text, with their probabilities."""
    checkpoint = Checkpoint(multi)
    assert checkpoint.thresholds
    assigned = checkpoint.thresholds.apply(logits_of(checkpoint.model, checkpoint.tokenizer.tokens(texts), ""))
    return [
        {name: probability for name, probability, given in zip(checkpoint.labels, *row, strict=True) if given}
        for row in zip(*assigned, strict=True)
    ]


def assert_same(found: Sequence[Any], expected: Sequence[dict[str, float]]) -> None:
    for prediction, wanted in zip(found, expected, strict=True):
        assert isinstance(prediction, Prediction)
        assert set(prediction.categories) == set(wanted)
        assert list(prediction.confidences) == sorted(prediction.confidences, reverse=True)
        for name, confidence in zip(prediction.categories, prediction.confidences, strict=True):
            assert confidence == pytest.approx(wanted[name], abs=1e-4)


def test_a_table_without_several_categories_is_told() -> None:
    assert note_on_sets(["a", "b|c"]) is None
    assert note_on_sets(["a", "b;c"]) == (
        "no text has several categories; 'b;c' is read as one category; separate them with '|', or leave out "
        "--multi-label"
    )
    assert (
        note_on_sets(["a", "b"]) == "no text has several categories; separate them with '|', or leave out --multi-label"
    )


def test_a_set_is_a_list_or_a_text_with_bars() -> None:
    assert read_label_set("b | a|b", {}) == ("a", "b")
    assert read_label_set(["b", " a "], {"b": "c"}) == ("a", "c")
    assert read_label_set("a", {}) == ("a",)
    assert read_label_set('["b", "a"]', {}) == ("a", "b")  # a JSON list in a cell
    assert read_label_set("[new] a", {}) == ("[new] a",)
    for bad in ("", None, [], "a||b", "a|", [""], {"a": 1}, [["a"]], True):
        with pytest.raises(TextError):
            read_label_set(bad, {})
    with pytest.raises(InputError, match=r"'a\|b' contains '\|'"):
        read_label_set(["a|b"], {})
    assert read_label_set(["a|b"], {"a|b": "a and b"}) == ("a and b",)


def test_a_category_with_a_bar_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "table.jsonl"
    path.write_text(json.dumps({"text": "苹果", "category": ["水果|生鲜"]}, ensure_ascii=False) + "\n", "utf-8")
    done = aisle("train", path, "-o", tmp_path / "out", "--multi-label")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "aisle: category '水果|生鲜' contains '|', which separates categories; rename it with --label-map\n"
    )


def test_copies_join_their_categories_and_rare_ones_leave() -> None:
    rows = [("苹果 1", "水果"), ("苹果 1", "促销"), ("苹果 1", "水果"), ("耳机", ["电子", "稀有"]), ("键盘", "电子")]
    table, report = clean_rows([*rows, ("牙膏", "稀有 > 日化")], Labelling(min_rows=2, multi_label=True))
    assert dict(zip(table.texts, table.labels, strict=True)) == {"耳机": "电子|稀有", "键盘": "电子", "牙膏": "稀有"}
    assert report.left_out == {"促销": 1, "水果": 1}
    assert report.merged == {"稀有 > 日化": "稀有"}
    table, report = clean_rows(rows, MULTI)
    assert table.labels == ["促销|水果", "电子|稀有", "电子"]
    assert report.dropped == {JOINED: 1, "duplicate": 1}
    assert table.counts() == {"促销": 1, "水果": 1, "电子": 2, "稀有": 1}
    folded, _ = clean_rows([("a", "X|y"), ("b", "x"), ("c", "X")], Labelling(fold=True, multi_label=True))
    assert folded.labels == ["X|y", "X", "X"]


def test_all_formats_hold_the_same_sets(table: Path, tmp_path: Path) -> None:
    rows = rows_of(30)
    lines = [json.dumps({"text": text, "category": names}) for text, names in rows]
    (tmp_path / "t.jsonl").write_text("\n".join(lines), "utf-8")
    import pyarrow as pa

    parquet.write_table(
        pa.table({"text": [text for text, _ in rows], "category": [names for _, names in rows]}), tmp_path / "t.parquet"
    )
    from aisle.preprocess.tables.table import read_labelled

    files = [write_table(tmp_path / "t.csv", rows), tmp_path / "t.jsonl", tmp_path / "t.parquet"]
    found = [clean_rows(read_labelled(path, "text", "category"), MULTI)[0] for path in files]
    assert found[0] == found[1] == found[2]
    assert found[0].labels == ["|".join(names) for _, names in rows]


def test_a_threshold_has_the_best_f1() -> None:
    rng = np.random.default_rng(0)
    actual = rng.random(300) < 0.2
    probabilities = np.clip(0.3 * actual + rng.normal(0.4, 0.15, 300), 0.001, 0.999)

    def f1(threshold: float) -> float:
        given = probabilities >= threshold
        return float(2 * (given & actual).sum() / (given.sum() + actual.sum()))

    best = best_threshold(probabilities, actual)
    assert f1(best) == max(f1(each) for each in probabilities)
    assert best not in probabilities  # it lies between two
    assert best_threshold(np.array([0.9, 0.2]), np.array([False, False])) == DEFAULT
    assert best_threshold(np.array([0.3, 0.3, 0.3]), np.array([True, False, False])) == pytest.approx(0.15)


def test_rare_categories_share_a_threshold(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    actual = np.zeros((100, 4), np.bool_)
    actual[:40, 0] = actual[40:46, 1] = actual[46:52, 2] = True
    logits = np.where(actual, 2.0, -2.0) + rng.normal(0, 0.5, actual.shape)
    found = fit_thresholds(logits, actual, list("abcd"))
    a, b, c, d = found.categories
    assert (a.shared_by, a.rows) == (1, 40)
    assert b.threshold == c.threshold == d.threshold != a.threshold
    assert (d.shared_by, d.rows) == (3, 0)
    without = fit_thresholds(np.empty((0, 2)), np.empty((0, 2), np.bool_), ["a", "b"])
    assert [each.threshold for each in without.categories] == [DEFAULT, DEFAULT]
    found.save(tmp_path)
    assert Thresholds.load(tmp_path, list("abcd")) == found
    with pytest.raises(InputError, match="other categories"):
        Thresholds.load(tmp_path, list("abdc"))
    (tmp_path / "thresholds.json").write_text("{}")
    with pytest.raises(InputError, match="damaged"):
        Thresholds.load(tmp_path, list("abcd"))


def test_the_temperature_calibrates_each_category() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(-1, 2, (4000, 3))
    actual = rng.random(logits.shape) < sigmoid(logits)
    assert fit_sigmoid_temperature(3 * logits, actual) == pytest.approx(3, rel=0.05)
    assert fit_sigmoid_temperature(np.empty((0, 3)), np.empty((0, 3))) == 1.0


def test_scores_of_sets() -> None:
    actual = indicators(["a|b", "a", "b", "c"], ["a", "b", "c", "d"])
    given = indicators(["a|b", "a|b", "", "c"], ["a", "b", "c", "d"])
    scores = score_sets(actual, Assigned(np.where(given, 0.9, 0.1), given), ["a", "b", "c", "d"])
    assert scores["micro_f1"] == pytest.approx(8 / 10)
    assert scores["macro_f1"] == pytest.approx((1 + 0.5 + 1) / 3)  # `d` does not occur
    assert scores["per_class"].keys() == {"a", "b", "c"}
    assert scores["exact_match"] == 0.5
    assert scores["without_category"] == 0.25
    assert scores["mean_average_precision"] == pytest.approx((1 + 0.5 + 1) / 3)


def test_the_checkpoint_says_that_it_is_multi_label(multi: Path) -> None:
    config = json.loads((multi / "config.json").read_text("utf-8"))
    assert config["problem_type"] == "multi_label_classification"
    assert json.loads((multi / "training.json").read_text("utf-8"))["data"]["labelling"]["multi_label"] is True
    metrics = json.loads((multi / "metrics.json").read_text("utf-8"))
    assert metrics["micro_f1"] > 0.9
    assert metrics["macro_f1"] > 0.9
    assert metrics["mean_average_precision"] > 0.9
    assert "accuracy" not in metrics
    assert not (multi / "decisions.json").exists()
    checkpoint = Checkpoint(multi)
    assert checkpoint.thresholds
    assert checkpoint.labels == sorted(WORDS)
    assert checkpoint.sample.train.multi_label
    assert any("|" in label for label in checkpoint.sample.held_out.labels)
    first = json.loads((multi / "sample.jsonl").read_text("utf-8").splitlines()[0])
    assert isinstance(first["category"], list)


def test_the_fingerprint_depends_on_the_thresholds(multi: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(multi, tmp_path / "copy")
    thresholds = json.loads((copy / "thresholds.json").read_text("utf-8"))
    thresholds["categories"][0]["threshold"] = 0.123
    (copy / "thresholds.json").write_text(json.dumps(thresholds), "utf-8")
    assert Checkpoint(copy).fingerprint != Checkpoint(multi).fingerprint
    (copy / "thresholds.json").unlink()
    with pytest.raises(InputError, match=r"thresholds\.json is missing or damaged"):
        _ = Checkpoint(copy).thresholds


def test_a_model_for_one_category_can_start_from_it(multi: Path, tmp_path: Path) -> None:
    table = tmp_path / "one.csv"
    table.write_text(
        "text,category\n" + "".join(f"{'苹果耳机'[i % 2 * 2 :][:2]} {i},{i % 2}\n" for i in range(60)), "utf-8"
    )
    train(table, "text", "category", tmp_path / "one", TrainingSettings(model=str(multi), epochs=1))
    assert not Checkpoint(tmp_path / "one").multi_label
    assert Checkpoint(tmp_path / "one").thresholds is None


def held_out_of(logits: list[list[float]]) -> HeldOut:
    thresholds = Thresholds(1, tuple(Threshold(name, 0.5, 1, 1) for name in "abc"))
    labels = ["a|b", "c"]
    return HeldOut([[1]] * 2, labels, list("abc"), np.array(logits, np.float32), thresholds=thresholds)


def test_the_gate_compares_sets() -> None:
    held_out = held_out_of([[3, 3, -3], [-3, -3, 3]])
    gate = GATES["fp32"]
    same = accuracy(held_out.expected + 0.1, held_out)
    assert gate.passes(same)
    assert (same["agreement"], same["same_sets"], same["micro_f1"], same["f1_loss"]) == (1, 1, 1, 0)
    lost = accuracy(np.array([[3, -3, -3], [-3, -3, 3]], np.float32), held_out)
    assert lost["agreement"] == pytest.approx(0.75)  # one of two categories, and one of one
    assert lost["same_sets"] == 0.5
    assert lost["f1_loss"] == pytest.approx(1 - 4 / 5)
    assert not gate.passes(lost)
    bad = held_out.expected.copy()
    bad[0, 0] = np.nan
    row = accuracy(bad, held_out)
    assert row["not_finite"] == 1
    assert not gate.passes(row)
    empty = accuracy(np.full((2, 3), -3, np.float32), held_out_of([[-3, -3, -3], [-3, -3, -3]]))
    assert empty["agreement"] == 1  # both give no category


@pytest.mark.parametrize(("target", "precision"), [("openvino", "int8"), ("openvino", "bf16"), ("cuda", "fp16")])
@pytest.mark.long
def test_every_target_passes_the_gate(target: str, precision: str, multi: Path, tmp_path: Path) -> None:
    result = build(multi, tmp_path, target, precision)
    assert result["agreement"] >= 0.99
    assert {"micro_f1", "same_sets"} <= result.keys()
    assert (tmp_path / "encoder" / "1" / "thresholds.json").read_bytes() == (multi / "thresholds.json").read_bytes()
    assert not (tmp_path / "encoder" / "1" / "decisions.json").exists()


def test_served_categories_are_the_checkpoints(
    server: Server, texts: list[str], expected: list[dict[str, float]]
) -> None:
    assert {len(each) for each in expected} >= {0, 1, 2}
    with Classifier(server.url, timeout=60) as classifier:
        assert classifier.models().multi_label
        assert not classifier.has_decisions()
        for _ in range(2):  # the second time, from the cache
            assert_same(classifier.classify(texts), expected)
        assert_same(list(classifier.stream(texts)), expected)
        mixed = [*texts[:5], "苹果 耳机 特价 never seen"]  # some of these are in the cache
        assert_same(classifier.classify(mixed)[:5], expected[:5])
        assert_same([classifier.classify([text])[0] for text in texts[-3:]], expected[-3:])
        none = classifier.classify([NOISE])[0]
        assert (none.categories, none.category, none.confidence) == ((), "", 0.0)
        vectors = classifier.embed(texts)
        assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(len(texts)), abs=1e-5)


def test_top_k_gives_the_most_probable_categories(
    server: Server, texts: list[str], expected: list[dict[str, float]]
) -> None:
    with Classifier(server.url, timeout=60) as classifier:
        everything = classifier.classify(texts, len(WORDS))
        for prediction, wanted in zip(everything, expected, strict=True):
            assert set(prediction.categories) == set(WORDS)
            found = dict(zip(prediction.categories, prediction.confidences, strict=True))
            assert {name: found[name] for name in wanted} == pytest.approx(wanted, abs=1e-4)
        assert max(sum(each.confidences) for each in everything) > 1.5  # they are no shares of one
        for one, every in zip(classifier.classify(texts, 1), everything, strict=True):
            assert one.categories == every.categories[:1]
        with pytest.raises(InputError, match="top_k"):
            classifier.classify(texts, len(WORDS) + 1)
        with pytest.raises(InputError, match="no decisions"):
            classifier.classify(texts, decisions=True)


def test_a_traffic_log_is_refused(server: Server, tmp_path: Path) -> None:
    with (
        TrafficLog(tmp_path / "log.jsonl") as log,
        Classifier(server.url, log=log) as classifier,
        pytest.raises(InputError, match="the model is multi-label"),
    ):
        classifier.classify(["苹果"])
    done = aisle("classify", "苹果", "--url", server.url, "--log", tmp_path / "log.jsonl")
    assert done.returncode == 2
    assert "multi-label" in done.stderr
    assert (tmp_path / "log.jsonl").read_text() == ""


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_a_classified_file_has_all_categories(
    ending: str, server: Server, texts: list[str], expected: list[dict[str, float]], tmp_path: Path
) -> None:
    source, out = tmp_path / "texts.csv", tmp_path / f"out.{ending}"
    source.write_text("text\n" + "".join(f"{text}\n" for text in texts), "utf-8")
    done = aisle("classify", source, "-o", out, "--url", server.url)
    assert done.returncode == 0, done.stderr
    rows = read_back(out)
    assert [row["text"] for row in rows] == texts
    for row, wanted in zip(rows, expected, strict=True):
        names, confidences = row["category"], row["confidence"]
        if ending == "csv":
            names, confidences = (value.split("|") if value else [] for value in (names, confidences))
        assert set(names) == set(wanted)
        assert [float(each) for each in confidences] == pytest.approx([wanted[name] for name in names], abs=1e-4)


def read_back(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        return list(parquet.read_table(path).to_pylist())
    lines = path.read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines] if path.suffix == ".jsonl" else list(csv.DictReader(lines))


def test_a_parquet_file_keeps_lists(server: Server, texts: list[str], tmp_path: Path) -> None:
    import pyarrow as pa

    parquet.write_table(pa.table({"text": texts, "category": ["before"] * len(texts)}), tmp_path / "in.parquet")
    done = aisle("classify", tmp_path / "in.parquet", "-o", tmp_path / "out.parquet", "--url", server.url)
    assert done.returncode == 0, done.stderr
    schema = parquet.read_schema(tmp_path / "out.parquet")
    assert schema.field("category").type == pa.list_(pa.string())
    assert schema.field("confidence").type == pa.list_(pa.float64())
    assert schema.field("source_category").type == pa.string()


def test_the_command_shows_all_categories(server: Server, expected: list[dict[str, float]], texts: list[str]) -> None:
    row = next(i for i, each in enumerate(expected) if len(each) > 1)
    done = aisle("classify", texts[row], NOISE, "--url", server.url)
    assert all(name in done.stdout for name in expected[row])
    assert "none reaches its threshold" in done.stdout
    done = aisle("classify", texts[row], NOISE, "--url", server.url, "--json")
    first, second = json.loads(done.stdout)["predictions"]
    assert set(first["categories"]) == set(expected[row])
    assert second["categories"] == second["confidences"] == []


def test_rest_answers_all_categories(
    server: Server, texts: list[str], expected: list[dict[str, float]], tmp_path: Path
) -> None:
    with Classifier(server.url) as classifier:
        wanted = [answer_of(each) for each in classifier.classify(texts)]
    with front(server.url, tmp_path) as running:
        answers = running.post("/v1/classify", {"texts": texts}).body["predictions"]
        assert [set(each["categories"]) for each in answers] == [set(each) for each in expected]
        assert [each["categories"] for each in answers] == [list(each["categories"]) for each in wanted]
        lines = "\n".join(json.dumps(text) for text in texts).encode()
        streamed = running.post("/v1/classify/stream", lines, NDJSON).data.splitlines()
        assert [json.loads(line)["categories"] for line in streamed] == [each["categories"] for each in answers]
        (best,) = running.post("/v1/classify", {"texts": texts[:1], "top_k": 2}).body["predictions"]
        assert len(best["categories"]) == 2


def test_checkpoint_and_server_are_measured_alike(multi: Path, server: Server, table: Path, tmp_path: Path) -> None:
    local = aisle("evaluate", multi, table, "--held-out", "--report", tmp_path / "page.html", "--json")
    served = aisle("evaluate", "--url", server.url, table, "--held-out", "--json")
    assert (local.returncode, served.returncode) == (0, 0), local.stderr + served.stderr
    first, second = json.loads(local.stdout), json.loads(served.stdout)
    metrics = json.loads((multi / "metrics.json").read_text("utf-8"))
    assert first["mean_average_precision"] == pytest.approx(metrics["mean_average_precision"])
    for name in ("micro_f1", "macro_f1", "mean_average_precision", "exact_match"):
        assert second[name] == pytest.approx(first[name], abs=1e-6)
    assert first["rows"] == second["rows"] == metrics["rows"]["held_out"]
    assert "mean average precision" in (tmp_path / "page.html").read_text("utf-8")
    shown = aisle("evaluate", multi, table).stdout
    assert "micro-F1" in shown
    assert "categories per text" in shown


def test_unknown_categories_are_counted_apart(multi: Path, tmp_path: Path) -> None:
    path = write_table(tmp_path / "t.csv", [*rows_of(20), ("苹果 new", ["水果", "生鲜"]), ("only new", ["生鲜"])])
    result = json.loads(aisle("evaluate", multi, path, "--json").stdout)
    assert result["unseen_labels"] == [{"label": "生鲜", "rows": 2}]
    assert result["rows"] == 1 + len(dict(rows_of(20)))
    (tmp_path / "other.csv").write_text("text,category\n苹果,x|y\n", "utf-8")
    done = aisle("evaluate", multi, tmp_path / "other.csv")
    assert done.returncode == 2
    assert "a category that the model knows, such as 'x'" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        "frontier CHECKPOINT TABLE",
        "bench engines --checkpoint CHECKPOINT",
        "explain 苹果 --checkpoint CHECKPOINT",
        "explain --check TABLE --checkpoint CHECKPOINT",
        "explain 苹果 --url SERVER",
        "distil CHECKPOINT TABLE -o OUT",
        "prune CHECKPOINT TABLE -o OUT",
        "decide CHECKPOINT",
        "category add CHECKPOINT 新 --examples TABLE -o OUT",
        "category rename CHECKPOINT 水果 生鲜 -o OUT",
        "category merge CHECKPOINT 水果 日化 --into 生鲜 -o OUT",
        "category move CHECKPOINT 水果 生鲜 -o OUT",
        "drift CHECKPOINT TABLE",
        "retrain CHECKPOINT TABLE --corrections TABLE -o OUT",
        "review TABLE --url SERVER -o OUT.csv",
        "desk --checkpoint CHECKPOINT --folder OUT",
        "evaluate CHECKPOINT TABLE --baselines TABLE",
        "train TABLE -o OUT --multi-label --mixup 0.2",
        "train TABLE -o OUT --multi-label --level-weight 0.5",
        "train TABLE -o OUT --multi-label --contrastive category",
        "train TABLE -o OUT --multi-label --folds 2",
        "train TABLE -o OUT --multi-label --accept-precision 0.9",
        "clean TABLE -o OUT.csv --label-errors OUT2.csv",
    ],
)
def test_what_needs_one_category_refuses_by_name(
    arguments: str, multi: Path, table: Path, server: Server, tmp_path: Path
) -> None:
    places = {"CHECKPOINT": multi, "TABLE": table, "SERVER": server.url}
    words = [str(places.get(word, word)).replace("OUT", str(tmp_path / "out")) for word in arguments.split()]
    done = aisle(*words)
    assert done.returncode == 2, done.stdout + done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("aisle: ")
    assert "multi-label" in last or "one category per text" in last
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.csv").exists()


@pytest.mark.long
def test_a_comparison_with_a_multi_label_version_is_refused(repository: Path, multi: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(repository, tmp_path / "repository")
    build(multi, copy, "openvino", "bf16")
    done = aisle("deploy", "--repository", copy, "--shadow", "5")
    assert done.returncode == 2
    assert "--shadow compares one category per text" in done.stderr


def test_sets_without_the_option_are_pointed_out(table: Path, tmp_path: Path) -> None:
    lists = tmp_path / "lists.jsonl"
    lists.write_text("".join(json.dumps({"text": text, "category": names}) + "\n" for text, names in rows_of(9)))
    done = aisle("train", lists, "-o", tmp_path / "out")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "if they are lists of categories, give --multi-label" in done.stderr
    done = aisle("clean", table, "-o", tmp_path / "clean.csv")
    assert done.returncode == 0
    assert "use aisle train --multi-label" in done.stderr


def test_the_split_counts_categories() -> None:
    table, _ = clean_rows(rows_of(300), MULTI)
    parts = split(table)
    assert parts.labels == sorted(WORDS)
    assert parts.train.multi_label
    assert all(set(parts.train.counts()) >= set(part.counts()) for part in parts[:3])
    with pytest.raises(InputError, match="has only one row"):
        split(clean_rows([*rows_of(100), ("x", "水果|single")], MULTI)[0])


def test_evaluation_needs_the_packages_of_reports_only_for_a_report() -> None:
    code = "import sys; sys.modules.update(matplotlib=None, jinja2=None); import aisle.train.evaluation.multi_label"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
