"""Fast paths are exact: cleaning that skips unnecessary steps, and the fast tokenizer compared with Hugging Face's."""

from __future__ import annotations

import html
import json
import random
import re
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from aisle.preprocess import fast
from aisle.preprocess.clean import clean, is_clean, prepare
from aisle.preprocess.encode import SPECIAL, TextTokenizer, read_special_tokens_as_text
from aisle.train.fit.model import train_tokenizer
from aisle.train.synthetic.catalogue import generate

TEXTS = [row["text"] for row in generate(1500, 3)]
TEXTS = [prepare(text) for text in TEXTS if clean(text)]
LIMIT = 24
nanotoken = pytest.mark.skipif(not fast.installed(), reason="needs aisle-classifier[fast]")


def step_by_step(text: str) -> str:
    """Clean a text with all steps, necessary or not."""
    for _ in range(3):
        text = html.unescape(text)
    unseen = (
        "\u00ad\u034f\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff\ufff9-\ufffb\ue000-\uf8ff"
    )
    text = unicodedata.normalize("NFKC", re.sub(f"[{unseen}]", "", text))
    markup = r"<!--.{0,1000}?-->|<(script|style)\b[^<>]*>.{0,1000}?</\1\s*>|</?[a-zA-Z][^<>]*>"
    text = re.sub(markup, " ", text, flags=re.S | re.I)
    text = re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", " ", text)
    text = re.sub(r"([!?.,;:~*_=#\-|/、。·])\1+", r"\1", text)
    return re.sub(r"\s+", " ", text).strip()


def test_fast_cleaning_gives_the_same_texts() -> None:
    rng = random.Random(1)
    odd = (
        [chr(code) for code in range(0x3100)] + [chr(code) for code in range(0xE000, 0x10000)] + ["&amp;", "<b>", "  "]
    )
    made = [
        "".join(rng.choice(odd) if rng.random() < 0.2 else rng.choice(" a中.b!1") for _ in range(rng.randint(0, 20)))
        for _ in range(20_000)
    ]
    assert [clean(text) for text in made] == [step_by_step(text) for text in made]
    assert 1000 < sum(map(is_clean, made)) < 19_000
    assert sum(map(is_clean, TEXTS)) > 0.98 * len(TEXTS)


