"""Characters that a model from scratch does not know."""

import math
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from aisle.preprocess.clean import LabelledTexts, prepare
from aisle.preprocess.encode import TextTokenizer
from aisle.train.core.checkpoint import Checkpoint
from aisle.train.core.predict import logits_of
from aisle.train.core.split import split
from aisle.train.fit.classification import Classification
from aisle.train.fit.model import train_tokenizer
from aisle.train.fit.prune import needed, shrink
from aisle.train.fit.train import TrainingSettings
from aisle.train.fit.unknown import INSERTED, SHARE, Unknowns, isolates
from aisle.train.synthetic.catalogue import generate

UNSEEN = "囍犇龘😀𠮷Ѫ"


def test_an_unseen_character_becomes_one_unk() -> None:
    tokenizer = train_tokenizer(["红富士苹果礼盒装", "蓝牙耳机 headphones"] * 20, 200)

    def pieces(text: str) -> list[str]:
        return tokenizer.encode(text).tokens[1:-1]

    alone = pieces("红富士苹果礼盒装")
    for character in UNSEEN:
        assert pieces(f"红富士苹果礼盒装{character}") == [*alone, "[UNK]"]
        assert pieces(f"{character}红富士苹果礼盒装") == ["[UNK]", *alone]
        assert pieces(f"head{character}phones") == [*pieces("head"), "[UNK]", *pieces("phones")]
    assert pieces("囍囍犇") == ["[UNK]"] * 3
    assert "[UNK]" not in pieces("headphones" * 16)  # long words are not unknown either
    assert pieces("红" * 40) == ["红"] * 40


def test_a_pruned_character_becomes_one_unk() -> None:
    tokenizer = train_tokenizer(["红富士苹果 礼盒", "蓝牙耳机"] * 20, 32)
    pruned = shrink(tokenizer, needed(tokenizer, ["红富士苹果"], 1))
    assert isolates(pruned)
    before, after = tokenizer.encode("红富士苹果蓝").tokens, pruned.encode("红富士苹果蓝").tokens
    assert after == [*before[:-2], "[UNK]", "[SEP]"]


def test_training_adds_unknown_characters_to_some_texts() -> None:
    texts = ["红富士苹果 5斤装", "蓝牙耳机", "[MASK]耳机"] * 300
    tokenizer = train_tokenizer(texts, 16)
    unknowns = Unknowns(tokenizer, texts, seed=0)
    tokens = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    put = [unknowns.put(texts, tokens, epoch) for epoch in range(2)]
    assert put[0] == unknowns.put(texts, tokens, 0) != put[1]
    for each in put:
        assert 0.8 * SHARE < len(each) / 600 < 1.2 * SHARE
        assert not any("[MASK]" in texts[number] for number in each)
        for text in each.values():
            unknown = tokenizer.encode(text).tokens.count("[UNK]")
            # Instead of a character, or between two.
            assert (unknown, len(text)) in {(1, 4), (1, 9), (INSERTED, 4 + INSERTED), (INSERTED, 9 + INSERTED)}
    assert not any("[UNK]" in encoding.tokens for encoding in tokenizer.encode_batch(texts))


def test_a_text_with_unknown_characters_of_its_own_stays_as_it_is() -> None:
    """They may be the only sign of a new category, which `aisle retrain` must learn."""
    tokenizer = train_tokenizer(["红富士苹果"] * 100, 16)
    texts = ["礼盒装 红富士苹果", "红富士苹果"] * 100
    tokens = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    put = Unknowns(tokenizer, texts, seed=0).put(texts, tokens, 0)
    assert put
    assert all(texts[number] == "红富士苹果" for number in put)


def test_each_epoch_shows_the_model_unknown_characters(tmp_path: Path) -> None:
    texts = [f"{'红富士苹果' if i % 2 else '防摔手机壳'} {i}" for i in range(400)]
    train_tokenizer(texts, 16).save(str(tmp_path / "tokenizer.json"))
    table = LabelledTexts(texts, ["ab"[i % 2] for i in range(400)])
    task = Classification(
        split(table), TextTokenizer(tmp_path / "tokenizer.json"), TrainingSettings(), torch.device("cpu")
    )
    unknown = task.tokenizer.tokenizer.token_to_id("[UNK]")
    for epoch in range(2):
        assert sorted(row for batch in task.epoch(epoch) for row in batch) == list(range(len(task.texts)))
        shown = sum(unknown in ids for ids in task.tokens)
        assert 0.8 * SHARE < shown / len(task.texts) < 1.2 * SHARE
        assert not any(unknown in ids for ids in task.plain_tokens)
    assert not any(unknown in ids for ids in task.validation)


def test_the_share_of_what_is_unknown(checkpoint: Path) -> None:
    tokenizer = Checkpoint(checkpoint).tokenizer
    known, half, none = tokenizer(["苹果", "苹果 𠮷", "𠮷𠮷"]).unknown[:, 0].tolist()
    assert (known, none) == (0, 1)
    assert half == pytest.approx(1 / len(tokenizer.tokens(["苹果 𠮷"])[0][1:-1]))


def test_a_rare_character_changes_few_categories(checkpoint: Path) -> None:
    """A tokenizer that calls the word around it [UNK], and a model that never saw [UNK], change some 70 of 300."""
    own = Checkpoint(checkpoint)
    titles = list(dict.fromkeys(row["text"] for row in generate(400, seed=7) if row["text"].strip(" <br>")))[:300]
    rng = random.Random(0)

    def categories(texts: list[str]) -> list[int]:
        found: list[int] = (
            logits_of(own.model, own.tokenizer.tokens([prepare(text) for text in texts]), "").argmax(1).tolist()
        )
        return found

    before, changes = categories(titles), 0
    for _ in range(3):
        places = [rng.randrange(len(title) + 1) for title in titles]
        rare = [title[:at] + rng.choice(UNSEEN) + title[at:] for title, at in zip(titles, places, strict=True)]
        changes += sum(old != new for old, new in zip(before, categories(rare), strict=True))
    assert len(titles) == 300
    assert changes / 3 < 40


def test_training_keeps_answers_stable(tmp_path: Path) -> None:
    texts = [f"{'红富士苹果' if i % 2 else '防摔手机壳'} {i}" for i in range(400)]
    train_tokenizer(texts, 16).save(str(tmp_path / "tokenizer.json"))
    parts = split(LabelledTexts(texts, ["ab"[i % 2] for i in range(400)]))
    tokenizer = TextTokenizer(tmp_path / "tokenizer.json")
    task = Classification(parts, tokenizer, TrainingSettings(), torch.device("cpu"))
    task.epoch(0)
    unknown = tokenizer.tokenizer.get_vocab()["[UNK]"]

    def model(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        """Answer a text with its number of unknown characters, for the first category and against the second."""
        count = input_ids.eq(unknown).sum(dim=1).float()
        return SimpleNamespace(logits=torch.stack([count, -count], dim=1))

    moved = [row for row, ids in enumerate(task.tokens) if unknown in ids][:8]
    still = [row for row, ids in enumerate(task.tokens) if unknown not in ids][:8]
    assert float(task.loss(model, still)) == pytest.approx(8 * math.log(2))
    logits = torch.tensor([[1.0, -1.0]]) * torch.tensor([[task.tokens[row].count(unknown)] for row in moved])
    answers = logits.log_softmax(dim=1)
    cross_entropy = 16 * math.log(2)  # of the original texts
    divergence = (math.log(0.5) - answers).mean(dim=1).sum()  # from the uniform answers for these
    assert float(task.loss(model, [*still, *moved])) == pytest.approx(float(cross_entropy + divergence), rel=1e-5)
