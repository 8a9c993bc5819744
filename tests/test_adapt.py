"""Traffic log, drift, review and retraining, on a shop of three categories with generated titles."""

from __future__ import annotations

import asyncio
import csv
import json
import random
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aisle.cli import run
from aisle.client import AsyncClassifier, Classifier, Prediction, TrafficLog
from aisle.errors import InputError
from aisle.preprocess import vocabulary
from aisle.preprocess.tables.table import read_rows
from aisle.train.adapt import drift_log, drift_statistics
from aisle.train.adapt.drift import LEAST_WINDOW, drift
from aisle.train.adapt.retrain import _is_worse, _notes, _notes_of_loss, read_corrections, retrain
from aisle.train.adapt.review import Candidate, choose, review
from aisle.train.core.calibration import softmax
from aisle.train.core.checkpoint import Checkpoint
from aisle.train.core.predict import logits_of
from aisle.train.core.split import is_held_out
from aisle.train.fit.model import from_pretrained
from aisle.train.fit.train import TrainingSettings, train

from .conftest import Server, aisle

GOODS = {
    "食品 > 水果": ("红富士苹果", "赣南脐橙", "丹东草莓", "海南芒果", "fresh kiwi fruit"),
    "食品 > 零食": ("每日坚果", "手撕面包", "麻辣牛肉干", "原味薯片", "chocolate cookies"),
    "数码 > 配件": ("苹果手机壳", "蓝牙耳机", "钢化膜 防摔", "数据线", "usb c cable"),
}
EXTRAS = ("顺丰包邮", "新鲜现货", "送礼佳品", "大促", "官方正品", "best price", "free shipping", "限时特价")


def titles(count: int, seed: int, mix: Sequence[float] = (0.4, 0.3, 0.3)) -> list[tuple[str, str]]:
    rng = random.Random(seed)
    categories = rng.choices(list(GOODS), mix, k=count)
    return [
        (f"{rng.choice(EXTRAS)} {rng.choice(GOODS[each])} {rng.randint(1, 999)}件 {rng.choice(EXTRAS)}", each)
        for each in categories
    ]


def write(path: Path, rows: Sequence[tuple[str, str]]) -> Path:
    path.write_text("text,category\n" + "".join(f"{text},{label}\n" for text, label in rows), "utf-8")
    return path


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("shop") / "titles.csv", titles(900, 0))


@pytest.fixture(scope="module")
def shop(table: Path) -> Path:
    """A checkpoint of the shop's titles."""
    out = table.with_name("checkpoint")
    train(table, "text", "category", out, TrainingSettings(epochs=3, batch_size=32, max_tokens=32))
    return out


@pytest.fixture(scope="module")
def answer(shop: Path) -> Any:
    """Return the answers of a server."""
    model, tokenizer, labels = (checkpoint := Checkpoint(shop)).model, checkpoint.tokenizer, checkpoint.labels

    def answers(texts: Sequence[str], top_k: int = 2) -> list[Prediction]:
        probabilities = softmax(logits_of(model, tokenizer.tokens(texts), ""))
        best = np.argsort(-probabilities, axis=1)[:, :top_k]
        return [
            Prediction(tuple(labels[i] for i in row), tuple(float(each[i]) for i in row))
            for row, each in zip(best.tolist(), probabilities, strict=True)
        ]

    return answers


def log_of(path: Path, texts: Sequence[str], answer: Any, keep_text: bool = False) -> Path:
    with TrafficLog(path, keep_text) as log:
        log.record(texts, answer(texts))
    return path


def measures(found: list[dict[str, Any]]) -> set[str]:
    return {each["measure"] for each in found}


def test_traffic_like_the_training_data_is_not_drift(shop: Path, answer: Any, tmp_path: Path) -> None:
    log = log_of(tmp_path / "log.jsonl", [text for text, _ in titles(1500, 7)], answer)
    result = drift(shop, log)
    assert result["retrain"] is False
    assert result["reasons"] == []
    assert result["rows"] == 1500
    assert result["measures"].keys() == drift_statistics.RULES.keys()
    assert result["measures"]["accuracy"]["live"] == pytest.approx(result["measures"]["accuracy"]["reference"], abs=0.1)
    assert len(result["windows"]) == 1500 // LEAST_WINDOW