def chinese_bert() -> Tokenizer:
    """A tokenizer like that of BERT-base-Chinese."""
    characters = sorted({c for text in TEXTS for c in text.lower() if not c.isspace()})
    pieces = [*SPECIAL, *characters, *(f"##{c}" for c in characters), "usb", "cable", "##les"]
    tokenizer = Tokenizer(models.WordPiece(dict(zip(pieces, range(len(pieces)), strict=True)), unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return tokenizer


def earlier() -> Tokenizer:
    """A tokenizer like those of Aisle 0.1: an unknown character makes its whole word unknown."""
    tokenizer = train_tokenizer(TEXTS, LIMIT)
    split = pre_tokenizers.Split(Regex(fast.HAN_ALONE), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.BertPreTokenizer(), split])
    return tokenizer


TOKENIZERS = {"standard": chinese_bert, "ours": lambda: train_tokenizer(TEXTS, LIMIT), "earlier": earlier}


@nanotoken
@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_fast_tokenizer_is_exact(name: str, tmp_path: Path) -> None:
    """Over texts and fuzz, with truncation; and the encoder that uses it says of each text what it said before."""
    tokenizer = TOKENIZERS[name]()
    tokenizer.enable_truncation(LIMIT)
    read_special_tokens_as_text(tokenizer)
    decision = fast.decide(tokenizer, TEXTS, LIMIT)
    assert decision["exact"], decision
    assert decision["texts"] == len(TEXTS) + fast.FUZZED
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    slow = TextTokenizer(tmp_path / "tokenizer.json")
    (tmp_path / fast.DECISION).write_text(json.dumps(decision))
    quick = TextTokenizer(tmp_path / "tokenizer.json")
    tried = [*fast.fuzz(TEXTS, 500, seed=7), " ".join(TEXTS[:200]), "中文" * 3000, "a" * 9000]
    for one, other in zip(slow(tried), quick(tried), strict=True):
        assert np.array_equal(np.asarray(one), np.asarray(other))
    _, unread = fast.FastTokenizer(tokenizer)(TEXTS, LIMIT)
    assert len(unread) < 0.1 * len(TEXTS)  # it is of use


@nanotoken
@pytest.mark.parametrize("name", ["ours", "earlier"])
def test_a_batch_is_tokenized_like_single_texts(name: str) -> None:
    """Spaces go around the unknown and into long Chinese. Texts with a line end or a very long word are left out."""
    fast_tokenizer = fast.FastTokenizer(TOKENIZERS[name]())
    cut = fast_tokenizer._cutter
    assert cut
    texts = ["苹" * 40, "", "苹" * 16, "a" * 63, "a" * 70, "两\n行", *fast.fuzz(TEXTS, 300, seed=3)]
    alone = [cut([text])[0] for text in texts]
    assert alone[:6] == ["苹" * 16 + " " + "苹" * 16 + " " + "苹" * 8, "", "苹" * 16, "a" * 63, None, None]
    assert cut(texts) == alone  # one by one, for the line's end
    assert cut(texts[6:]) == alone[6:]
    assert cut(["苹\U00020bb7果"]) == (["苹 \U00020bb7 果"] if name == "ours" else [None])


def zeros(texts: int, tokens: int) -> fast.Ragged:
    return fast.Ragged(np.zeros(texts * tokens, np.uint32), np.full(texts, tokens, np.int32))


def test_the_beginning_of_a_long_text_is_enough(tmp_path: Path) -> None:
    train_tokenizer(TEXTS, LIMIT).save(str(tmp_path / "tokenizer.json"))
    encoder, tokenizer = (
        TextTokenizer(tmp_path / "tokenizer.json"),
        Tokenizer.from_file(str(tmp_path / "tokenizer.json")),
    )
    read_special_tokens_as_text(tokenizer)
    words = "[MASK] " * 10 + "苹果,"
    texts = [
        " ".join(TEXTS[:300]),
        "。".join(TEXTS[:300]),
        "x" * 5000,
        "x" * 5000 + " 苹果" * 40,
        words * 50,
        "苹" * 5000,
    ]
    assert encoder.tokens(texts) == [each.ids for each in tokenizer.encode_batch(texts)]
    assert encoder(texts).truncated == sum(bool(each.overflowing) for each in tokenizer.encode_batch(texts))


def test_only_the_necessary_part_of_a_long_run_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a space in it, 32 KB would take the tokenizer a fifth of a second, for the first few words."""
    train_tokenizer(TEXTS, LIMIT).save(str(tmp_path / "tokenizer.json"))
    encoder = TextTokenizer(tmp_path / "tokenizer.json")
    texts = ["a" * 32_768, "b7" * 16_000, "好 " + "x苹é" * 9_000, "\U00020bb7" * 8_000, "长" * 10_922]
    expected = [encoder.tokenizer.encode(text).ids for text in texts]

    def beginnings(_: object, texts: list[str]) -> Any:
        assert sum(map(len, texts)) < 1000
        return whole(encoder, texts)

    whole = TextTokenizer._read_whole
    monkeypatch.setattr(TextTokenizer, "_read_whole", beginnings)
    assert encoder.tokens(texts) == expected
    assert encoder(texts).truncated == len(texts)


@nanotoken
def test_a_fast_tokenizer_that_differs_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = chinese_bert()
    fits = {"tokenizer": fast.installed(), "texts": 1, "exact": True, "reason": ""}
    for decision, used in ((fits, True), ({**fits, "exact": False}, False), ({**fits, "tokenizer": "x 1"}, False)):
        (tmp_path / fast.DECISION).write_text(json.dumps(decision))
        assert (fast.load(tokenizer, tmp_path) is not None) == used
    monkeypatch.setattr(fast.FastTokenizer, "__call__", lambda _, texts, most: (zeros(len(texts), most), []))
    found = fast.decide(tokenizer, TEXTS, LIMIT)
    assert not found["exact"]
    assert "token ids differ" in found["reason"]


def test_an_unsupported_tokenizer_is_refused() -> None:
    tokenizer = train_tokenizer(TEXTS, LIMIT)
    split = pre_tokenizers.Split(Regex(r"\d"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.BertPreTokenizer(), split])
    found = fast.decide(tokenizer, TEXTS, LIMIT)
    assert not found["exact"]
    assert found["reason"]
