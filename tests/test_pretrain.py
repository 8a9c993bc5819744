import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from aisle.errors import InputError
from aisle.preprocess.encode import Encoder
from aisle.train.data import is_held_out
from aisle.train.model import train_tokenizer
from aisle.train.pretrain import MaskedWords, pretrain, read_texts
from aisle.train.settings import Settings
from aisle.train.train import train

from .test_train import FRUIT, table


@pytest.fixture(scope="module")
def fruit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return table(tmp_path_factory.mktemp("data") / "fruit.csv", FRUIT)


@pytest.fixture(scope="module")
def pretrained(fruit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrain") / "bert"
    pretrain([fruit], "text", folder, Settings(epochs=6, batch_size=8))
    return folder


def test_it_learns_the_language(pretrained: Path) -> None:
    epochs = json.loads((pretrained / "pretraining.json").read_text())["epochs"]
    assert epochs[-1]["loss"] < 0.8 * epochs[0]["loss"]


def test_what_is_pretrained_is_fine_tuned(pretrained: Path, fruit: Path, tmp_path: Path) -> None:
    metrics = train(fruit, "text", "category", tmp_path / "out", Settings(str(pretrained), epochs=6, batch_size=8))
    assert metrics["accuracy"] > 0.9
    texts = ["红富士苹果 5斤装", "usb-c Cable 2m", "未见过的字"]
    assert Encoder(tmp_path / "out" / "tokenizer.json").tokens(texts) == Encoder(pretrained / "tokenizer.json").tokens(
        texts
    )


def test_pretraining_goes_on_from_a_pretrained_model(pretrained: Path, fruit: Path, tmp_path: Path) -> None:
    result = pretrain([fruit], "text", tmp_path / "more", Settings(str(pretrained), epochs=1, batch_size=8))
    before = json.loads((pretrained / "pretraining.json").read_text())["epochs"]
    assert result["epochs"][0]["loss"] < before[0]["loss"]


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
    task = MaskedWords(tokenizer, ["xbluetoothx 耳x机 phone-x"], [], Settings(), torch.device("cpu"))
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
    task = MaskedWords(tokenizer, texts, [], Settings(), torch.device("cpu"))
    torch.manual_seed(0)
    seen = {}

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