@pytest.mark.parametrize("name", ["title", "text"])
def test_the_texts_of_a_classified_table_are_in_any_column(shop: Path, answer: Any, tmp_path: Path, name: str) -> None:
    texts = [text for text, _ in titles(400, 7)]
    rows = [{"sku": 0, "category": None, "confidence": None, "error": "text is missing"}]  # JSON may lack a column
    for text, each in zip(texts, answer(texts), strict=True):
        rows.append({name: text, "category": each.category, "confidence": each.confidence, "error": None})
    log = tmp_path / "classified.jsonl"
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = aisle("drift", shop, log, "--text-column", name, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["measures"].keys() == drift_statistics.RULES.keys()
    assert review(log, tmp_path / "review.csv", rows=5, text_column=name)["skipped"]["not answered"] == 1
    if name != "text":
        with pytest.raises(InputError, match="no column 'text'"):
            drift(shop, log)


def test_a_changed_mix_of_categories_is_drift(shop: Path, answer: Any, tmp_path: Path) -> None:
    log = log_of(tmp_path / "log.jsonl", [text for text, _ in titles(1000, 7, (0.05, 0.05, 0.9))], answer)
    result = drift(shop, log, report=tmp_path / "page.html")
    assert json.loads((tmp_path / "page.json").read_text("utf-8"))["rows"] == result["rows"]
    assert result["retrain"] is True
    assert "label_mix" in measures(result["reasons"])
    assert "out_of_vocabulary" not in measures(result["reasons"] + result["watch"])
    reason = next(each["reason"] for each in result["reasons"] if each["measure"] == "label_mix")
    assert "数码 > 配件" in reason
    assert result["measures"]["label_mix"]["jensen_shannon"] > 0.1
    html = (tmp_path / "page.html").read_text("utf-8")
    assert "Retrain " in html
    assert html.count("<svg") == 3


def test_recent_drift_is_found_in_a_long_log(shop: Path, answer: Any, tmp_path: Path) -> None:
    """The mix changes in the last quarter of the log."""
    late = titles(500, 12, (0.1, 0.1, 0.8))
    log = log_of(tmp_path / "log.jsonl", [text for text, _ in [*titles(1500, 11), *late]], answer)
    result = drift(shop, log)
    assert result["measures"]["label_mix"]["value"] < drift_statistics.RULES["label_mix"].watch
    reason = next(each for each in result["reasons"] if each["measure"] == "label_mix")
    assert "in the last third" in reason["reason"]


FOREIGN = ("наушники беспроводные", "чехол для телефона", "яблоки свежие", "печенье шоколадное")


def test_unknown_words_are_drift(shop: Path, answer: Any, tmp_path: Path) -> None:
    """They are in the last two thirds of the log, and the reason says so."""
    rng = random.Random(3)
    usual = [text for text, _ in titles(500, 8)]
    foreign = [f"{rng.choice(FOREIGN)} {rng.choice(FOREIGN)} {rng.randint(1, 99)}" for _ in range(1000)]
    log = tmp_path / "log.jsonl"
    with TrafficLog(log, keep_text=True) as traffic:
        for texts in (usual, foreign):
            traffic.record(texts, answer(texts))
    # as if the texts had come a minute apart
    rows = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    answered = [row for row in rows if "category" in row]
    for minute, row in enumerate(answered):
        row["time"] = f"2026-11-{1 + minute // 1440:02}T{minute % 1440 // 60:02}:{minute % 60:02}:00Z"
    log.write_text("".join(json.dumps(row) + "\n" for row in answered))

    result = drift(shop, log)
    assert result["retrain"] is True
    assert "out_of_vocabulary" in measures(result["reasons"])
    assert "wording" in measures(result["reasons"])
    told = result["measures"]["out_of_vocabulary"]
    assert told["reference"] < 0.02
    assert 0.3 < told["live"] <= 1
    since = {each["measure"]: each["since"] for each in result["reasons"]}
    assert since["wording"] is not None
    assert since["wording"] > "2026-11-01 03:00"

    recent = drift(shop, log, days=1)  # the log is 25 hours long
    assert recent["rows"] == 1441
    assert recent["from"] == "2026-11-01 00:59 UTC"


def test_words_are_counted_without_texts(shop: Path, answer: Any, tmp_path: Path) -> None:
    """A log without texts gives the same share of new words as one with texts, and contains no word."""
    texts = [text for text, _ in titles(400, 9)] + [f"{FOREIGN[i % 4]} {i}" for i in range(400)]
    found = []
    for keep_text in (False, True):
        log = log_of(tmp_path / f"{keep_text}.jsonl", texts, answer, keep_text)
        if keep_text:
            kept = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
            log.write_text("".join(json.dumps(row) + "\n" for row in kept if "words" not in row))
            assert kept[0]["text"] == texts[0]
        found.append(drift(shop, log)["measures"])
    for name in ("out_of_vocabulary", "wording"):
        assert found[0][name]["value"] == pytest.approx(found[1][name]["value"], rel=1e-6)
    bare = (tmp_path / "False.jsonl").read_text("utf-8")
    assert "苹果手机壳" not in bare
    assert "чехол" not in bare
    rows = [json.loads(line) for line in bare.splitlines()]
    assert rows[0].keys() == {"time", "category", "confidence", "category_2", "confidence_2", "length"}
    assert rows[-1].keys() == {"time", "texts", "words"}
    assert rows[-1]["texts"] == 800


def test_the_share_of_new_words_is_estimated_through_the_buckets() -> None:
    """Half of the buckets are used, so half of the new words look known; the estimate corrects for that."""
    entries = [f"known{i}" for i in range(45000)]
    letters = "abcdefghij"
    counting = drift_log.WordCounter(entries)
    counts = vocabulary.count([" ".join("new" + "".join(letters[int(c)] for c in str(i)) for i in range(4000))])
    counts += vocabulary.count(["apple"])
    words = counting(0, 1, counts)
    assert words.words == 4001
    assert words.unknown == pytest.approx(4000, rel=0.06)


def test_words_are_split_as_in_bert() -> None:
    assert vocabulary.words("红富士Apple iPhone15 Café 500ml №7 ёлка") == [
        *"红富士",
        *("apple", "iphone", "cafe", "ml", "елка"),
    ]


def test_rare_categories_are_compared_by_their_parent() -> None:
    counts = Counter({"a > b > c": 900, "a > b > d": 3, "a > e > f": 4, "g > h": 2, "i": 1})
    cell = drift_statistics.pool(counts, [*counts, "a > x > y"], 1000)
    assert cell["a > b > c"] == "a > b > c"
    assert cell["g > h"] == cell["i"] == "…"
    assert cell["a > b > d"] == cell["a > e > f"] == cell["a > x > y"] == "a > …"


def test_psi_and_its_significance() -> None:
    """Compare with values computed by hand; two samples of the same mix differ only by chance."""
    big = 10**9
    expected = (0.5 - 0.25) * np.log(0.5 / 0.25) + (0.5 - 0.75) * np.log(0.5 / 0.75)
    assert drift_statistics.stability(np.array([big, 3 * big]), np.array([big, big])) == pytest.approx(expected)
    draw = np.random.default_rng(0)
    mix = np.full(60, 1 / 60)
    found = [drift_statistics.stability(draw.multinomial(2000, mix), draw.multinomial(300, mix)) for _ in range(50)]
    assert max(found) < 0.15
    assert np.mean(found) < 0.04


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ([{"category": "食品 > 水果", "confidence": 0.5}] * 20, "20 answers are too few"),
        ([{"category": "汽车", "confidence": 0.5}] * 300, "row 1: category '汽车' is unknown"),
        ([{"category": "食品 > 水果", "confidence": "much"}], "row 1: confidence 'much'"),
        ([{"category": "食品 > 水果", "confidence": 1.5}], "row 1: confidence 1.5"),
        ([{"time": "noon", "category": "食品 > 水果", "confidence": 0.5}], "row 1: time 'noon'"),
        ([{"time": "2026-11-24T08:00:00Z", "texts": 3, "words": {"x": 1}}], "row 1: the word counts are damaged"),
        ([{"text": "苹果"}], "no column 'category'"),
        ([{"category": None, "confidence": None, "error": "empty"}], "no row with a category"),
        ([], "no row with a category"),
    ],
)
def test_unusable_logs_are_refused(shop: Path, tmp_path: Path, rows: list[dict[str, Any]], complaint: str) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match=complaint):
        drift(shop, log)


