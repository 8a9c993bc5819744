"""Contrastive training: texts of the same product get similar embeddings, and products that were not learnt too."""

from __future__ import annotations

import csv
import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from aisle.errors import InputError
from aisle.preprocess.clean import content_key
from aisle.preprocess.encode import TextTokenizer
from aisle.train.adapt.retrain import retrain
from aisle.train.core.checkpoint import Checkpoint
from aisle.train.core.groups import is_held_out_group, is_learnt_group, is_validation_group, read_groups
from aisle.train.core.predict import embeddings_of
from aisle.train.core.retrieval import SIMILARITIES, Lookup, lookup, pairs_by_similarity, recall, tfidf_recall
from aisle.train.core.settings import TrainingSettings
from aisle.train.core.split import Split, split
from aisle.train.fit.contrast import NONE, ContrastiveClassification, contrastive_loss
from aisle.train.fit.model import from_scratch
from aisle.train.fit.train import train
from tests.conftest import aisle

COLOURS = ("red", "blue", "green", "black", "white", "silver", "golden", "pink")
MAKERS = ("acme", "globex", "initech", "umbrella", "hooli", "vandelay", "stark", "wayne")
GOODS = {"Kitchen": ("kettle", "toaster", "blender"), "Office": ("stapler", "printer", "shredder")}
NOISE = ("free delivery", "new", "best price", "in stock", "original", "sale", "top quality", "uk model", "boxed")


def offers(path: Path, products: int = 240, seed: int = 0) -> Path:
    """Write a table of three offers for each product, in the words of different shops."""
    rng = random.Random(seed)
    every = [
        (colour, maker, good, category)
        for colour in COLOURS
        for maker in MAKERS
        for category, goods in GOODS.items()
        for good in goods
    ]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "category", "product", "shop"])
        for colour, maker, good, category in rng.sample(every, products):
            for _ in range(3):
                words = [colour, maker, good, *rng.sample(NOISE, 3)]
                rng.shuffle(words)
                writer.writerow([" ".join(words), category, f"{maker} {good} {colour}", "one"])
    return path


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return offers(tmp_path_factory.mktemp("contrast") / "offers.csv")


SETTINGS = TrainingSettings(
    epochs=14, layers=1, hidden_size=64, max_tokens=16, batch_size=64, learning_rate=2e-3, contrastive="product"
)


