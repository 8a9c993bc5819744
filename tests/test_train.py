import json
import random
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertTokenizerFast, GPT2Config

from aisle.errors import InputError
from aisle.preprocess.clean import LabelledTexts
from aisle.preprocess.encode import SPECIAL
from aisle.train.core.checkpoint import Checkpoint
from aisle.train.core.split import folds, is_held_out, is_validation, split
from aisle.train.evaluation.evaluate import evaluate
from aisle.train.fit.loop import like_lengths
from aisle.train.fit.model import train_tokenizer
from aisle.train.fit.train import TrainingSettings, train


def table(path: Path, rows: list[tuple[str, str]], header: str = "text,category") -> Path:
    path.write_text(header + "\n" + "".join(f"{text},{label}\n" for text, label in rows), "utf-8")
    return path


FRUIT = [(f"红富士苹果 {i}斤装", "水果") for i in range(40)] + [(f"手机壳 防摔 第{i}款", "配件") for i in range(40)]


def test_checkpoint_is_complete(checkpoint: Path, sample: Path) -> None:
    metrics = json.loads((checkpoint / "metrics.json").read_text())
    training = json.loads((checkpoint / "training.json").read_text())
    labels = Checkpoint(checkpoint).labels
    assert len(labels) >= 40
    assert all(label.count(" > ") == 2 for label in labels)
    assert Checkpoint(checkpoint).model.config.id2label == dict(enumerate(labels))
    assert training["checkpoint_sha256"] == Checkpoint(checkpoint).fingerprint
    assert len(training["data"]["sha256"]) == len(training["code_sha256"]) == 64
    assert training["data"]["cleaning"]["dropped"]["duplicate"] > 0
    assert sum(row["support"] for row in metrics["per_class"].values()) == metrics["rows"]["held_out"]
    assert training["temperature"] != 1
    assert 0 < len(training["epochs"]) <= training["settings"]["epochs"]


def test_training_learns(checkpoint: Path) -> None:
    """Four epochs at most over 2,700 short titles: far better than chance (1 in 40)."""
    metrics = json.loads((checkpoint / "metrics.json").read_text())
    assert metrics["accuracy"] > 0.5
    assert metrics["macro_f1"] > 0.4


def test_evaluate_repeats_the_measurements_of_training(checkpoint: Path, sample: Path) -> None:
    """On the held-out rows. Duplicates in the file count here, so the figures are close, but not equal."""
    metrics = json.loads((checkpoint / "metrics.json").read_text())
    result = evaluate(sample, "text", "category", checkpoint=checkpoint, held_out=True)
    assert result["accuracy"] == pytest.approx(metrics["accuracy"], abs=0.05)
    assert result["skipped"]["empty"] > 0


def test_split_is_by_content() -> None:
    texts = [f"商品 {i}" for i in range(2000)]
    parts = split(LabelledTexts(texts, ["ab"[i % 2] for i in range(2000)]))
    assert 0.17 < len(parts.held_out.texts) / 2000 < 0.23
    assert not set(parts.train.texts) & set(parts.held_out.texts)
    for text in texts[:100]:
        assert is_held_out(text) == is_held_out(f" {text.upper()}！")


def test_validation_is_a_tenth_of_what_is_not_held_out() -> None:
    texts = [f"商品 {i}" for i in range(2000)]
    parts = split(LabelledTexts(texts, ["ab"[i % 2] for i in range(2000)]))
    assert 0.08 < len(parts.validation.texts) / (2000 - len(parts.held_out.texts)) < 0.12
    assert sorted(parts.train.texts + parts.validation.texts + parts.held_out.texts) == sorted(texts)


def test_a_category_with_rows_only_in_validation_is_trained() -> None:
    texts = [f"商品 {i}" for i in range(200)]
    rare = [text for text in texts if not is_held_out(text) and is_validation(text)][:2]
    parts = split(LabelledTexts(texts, ["rare" if text in rare else "ab"[len(text) % 2] for text in texts]))
    assert {*rare} <= {*parts.train.texts}
    assert "rare" not in parts.validation.labels


def test_folds_hold_out_each_text_once_but_never_the_held_out_fifth() -> None:
    texts = [f"商品 {i}" for i in range(600)]
    splits = list(folds(LabelledTexts(texts, ["ab"[i % 2] for i in range(600)]), 3))
    held_out = [text for parts in splits for text in parts.held_out.texts]
    assert sorted(held_out) == sorted(text for text in texts if not is_held_out(text))
    for parts in splits:
        assert 120 < len(parts.held_out.texts) < 200
        assert not set(parts.held_out.texts) & {*parts.train.texts, *parts.validation.texts}


