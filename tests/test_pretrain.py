import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertModel

from aisle.errors import InputError
from aisle.preprocess.encode import MULTILINGUAL
from aisle.train.core.checkpoint import Checkpoint
from aisle.train.core.predict import logits_of
from aisle.train.core.settings import TrainingSettings
from aisle.train.core.split import is_held_out
from aisle.train.fit.model import train_tokenizer
from aisle.train.fit.pretrain import MaskedWords, pretrain, read_texts
from aisle.train.fit.prune import prune_vocabulary
from aisle.train.fit.train import train

from .test_train import FRUIT, table


@pytest.fixture(scope="module")
def fruit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return table(tmp_path_factory.mktemp("data") / "fruit.csv", FRUIT)


@pytest.fixture(scope="module")
def pretrained(fruit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrain") / "bert"
    pretrain([fruit], "text", folder, TrainingSettings(epochs=6, batch_size=8))
    return folder


def test_pretraining_learns(pretrained: Path) -> None:
    epochs = json.loads((pretrained / "pretraining.json").read_text())["epochs"]
    assert epochs[-1]["loss"] < 0.8 * epochs[0]["loss"]


def test_a_pretrained_model_is_fine_tuned(pretrained: Path, fruit: Path, tmp_path: Path) -> None:
    metrics = train(
        fruit, "text", "category", tmp_path / "out", TrainingSettings(str(pretrained), epochs=6, batch_size=8)
    )
    assert metrics["accuracy"] > 0.9
    texts = ["红富士苹果 5斤装", "usb-c Cable 2m", "未见过的字"]
    assert Checkpoint(tmp_path / "out").tokenizer.tokens(texts) == Checkpoint(pretrained).tokenizer.tokens(texts)


def test_pretraining_continues_a_pretrained_model(pretrained: Path, fruit: Path, tmp_path: Path) -> None:
    result = pretrain([fruit], "text", tmp_path / "more", TrainingSettings(str(pretrained), epochs=1, batch_size=8))
    before = json.loads((pretrained / "pretraining.json").read_text())["epochs"]
    assert result["epochs"][0]["loss"] < before[0]["loss"]


def sentencepiece(texts: Sequence[str]) -> Tokenizer:
    """A tokenizer like those of multilingual BERTs."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=MULTILINGUAL, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    ends = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    return tokenizer


def test_a_multilingual_bert_is_pretrained_further_fine_tuned_and_pruned(fruit: Path, tmp_path: Path) -> None:
    tokenizer, folder = sentencepiece([text for text, _ in FRUIT]), tmp_path / "multilingual"
    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size() + 35,  # like multilingual-e5-small: more embeddings than pieces
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))

    pretrain([fruit], "text", tmp_path / "further", TrainingSettings(str(folder), epochs=1, batch_size=8))
    told = TrainingSettings(str(tmp_path / "further"), epochs=8, batch_size=8, patience=8, learning_rate=2e-3)
    assert train(fruit, "text", "category", tmp_path / "classifier", told)["accuracy"] > 0.9
    text_tokenizer = Checkpoint(tmp_path / "classifier").tokenizer
    assert text_tokenizer.tokens(["红富士苹果 5斤装"])[0] == tokenizer.encode("红富士苹果 5斤装").ids

    model, texts = Checkpoint(tmp_path / "classifier").model, [text for text, _ in FRUIT][::3]
    before = logits_of(model, text_tokenizer.tokens(texts), "before")
    pruned, sizes = prune_vocabulary(model, text_tokenizer, texts, tmp_path)
    assert (logits_of(model, pruned.tokens(texts), "after") == before).all()
    assert sizes["vocabulary"]["after"] < text_tokenizer.vocabulary


def test_a_model_without_a_mask_token_is_not_pretrained(fruit: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordPiece({"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3}, unk_token="[UNK]"))
    config = BertConfig(vocab_size=4, hidden_size=64, num_hidden_layers=1, num_attention_heads=1, intermediate_size=64)
    BertModel(config).save_pretrained(tmp_path / "bert")
    tokenizer.save(str(tmp_path / "bert" / "tokenizer.json"))
    with pytest.raises(InputError, match=r"no \[MASK\]"):
        pretrain([fruit], "text", tmp_path / "out", TrainingSettings(str(tmp_path / "bert"), epochs=1))


def test_texts_come_from_several_tables_once_and_none_is_held_out(fruit: Path, tmp_path: Path) -> None:
    more = table(tmp_path / "more.csv", [("红富士苹果 1斤装!", ""), ("新到 蓝牙音箱 大促", ""), ("", "")])
    texts, validation = read_texts([fruit, more], "text")
    known = {text for text, _ in FRUIT} | {"新到 蓝牙音箱 大促"}
    assert {*texts, *validation} == {text for text in known if not is_held_out(text)}
    with pytest.raises(InputError, match="too few"):
        read_texts([table(tmp_path / "none.csv", [("", "")])], "text")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    texts = ["bluetooth headphones headset blue phone box-x", "蓝牙耳机 降噪 bluetooth"] * 20
    return train_tokenizer(texts, 64)


def test_latin_words_are_masked_whole_and_chinese_by_the_piece(tokenizer: Tokenizer) -> None:
    task = MaskedWords(tokenizer, ["xbluetoothx 耳x机 phone-x"], [], TrainingSettings(), torch.device("cpu"))
    pieces = tokenizer.encode("xbluetoothx 耳x机 phone-x").tokens
    words: dict[int, str] = {}
    for piece, number in zip(pieces, task.words[0], strict=True):
        words[number] = words.get(number, "") + piece
    assert words.pop(0) == "[CLS][SEP]"
    assert list(words) == list(range(1, len(words) + 1))
    assert words[1] == "xbluetoothx"
    assert list(words.values())[-3:] == ["phone", "-", "x"]


def test_a_seventh_of_the_words_is_masked_and_no_special_token(tokenizer: Tokenizer) -> None:
    texts = ["bluetooth 蓝牙 耳机 降噪 headphones"] * 500
    task = MaskedWords(tokenizer, texts, [], TrainingSettings(), torch.device("cpu"))
    torch.manual_seed(0)
    seen: dict[str, torch.Tensor] = {}

    class Spy(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
            seen.update(input_ids=input_ids, masked=masked)
            return torch.zeros(int(masked.sum()), task.vocabulary, requires_grad=True)

    assert torch.isfinite(task.loss(Spy(), range(500)))
    masked, ids = seen["masked"], seen["input_ids"]
    assert not masked[:, 0].any()
    assert not masked[:, -1].any()
    assert 0.13 < masked[:, 1:-1].float().mean() < 0.17
    hidden = (ids[masked] == task.mask).float().mean()
    assert 0.75 < hidden < 0.85
    original = torch.tensor(task.tokens)
    assert torch.equal(ids[~masked], original[~masked])