@pytest.fixture(scope="module")
def trained(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("contrast") / "checkpoint"
    train(table, "text", "category", out, SETTINGS)
    return out


def parts_of(table: Path) -> Split:
    from aisle.preprocess.clean import clean_rows
    from aisle.preprocess.tables.table import read_labelled

    rows, _ = clean_rows(read_labelled(table, "text", "category"))
    return split(rows)._replace(groups=read_groups(table, "text", "product"))


def test_products_that_were_not_learnt_are_found(table: Path, trained: Path) -> None:
    metrics = json.loads((trained / "metrics.json").read_text("utf-8"))
    parts = parts_of(table)
    checkpoint = Checkpoint(trained)
    texts = [text for part in parts[:3] for text in part.texts]
    asked = lookup(texts, parts.groups, is_held_out_group, len(texts))
    assert {is_held_out_group(asked.groups[query] or "") for query in asked.queries} == {True}
    found = recall(embeddings_of(checkpoint.model, checkpoint.tokenizer.tokens(asked.texts), ""), asked)
    torch.manual_seed(0)
    fresh, _ = from_scratch(parts.train.texts, parts.labels, SETTINGS)
    before = recall(embeddings_of(fresh.eval(), checkpoint.tokenizer.tokens(asked.texts), ""), asked)
    assert metrics["search"]["recall_at_10"] == pytest.approx(found)
    assert metrics["search"]["queries"] == len(asked.queries)
    assert metrics["search"]["texts"] == len(texts)
    assert found > before + 0.2
    assert metrics["accuracy"] > 0.95


def test_shortened_embeddings_find_them_too(table: Path, trained: Path) -> None:
    parts = parts_of(table)
    texts = [text for part in parts[:3] for text in part.texts]
    asked = lookup(texts, parts.groups, is_held_out_group, len(texts))
    checkpoint = Checkpoint(trained)
    vectors = embeddings_of(checkpoint.model, checkpoint.tokenizer.tokens(asked.texts), "")
    short = vectors[:, :16] / np.linalg.norm(vectors[:, :16], axis=1, keepdims=True)
    assert recall(short, asked) > recall(vectors, asked) - 0.25


def test_retraining_goes_on_with_the_products(table: Path, trained: Path, tmp_path: Path) -> None:
    corrections = tmp_path / "corrections.csv"
    corrections.write_text("text,correct_category\nred acme kettle for the office,Office\n", "utf-8")
    retrain(trained, table, [corrections], tmp_path / "new", epochs=1)
    assert "recall_at_10" in json.loads((tmp_path / "new" / "metrics.json").read_text("utf-8"))["search"]


def test_the_loss_is_that_of_the_paper() -> None:
    torch.manual_seed(0)
    vectors = torch.randn(7, 8, dtype=torch.float64)
    groups = torch.tensor([0, 0, 1, 0, 2, NONE, 1])
    expected = 0.0
    for size in (8, 4, 2):
        unit = F.normalize(vectors[:, :size].float(), dim=1)
        for i in range(7):
            others = [j for j in range(7) if j != i and groups[j] != NONE]
            pairs = [j for j in others if groups[j] == groups[i]]
            if groups[i] == NONE or not pairs:
                continue
            total = torch.logsumexp(torch.stack([unit[i] @ unit[j] / 0.05 for j in others]), 0)
            expected -= sum(float(unit[i] @ unit[j] / 0.05 - total) for j in pairs) / len(pairs) / 3
    assert float(contrastive_loss(vectors, groups)) == pytest.approx(expected, rel=1e-5)


def test_a_batch_without_pairs_has_no_loss() -> None:
    vectors = torch.randn(3, 8, requires_grad=True)
    loss = contrastive_loss(vectors, torch.tensor([0, NONE, NONE]))
    torch.autograd.backward(loss)
    assert float(loss.detach()) == 0
    assert vectors.grad is not None
    assert not vectors.grad.any()


def test_batches_keep_pairs_of_learnt_products_side_by_side(table: Path, trained: Path) -> None:
    tokenizer = TextTokenizer(trained / "tokenizer.json")
    task = ContrastiveClassification(parts_of(table), tokenizer, SETTINGS, torch.device("cpu"))
    units = task.units(random.Random(0))
    assert sorted(row for unit in units for row in unit) == list(range(len(task.texts)))
    for unit in units:
        assert len({int(task.groups[row]) for row in unit}) == 1
        assert len(unit) == 1 or int(task.groups[unit[0]]) != NONE
    assert sum(len(unit) == 2 for unit in units) > 50
    groups = read_groups(table, "text", "product")
    for text, group in zip(task.texts, task.groups.tolist(), strict=True):
        assert (group != NONE) == is_learnt_group(groups[content_key(text)])
    beside = sum(task.groups[a] == task.groups[b] for batch in task.epoch(0) for a, b in itertools.pairwise(batch))
    assert beside > 50


def test_a_text_of_two_products_or_of_none_has_no_group(tmp_path: Path) -> None:
    data = tmp_path / "few.csv"
    data.write_text("text,product\na kettle,1\nA kettle!,2\nb kettle,1\nB kettle,1\nc kettle,\n,3\n", "utf-8")
    assert read_groups(data, "text", "product") == {content_key("b kettle"): "1"}


def test_recall_counts_texts_of_the_same_group() -> None:
    vectors = np.eye(14, dtype=np.float32)
    vectors[1] = vectors[0]
    groups: list[str | None] = ["a", "a", "b", *[None] * 10, "b"]
    asked = Lookup([f"text {i}" for i in range(14)], groups, [0, 1])
    assert recall(vectors, asked) == 1
    vectors[1] = -vectors[0]
    assert recall(vectors, asked) == 0
    same = Lookup(["red acme kettle", "acme kettle red new", *[f"stapler {i}" for i in range(12)]], groups, [0, 1])
    assert tfidf_recall(same) == 1


def test_the_searched_texts_have_the_queries_groups_first() -> None:
    texts = [f"offer {i}" for i in range(100)]
    groups = {content_key(text): f"product {i // 2}" for i, text in enumerate(texts)}
    asked = lookup(texts, groups, is_validation_group, 20)
    assert len(asked.texts) == 20
    assert all(is_validation_group(asked.groups[i] or "") for i in asked.queries)
    assert asked.queries
    for i in asked.queries:
        assert asked.groups.count(asked.groups[i]) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--contrastive", "category"], "--contrastive category: this is the label's column"),
        (["--contrastive", "maker"], "no column 'maker'"),
        (["--contrastive", "shop"], "all pairs of training texts have the same shop"),
        (["--contrastive", "text"], "no two training texts have the same text"),
        (["--contrastive", "product", "--mixup", "0.2"], "leave one out"),
    ],
)
def test_what_cannot_be_contrasted_is_refused_in_one_line(
    table: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    done = aisle("train", table, "-o", tmp_path / "ckpt", "--layers", "1", *options)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "ckpt").exists()


def test_a_table_of_single_offers_is_refused(tmp_path: Path) -> None:
    data = tmp_path / "single.csv"
    rows = "".join(f"kettle {i},{'a' if i % 2 else 'b'},{i}\n" for i in range(50))
    data.write_text("text,category,product\n" + rows, "utf-8")
    with pytest.raises(InputError, match="no two training texts have the same product"):
        train(data, "text", "category", tmp_path / "ckpt", SETTINGS)


def test_pairs_of_one_group_are_counted_by_their_similarity() -> None:
    vectors = np.array([[1, 0], [1, 0], [0, 1], [0.96, 0.28]], np.float32)
    found = {each["similarity"]: each for each in pairs_by_similarity(vectors, ["a", "a", "a", "b"])}
    assert found[0.97] == {"similarity": 0.97, "pairs": 1, "precision": 1.0, "recall": pytest.approx(1 / 3)}
    assert found[0.95] == {"similarity": 0.95, "pairs": 3, "precision": pytest.approx(1 / 3), "recall": 1 / 3}
    assert pairs_by_similarity(vectors[2:], ["a", "b"])[0]["recall"] == 0


def test_the_metrics_tell_how_well_a_similarity_finds_duplicates(trained: Path) -> None:
    found = json.loads((trained / "metrics.json").read_text("utf-8"))["duplicates"]
    assert [each["similarity"] for each in found] == [*SIMILARITIES]
    recalls = [each["recall"] for each in found]
    assert recalls == sorted(recalls, reverse=True)
    assert recalls[0] > 0