@pytest.mark.long
def test_cross_validation_reports_the_spread(tmp_path: Path) -> None:
    data = table(tmp_path / "a.csv", FRUIT)
    metrics = train(data, "text", "category", tmp_path / "out", TrainingSettings(epochs=4, batch_size=8, folds=2))
    figures = metrics["cross_validation"]
    scores = [fold["accuracy"] for fold in figures["folds"]]
    assert len(scores) == 2
    assert figures["mean"]["accuracy"] == pytest.approx(sum(scores) / 2)
    assert figures["mean"]["accuracy"] > 0.6  # of two categories, from some sixty texts
    with pytest.raises(InputError, match="two folds or more"):
        train(data, "text", "category", tmp_path / "other", TrainingSettings(folds=1))


def test_batches_cover_every_text_once() -> None:
    tokens = [[0] * (1 + i % 30) for i in range(1003)]
    batches = list(like_lengths(tokens, 64, random.Random(0)))
    assert sorted(i for batch in batches for i in batch) == list(range(1003))
    padded = sum(len(batch) * max(len(tokens[i]) for i in batch) for batch in batches)
    assert sum(map(len, tokens)) / padded > 0.9


def test_a_seed_repeats_a_run(tmp_path: Path) -> None:
    data = table(tmp_path / "a.csv", FRUIT)
    runs = [tmp_path / "1", tmp_path / "2", tmp_path / "3"]
    for run, seed in zip(runs, [0, 0, 1], strict=True):
        train(data, "text", "category", run, TrainingSettings(epochs=1, seed=seed))
    weights = [Checkpoint(run).model.classifier.weight for run in runs]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_the_tokenizer_knows_frequent_words_and_every_character() -> None:
    texts = ["蓝牙耳机 降噪 headphones", "蓝牙音箱 低音 headphone", "耳机壳 iPhone蓝牙"] * 20 + ["饕餮"]
    tokenizers = [train_tokenizer(texts, 16) for _ in range(2)]
    assert tokenizers[0].to_str() == tokenizers[1].to_str()
    assert tokenizers[0].encode("iPhone蓝牙耳机").tokens[1:-1] == ["iphone", "蓝牙耳机"]
    assert tokenizers[0].encode("耳机蓝牙").tokens[1:-1] == ["耳机", "蓝牙"]
    assert tokenizers[0].encode("餮饕牙蓝").tokens[1:-1] == ["餮", "饕", "牙", "蓝"]
    assert tokenizers[0].encode("蓝牙" * 5000).tokens[1:-1] == ["蓝牙"] * 14
    assert tokenizers[0].encode("犇").tokens[1:-1] == ["[UNK]"]


@pytest.fixture
def pretrained(tmp_path: Path) -> Path:
    """A masked-language BERT as on the hub, with its WordPiece vocabulary file."""
    folder = tmp_path / "pretrained"
    texts = [text for text, _ in FRUIT]
    characters = sorted({c for text in texts for c in text if c != " "})
    vocabulary = [*SPECIAL, *characters, *("##" + c for c in characters if c.isdigit())]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", "utf-8")
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    BertForMaskedLM(config).save_pretrained(folder)
    return folder


def test_any_hugging_face_bert_is_fine_tuned(pretrained: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    metrics = train(
        table(tmp_path / "a.csv", FRUIT, "title,kind"),
        "title",
        "kind",
        out,
        TrainingSettings(str(pretrained), epochs=8, batch_size=8, learning_rate=3e-3, max_tokens=64),
    )
    assert metrics["accuracy"] > 0.9
    assert Checkpoint(out).model.config.hidden_size == 32
    assert Checkpoint(out).tokenizer.max_tokens == 64


def test_models_that_cannot_be_used(tmp_path: Path) -> None:
    data = table(tmp_path / "a.csv", FRUIT)
    GPT2Config().save_pretrained(tmp_path / "gpt2")
    with pytest.raises(InputError, match="only these can be trained and served"):
        train(data, "text", "category", tmp_path / "out", TrainingSettings(str(tmp_path / "gpt2")))
    with pytest.raises(InputError, match="cannot load"):
        train(data, "text", "category", tmp_path / "out", TrainingSettings(str(tmp_path / "nothing")))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ([], "no row is left"),
        ([("苹果", "水果"), ("香蕉", "水果")], "only category '水果' is left"),
        ([*FRUIT, ("孤品", "独类")], "独类"),
    ],
)
def test_data_that_cannot_be_learnt_from(tmp_path: Path, rows: list[tuple[str, str]], complaint: str) -> None:
    if "孤品" in str(rows):  # the single row must be held out
        rows[-1] = (next(t for t in (f"孤品{i}" for i in range(100)) if is_held_out(t)), "独类")
    with pytest.raises(InputError, match=complaint):
        train(table(tmp_path / "a.csv", rows), "text", "category", tmp_path / "out", TrainingSettings())


def test_a_folder_that_is_not_a_checkpoint_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="is not a checkpoint"):
        train(table(tmp_path / "a.csv", FRUIT), "text", "category", tmp_path, TrainingSettings())
    assert (tmp_path / "thesis.txt").exists()