def test_the_log_is_shared_by_threads_and_appended_to(answer: Any, tmp_path: Path) -> None:
    texts = [text for text, _ in titles(50, 1)]
    answers = answer(texts)
    path = tmp_path / "log.jsonl"
    for _ in range(2):
        with TrafficLog(path) as log:
            threads = [threading.Thread(target=log.record, args=(texts, answers)) for _ in range(12)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert sum("category" in row for row in rows) == 1200
    assert [row["texts"] for row in rows if "words" in row] == [600, 600]
    assert path.stat().st_mode & 0o077 == 0

    with TrafficLog(path) as log:
        log.record(texts, answers)  # too few texts to count their words
    assert sum("words" in json.loads(line) for line in path.read_text("utf-8").splitlines()) == 2


def test_a_log_that_cannot_be_written_loses_no_answer(
    answer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(InputError, match=r"name it \.jsonl"):
        TrafficLog(tmp_path / "log.csv")
    with pytest.raises(InputError, match="cannot write"):
        TrafficLog(tmp_path / "nowhere" / "log.jsonl")
    full = tmp_path / "full.jsonl"
    full.symlink_to("/dev/full")
    with TrafficLog(full) as log:  # a full disk must not stop the answers
        log.record(["苹果"], answer(["苹果"]))
        log.record(["苹果"], answer(["苹果"]))
    assert [record.message.partition(":")[0] for record in caplog.records] == [f"cannot write {full}"]


def test_personal_data_is_not_kept(answer: Any, tmp_path: Path) -> None:
    log = log_of(tmp_path / "log.jsonl", ["苹果 联系 13812345678"], answer, keep_text=True)
    assert json.loads(log.read_text("utf-8"))["text"] == "苹果 联系 电话"


def candidate(margin: float, text: str, category: str) -> Candidate:
    return Candidate(margin, 0, {"text": text, "category": category})


def test_review_alternates_reasons_and_skips_near_duplicates() -> None:
    pool = [candidate(i / 100, f"新款 无线 蓝牙 耳机 降噪 超长 待机 {i}", "配件") for i in range(30)]
    pool += [candidate(0.5, "红富士苹果 一箱", "水果"), candidate(0.6, "海南芒果 五斤", "水果")]
    chosen = choose(pool, 10)
    assert [each.row["category"] for each in chosen] == ["配件", "水果", "水果"]
    assert chosen[0].margin == 0
    pool.append(candidate(0.7, "钢化膜 全屏覆盖", "配件"))
    assert [each.margin for each in choose(pool, 2)] == [0, 0.5]


def test_a_full_disk_cuts_no_line_of_a_log(tmp_path: Path) -> None:
    """A limit on the file's size has the effect of a full disk: a part of the data is written."""
    code = f"""
import resource
from pathlib import Path
from aisle.client import Prediction, TrafficLog
log = TrafficLog(Path({str(tmp_path / "log.jsonl")!r}))
for limit in (1000, 10_000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, -1))
    log.record(["usb c cable"] * 20, [Prediction(("a",), (0.5,), 1)] * 20)
log.close()
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    rows = list(read_rows(tmp_path / "log.jsonl"))
    assert 20 < len(rows) < 40
    assert {row["category"] for row in rows} == {"a"}


def test_review_of_a_log(answer: Any, tmp_path: Path) -> None:
    texts = [text for text, _ in titles(300, 5)]
    answers = answer(texts)
    log = log_of(tmp_path / "log.jsonl", [*texts, texts[0].upper()], answer, keep_text=True)
    result = review(log, tmp_path / "to_label.csv", rows=12)
    with (tmp_path / "to_label.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert result["rows"] == len(rows) == 12
    assert result["skipped"]["duplicate"] >= 1
    assert {row["correct_category"] for row in rows} == {""}
    assert max(result["categories"].values()) - min(result["categories"].values()) <= 1
    margin = {text: each.confidences[0] - each.confidences[1] for text, each in zip(texts, answers, strict=True)}
    assert min(margin.values()) == pytest.approx(margin[rows[0]["text"]], abs=1e-5)
    assert float(rows[0]["confidence"]) - float(rows[0]["confidence_2"]) == pytest.approx(
        min(margin.values()), abs=1e-5
    )


def test_review_of_more_rows_than_the_log_has(answer: Any, tmp_path: Path) -> None:
    """It must not allocate memory for all requested rows."""
    texts = [text for text, _ in titles(40, 7)]
    log = log_of(tmp_path / "log.jsonl", texts, answer, keep_text=True)
    assert 0 < review(log, tmp_path / "out.csv", rows=10**9)["rows"] <= 40


def test_unusable_logs_are_not_reviewed(answer: Any, tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    bare = log_of(tmp_path / "bare.jsonl", ["苹果"], answer)
    with pytest.raises(InputError, match="has no texts; log with --keep-text"):
        review(bare, out, rows=5)
    with pytest.raises(InputError, match="classify it with --url"):
        review(write(tmp_path / "a.csv", [("苹果", "水果")]), out, rows=5)
    with pytest.raises(InputError, match="choose another output"):
        review(bare, bare, rows=5)
    (tmp_path / "b.csv").write_text("text,category,confidence\n ,水果,0.5\n苹果,,\n", "utf-8")
    with pytest.raises(InputError, match=r"no text to review \(1 empty, 1 not answered\)"):
        review(tmp_path / "b.csv", out, rows=5)
    assert not out.exists()


def corrections(path: Path, rows: Sequence[tuple[str, str]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([("text", "category", "correct_category"), *((text, "?", label) for text, label in rows)])
    return path


@pytest.mark.long
def test_retraining_learns_the_corrections_and_keeps_its_accuracy(shop: Path, table: Path, tmp_path: Path) -> None:
    """The shop starts to sell gift boxes, which the model has never seen, and some labels of the table are wrong."""
    gifts = [(f"礼盒装 {name} 高档木盒 {i}号", "礼品 > 礼盒") for i in range(20) for name in ("坚果", "芒果", "苹果")]
    rows = titles(900, 0)
    wrong = [text for text, label in rows if label == "数码 > 配件"][:3]
    filled = corrections(
        tmp_path / "filled.csv",
        [*gifts, *((text.upper(), "食品 > 零食") for text in wrong), ("不知道 是什么", "")],
    )
    with pytest.raises(InputError, match=r"60 correction\(s\) to '礼品 > 礼盒'.*--new-categories"):
        retrain(shop, table, [filled], tmp_path / "new")
    assert not (tmp_path / "new").exists()

    # The vocabulary lacks the gifts' words, and training adds unknown characters to texts of all categories.
    result = retrain(shop, table, [filled], tmp_path / "new", epochs=6, new_categories=True)
    assert result["corrections"] == {
        "rows": 63,
        "in_table": 3,
        "added": 60,
        "blank": 1,
        "disputed": 0,
        "new_categories": ["礼品 > 礼盒"],
    }
    unseen = sum(is_held_out(text) for text, _ in gifts)
    assert result["corrections_unseen"]["rows"] in range(unseen, unseen + 4)
    assert result["corrections_unseen"]["old_right"] == 0
    assert result["corrections_unseen"]["new_right"] >= 0.8 * unseen
    learnt = result["corrections_learnt"]
    assert learnt["new_right"] > learnt["old_right"]
    held_out = result["held_out"]
    assert held_out["new"]["accuracy"] >= held_out["old"]["accuracy"]
    assert held_out["only_new_right"] - held_out["only_old_right"] == round(
        (held_out["new"]["accuracy"] - held_out["old"]["accuracy"]) * held_out["rows"]
    )
    changes = result["changes"]
    assert 0 < len(changes) <= 50
    assert len({each["text"] for each in changes}) == len(changes)
    assert all(each["old"] != each["new"] for each in changes)
    assert changes[0]["label"] in ("礼品 > 礼盒", "食品 > 零食")  # corrections come first
    assert sum(each["new"] == each["label"] for each in changes) > len(changes) / 2
    training = json.loads((tmp_path / "new" / "training.json").read_text("utf-8"))
    assert training["data"]["corrections"][0]["file"] == "filled.csv"
    assert training["data"]["columns"] == ["text", "category"]
    assert Checkpoint(tmp_path / "new").labels == sorted([*GOODS, "礼品 > 礼盒"])
    vocabularies = [set(Checkpoint(each).tokenizer.entries()) for each in (shop, tmp_path / "new")]
    assert vocabularies[0] == vocabularies[1]
    assert (tmp_path / "new" / "sample.jsonl").is_file()


@pytest.mark.long
def test_corrections_that_are_hardly_learnt_are_said(
    shop: Path, table: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Within one epoch nothing is learnt of a category whose words the tokenizer does not know."""
    gifts = [(f"礼盒装 {name} 高档木盒 {i}号", "礼品 > 礼盒") for i in range(20) for name in ("坚果", "芒果")]
    filled = corrections(tmp_path / "filled.csv", gifts)
    told = ["--corrections", filled, "-o", tmp_path / "new", "--epochs", 1, "--new-categories", "--json"]
    assert run([str(each) for each in ("retrain", shop, table, *told)]) == 0
    output = capfd.readouterr()
    result = json.loads(output.out)
    (row,) = result["corrections_by_category"]
    assert (row["category"], row["rows"]) == ("礼品 > 礼盒", 40)
    assert row["right"] < 32
    assert row["unknown"] >= vocabulary.MANY_UNKNOWN
    assert result["notes"][0] == f"the new checkpoint gets {row['right']} of 40 corrections right"
    assert "tokenizer does not know" in result["notes"][1]
    assert "give --epochs 2, or add them to the table and train from it with aisle train" in result["notes"][1]
    assert all(note in output.err for note in result["notes"])


def test_what_to_change_is_said_of_each_category_that_is_hardly_learnt() -> None:
    rows = [
        {"category": "a", "rows": 10, "right": 3, "unknown": 0.1},
        {"category": "b", "rows": 10, "right": 8, "unknown": 0.9},
    ]
    assert _notes(rows, 3) == [
        "the new checkpoint gets 11 of 20 corrections right",
        "only 3 of 10 corrections to 'a' are right; give --epochs 6, or correct more texts of this category",
    ]


def test_a_checkpoint_is_trained_further_with_its_own_tokenizer_and_classifier(shop: Path) -> None:
    labels = Checkpoint(shop).labels
    model, tokenizer = from_pretrained(str(shop), ["新", *reversed(labels)], 32, 0.1)
    before = Checkpoint(shop).model
    assert model.classifier.weight[1:].tolist() == before.classifier.weight.flip(0).tolist()
    assert model.classifier.bias[1:].tolist() == before.classifier.bias.flip(0).tolist()
    text = "海南芒果 usb c cable 官方正品"
    assert tokenizer.encode(text).ids == Checkpoint(shop).tokenizer.tokens([text])[0]


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ([("苹果", ""), ("梨", " ")], "nothing is filled in"),
        ([("苹果", "a"), ("苹果！", "b")], "rows 1 and 2 correct equal texts to 'a' and 'b'"),
        ([("苹果", "a"), (" ", "b")], "row 2: text is empty"),
    ],
)
def test_unusable_corrections_are_refused(tmp_path: Path, rows: list[tuple[str, str]], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        read_corrections([corrections(tmp_path / "a.csv", rows)])


def test_the_last_correction_of_a_text_counts(tmp_path: Path) -> None:
    tables = [corrections(tmp_path / f"{label}.csv", [("苹果", label)]) for label in "ab"]
    assert [each.label for each in read_corrections(tables).by_content.values()] == ["b"]
    with pytest.raises(InputError, match="fill in a table of aisle review"):
        read_corrections([write(tmp_path / "c.csv", [("苹果", "水果")])])


def exported(tool: str, task: dict[str, Any], *labels: str) -> dict[str, Any]:
    """Return a task as the tool exports it after some people have labelled it."""
    if tool == "argilla":
        answers = [{"value": label, "user_id": str(user)} for user, label in enumerate(labels)]
        return {"id": "1", "vectors": {}, "status": "completed", **task, "responses": {"correct_category": answers}}
    annotations = [
        {
            "id": user,
            "was_cancelled": False,
            "result": [{**task["predictions"][0]["result"][0], "value": {"choices": [label]}}],
        }
        for user, label in enumerate(labels)
    ]
    skipped = {"id": 99, "was_cancelled": True, "result": task["predictions"][0]["result"]}
    return {"id": 7, **task, "annotations": [*annotations, skipped]}


@pytest.mark.parametrize("tool", ["label-studio", "argilla"])
def test_texts_go_to_a_labelling_tool_and_come_back(tool: str, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    asked = ["红富士苹果", "usb c cable", "洗发水 500ml", "蓝牙耳机"]
    rows = [
        {"text": title, "category": f"猜 > {i}", "confidence": 0.5 + i / 10, "category_2": "其他", "confidence_2": 0.1}
        for i, title in enumerate(asked)
    ]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    with pytest.raises(InputError, match=r"reads JSON: write a file whose name ends with \.json"):
        review(log, tmp_path / "tasks.csv", rows=9, tool=tool)
    review(log, tmp_path / "tasks.json", rows=9, tool=tool)
    tasks = json.loads((tmp_path / "tasks.json").read_text("utf-8"))
    assert len(tasks) == 4
    fields = [task["fields"] if tool == "argilla" else task["data"] for task in tasks]
    assert [each["text"] for each in fields] == asked  # the least certain first
    guesses = [
        task["suggestions"]["correct_category"]["value"]
        if tool == "argilla"
        else task["predictions"][0]["result"][0]["value"]["choices"][0]
        for task in tasks
    ]
    assert guesses == [row["category"] for row in rows]

    given = [
        ("水果",),
        ("数据线", "数据线", "其他"),
        ("洗护", "水果"),
        (),
    ]  # the third is disputed, the last not labelled
    back = [exported(tool, task, *labels) for task, labels in zip(tasks, given, strict=True)]
    (tmp_path / "export.json").write_text(json.dumps(back, ensure_ascii=False), "utf-8")
    filled = read_corrections([tmp_path / "export.json"])
    assert [tuple(each) for each in filled.by_content.values()] == [("红富士苹果", "水果"), ("usb c cable", "数据线")]
    assert (filled.blank, filled.disputed) == (1, 1)


def of_label_studio(*people: Any) -> dict[str, Any]:
    """Return an export in which each person has these choices."""
    results = [[{"from_name": "correct_category", "value": {"choices": choices}}] for choices in people]
    return {"data": {"text": "苹果"}, "annotations": [{"result": result} for result in results]}


def of_argilla(*answers: Any) -> dict[str, Any]:
    return {"fields": {"text": "苹果"}, "responses": {"correct_category": list(answers)}}


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        (of_label_studio(["a", "b"]), "row 1: a person chose 2 labels"),
        (of_label_studio({"a": 1}), "row 1: label is an object"),
        (of_label_studio([["a"]]), "row 1: label is a list"),
        (of_label_studio(True), "row 1: label is true or false"),
        (of_label_studio(["a"], ["b"]), "1 disputed"),
        ({"data": {"text": "苹果"}, "annotations": 5}, "row 1: annotations is 5"),
        ({"data": {"text": "苹果"}, "annotations": [{"result": 5}]}, "row 1: result is 5"),
        ({"data": {"text": "苹果"}, "predictions": []}, "nothing is filled in .1 rows without a correction"),
        (of_argilla({"value": ["a"]}), "row 1: label is a list"),
        (of_argilla(7), "row 1: response is 7"),
        (of_argilla({"value": "a", "status": "discarded"}, {"value": "a", "status": "draft"}), "nothing is filled in"),
        ({"fields": {"text": "苹果"}, "suggestions": {}}, "nothing is filled in"),
    ],
)
def test_an_export_that_cannot_be_used_is_refused(tmp_path: Path, row: dict[str, Any], complaint: str) -> None:
    (tmp_path / "export.json").write_text(json.dumps([row]), "utf-8")
    with pytest.raises(InputError, match=complaint):
        read_corrections([tmp_path / "export.json"])


