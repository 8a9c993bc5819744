import random

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import BertForSequenceClassification

from aisle.preprocess.encode import SPECIAL
from aisle.train.core.settings import TrainingSettings
from aisle.train.fit.embed import LENGTH, count_neighbours, embed, mutual_information
from aisle.train.fit.model import small_bert, train_tokenizer

SETTINGS = TrainingSettings(layers=1, hidden_size=64, max_tokens=32)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Adjectives and nouns of two kinds of goods; each occurs only with its own kind."""
    draw = random.Random(0)
    fruit = (["sweet", "ripe", "juicy"], ["apple", "pear", "plum"])
    goods = (["fast", "slim", "loud"], ["phone", "disk", "fan"])
    return [
        " ".join([*draw.choices(adjectives, k=2), draw.choice(nouns)]) for adjectives, nouns in [fruit, goods] * 200
    ]


@pytest.fixture(scope="module")
def tokenizer(texts: list[str]) -> Tokenizer:
    return train_tokenizer(texts, 32)


def test_neighbours_count_by_their_distance_and_not_across_texts(tokenizer: Tokenizer) -> None:
    counts = count_neighbours(tokenizer, ["sweet ripe apple", "fast"])
    number = {word: tokenizer.token_to_id(word) for word in ("sweet", "ripe", "apple", "fast")}
    assert counts[number["sweet"], number["ripe"]] == counts[number["ripe"], number["sweet"]] == 1
    assert counts[number["sweet"], number["apple"]] == 1 / 2
    assert counts[[number["fast"]]].sum() == 0


def test_counting_in_parts_changes_nothing(
    texts: list[str], tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = count_neighbours(tokenizer, texts)
    monkeypatch.setattr("aisle.train.fit.embed.CHUNK", 7)
    assert np.allclose(whole.toarray(), count_neighbours(tokenizer, texts).toarray())


def test_mutual_information_follows_its_definition(texts: list[str], tokenizer: Tokenizer) -> None:
    counts = count_neighbours(tokenizer, texts)
    dense = counts.toarray()
    piece, context = dense.sum(axis=1), dense.sum(axis=1) ** 0.75
    with np.errstate(divide="ignore", invalid="ignore"):
        wanted = np.log(dense / dense.sum() / np.outer(piece / piece.sum(), context / context.sum()))
    assert np.allclose(mutual_information(counts).toarray(), np.where(wanted > 0, wanted, 0))


def test_words_with_similar_neighbours_have_similar_embeddings(texts: list[str], tokenizer: Tokenizer) -> None:
    torch.manual_seed(0)
    model = BertForSequenceClassification(small_bert(tokenizer, SETTINGS, num_labels=2))
    before = model.get_input_embeddings().weight.detach().clone()
    embed(model, tokenizer, texts)
    after = model.get_input_embeddings().weight.detach()

    def cosine(a: str, b: str) -> float:
        one, other = (after[tokenizer.token_to_id(word)] for word in (a, b))
        return float(torch.cosine_similarity(one, other, dim=0))

    assert cosine("apple", "pear") > 0.5 > cosine("apple", "phone")
    specials = [tokenizer.token_to_id(token) for token in SPECIAL]
    assert torch.equal(after[specials], before[specials])
    assert float(after[tokenizer.token_to_id("apple")].norm()) == pytest.approx(LENGTH)


def test_texts_of_one_piece_do_not_change_the_embeddings(tokenizer: Tokenizer) -> None:
    model = BertForSequenceClassification(small_bert(tokenizer, SETTINGS, num_labels=2))
    before = model.get_input_embeddings().weight.detach().clone()
    embed(model, tokenizer, ["apple", "phone"])
    assert torch.equal(model.get_input_embeddings().weight, before)