def test_one_choice_need_not_be_a_list(tmp_path: Path) -> None:
    (tmp_path / "export.json").write_text(json.dumps([of_label_studio("食品 > 水果")]), "utf-8")
    ((_, correction),) = read_corrections([tmp_path / "export.json"]).by_content.items()
    assert correction.label == "食品 > 水果"


def test_a_typo_in_a_category_is_reported(shop: Path, table: Path, tmp_path: Path) -> None:
    filled = corrections(tmp_path / "filled.csv", [("苹果 新", "食品 > 水菓")])
    with pytest.raises(InputError, match="did you mean '食品 > 水果'"):
        retrain(shop, table, [filled], tmp_path / "new")
    with pytest.raises(InputError, match="is the old checkpoint"):
        retrain(shop, table, [filled], shop)


def test_classify_log_drift_and_review_by_command(
    server: Server, checkpoint: Path, sample: Path, tmp_path: Path
) -> None:
    """Classify a file with a log, check for drift, and list texts to label."""
    table, log, answers = tmp_path / "table.csv", tmp_path / "log.jsonl", tmp_path / "answers.jsonl"
    table.write_text("".join(sample.read_text("utf-8").splitlines(keepends=True)[:600]), "utf-8")
    done = aisle("classify", table, "-o", answers, "--url", server.url, "--log", log, "--keep-text", "--json")
    assert done.returncode == 0, done.stderr
    answered = json.loads(done.stdout)["rows"] - json.loads(done.stdout)["errors"]

    done = aisle("drift", checkpoint, log)
    assert done.returncode == 0, done.stderr
    assert "no need to retrain" in done.stdout
    result = drift(checkpoint, answers)
    assert result["rows"] == drift(checkpoint, log)["rows"] == answered  # without the client's own probes
    assert not result["retrain"]
    assert result["measures"].keys() == drift_statistics.RULES.keys()

    done = aisle("review", log, "-o", tmp_path / "a.csv", "--rows", "40", "--json")
    assert json.loads(done.stdout)["rows"] == 40
    assert review(table, tmp_path / "b.csv", rows=40, url=server.url)["rows"] == 40
    assert (
        (tmp_path / "b.csv").read_text("utf-8").startswith("text,category,confidence,category_2,confidence_2,correct")
    )


def test_both_clients_log(server: Server, tmp_path: Path) -> None:
    texts = ["红富士苹果", "手机壳"]

    async def ask(log: TrafficLog) -> None:
        async with AsyncClassifier(server.url, log=log) as classifier:
            await classifier.classify(texts)

    with TrafficLog(tmp_path / "log.jsonl", keep_text=True) as log:
        with Classifier(server.url, log=log) as classifier:
            answers = classifier.classify(texts)
            list(classifier.stream(["猫粮", "", None]))
            classifier.probe(2)
        asyncio.run(ask(log))
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text("utf-8").splitlines()]
    assert [row["text"] for row in rows] == [*texts, "猫粮", *texts]
    assert [row["category"] for row in rows[:2]] == [each.category for each in answers]
    done = aisle("classify", "好", "--keep-text", "--url", server.url)
    assert done.returncode == 2
    assert "needs --log" in done.stderr


@pytest.mark.parametrize(("lost", "gained", "worse"), [(0, 0, False), (3, 1, False), (30, 10, True), (10, 30, False)])
def test_a_checkpoint_that_loses_beyond_chance_is_called_worse(lost: int, gained: int, worse: bool) -> None:
    scores = {"old": {"accuracy": 0.9}, "new": {"accuracy": 0.8}, "rows": 200}
    compared = {"only_old_right": lost, "only_new_right": gained, **scores}
    assert _is_worse(compared) == worse
    notes = _notes_of_loss(compared, 2)
    assert [note.startswith("the new checkpoint is worse: accuracy 0.8000 instead of 0.9000") for note in notes] == (
        [True] if worse else []
    )
