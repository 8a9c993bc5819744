import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pypinyin
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from aisle.errors import InputError
from aisle.preprocess.augment import DEFAULT, LEXICON, TECHNIQUES, Augmenter, floor_rows, products, split
from aisle.preprocess.clean import clean, clean_rows, prepare
from aisle.preprocess.encode import MASK, TextTokenizer, special_tokens
from aisle.preprocess.tables.table import read_labelled
from aisle.train.core.settings import TrainingSettings
from aisle.train.core.split import is_held_out
from aisle.train.core.split import split as split_table
from aisle.train.experiments.ablate import ablate, draw
from aisle.train.fit.model import train_tokenizer

from .conftest import aisle
from .test_pretrain import sentencepiece

TITLES = [
    "红富士苹果 5斤装 新鲜 包邮",
    "华为手机 黑色 64gb 官方正品",
    "清扬洗发水 质量很好,老公也喜欢。",
    "bosch freestanding dishwasher white stainless steel",
    "这本书的内容很好,孩子非常喜欢,物流也很快",
]


@st.composite
def texts(draw: st.DrawFn) -> str:
    """Cleaned texts with arbitrary characters and, among them, words of the lexicon."""
    words = st.sampled_from(sorted({w for name, groups in LEXICON.items() for group in groups for w in group}))
    pieces = draw(st.lists(st.text(max_size=12) | words | st.sampled_from([" ", "。", "苹果", "3"]), min_size=1))
    text = clean("".join(pieces))
    return text if text and clean(text) == text else "苹果 3斤"


@pytest.mark.parametrize("name", TECHNIQUES)
@settings(deadline=None)  # the first call loads the table of pronunciations
@given(text=texts(), seed=st.integers(0, 99))
def test_a_varied_text_stays_valid_and_names_no_other_product(name: str, text: str, seed: int) -> None:
    changed = TECHNIQUES[name](text, random.Random(seed))
    assert prepare(changed)
    assert products(changed) <= products(text)
    assert changed == TECHNIQUES[name](text, random.Random(seed))


@pytest.mark.parametrize("name", ["delete", "swap", "mask", "synonym", "brand", "attribute"])
@given(text=texts(), seed=st.integers(0, 99))
def test_a_product_named_stays_named(name: str, text: str, seed: int) -> None:
    assert products(TECHNIQUES[name](text, random.Random(seed))) == products(text)


@given(text=texts())
def test_pieces_make_up_the_text(text: str) -> None:
    pieces, spare = split(text)
    assert "".join(pieces) == text
    assert all(pieces[i].strip() and not products(pieces[i]) for i in spare)


def test_chinese_splits_into_characters_and_other_scripts_into_words() -> None:
    pieces, spare = split("平板电脑 wifi 6.5inch屏。")
    assert pieces == ["平板电脑", " ", "wifi", " ", "6.5inch", "屏", "。"]
    assert [pieces[i] for i in spare] == ["wifi", "6.5inch", "屏"]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("synonym", "价格便宜", {"价钱便宜"}),
        ("synonym", "洗发水", {"洗发露", "洗发液"}),
        ("synonym", "WiFi speed", {"wi-fi speed"}),
        ("synonym", "开心果", {"开心果"}),  # pistachios are not 高兴果
        ("synonym", "greyhound Àgrey", {"greyhound Àgrey"}),
        ("brand", "耐克鞋 耐克正品", {f"{each}鞋 {each}正品" for each in ("阿迪达斯", "安踏", "特步")}),
        ("brand", "蒙牛酸奶", {"蒙牛酸奶"}),
        ("attribute", "mug 7KG", {"mug 8kg", "mug 9kg", "mug 10kg"}),
        ("attribute", "11斤装", {"11斤装"}),  # the 1斤 in it is not a weight
        ("spaces", "usb cable", {"usbcable"}),
        ("width", "不错。", {"不错.", "不 错。"}),
        ("lookalike", "己", {"已", "巳"}),
        ("delete", "苹果 5斤", {"苹果 5斤"}),  # too short to delete anything
    ],
)
def test_examples_of_each_technique(name: str, text: str, expected: set[str]) -> None:
    assert {TECHNIQUES[name](text, random.Random(seed)) for seed in range(200)} == expected


def test_homophones_sound_alike() -> None:
    for seed in range(50):
        changed = TECHNIQUES["homophone"]("价格便宜质量好", random.Random(seed))
        assert changed != "价格便宜质量好"
        for old, new in zip("价格便宜质量好", changed, strict=True):
            assert pypinyin.lazy_pinyin(new) == pypinyin.lazy_pinyin(old)


def test_a_misspelt_word_does_not_become_another_product() -> None:
    """输 sounds like 书, which would change a loss into a book."""
    assert not any("书" in TECHNIQUES["homophone"]("输", random.Random(seed)) for seed in range(200))
    assert not any("酒店" in TECHNIQUES["lookalike"]("洒店", random.Random(seed)) for seed in range(200))


@pytest.mark.parametrize("learn", [lambda: train_tokenizer(TITLES, 64), lambda: sentencepiece(TITLES)])
def test_masks_are_the_mask_tokens_of_the_tokenizer(learn: Callable[[], Tokenizer], tmp_path: Path) -> None:
    tokenizer = learn()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    changed = TECHNIQUES["mask"](TITLES[4], random.Random(0))
    [tokens] = TextTokenizer(tmp_path / "tokenizer.json").varied_tokens([changed])
    mask = tokenizer.token_to_id(special_tokens(tokenizer)["mask"])
    assert mask is not None
    assert tokens.count(mask) == changed.count(MASK) > 0


def test_a_tokenizer_without_a_mask_token_cannot_mask_words(tmp_path: Path) -> None:
    Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]")).save(str(tmp_path / "tokenizer.json"))
    tokenizer = TextTokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.varied_tokens(["苹果"]) == tokenizer.tokens(["苹果"])
    with pytest.raises(InputError, match="the tokenizer has no"):
        tokenizer.varied_tokens([f"苹果{MASK}"])


def test_each_epoch_and_seed_has_its_own_repeatable_variations() -> None:
    titles = TITLES * 10
    augmenter = Augmenter(tuple(TECHNIQUES), seed=1, rate=1.0)
    first = augmenter.texts(titles, 0)
    assert first == Augmenter(tuple(TECHNIQUES), seed=1, rate=1.0).texts(titles, 0)
    assert first != augmenter.texts(titles, 1)
    assert first != Augmenter(tuple(TECHNIQUES), seed=2, rate=1.0).texts(titles, 0)
    assert all(old != new for old, new in zip(titles, first, strict=True))
    assert len(set(first)) > len(TITLES) * 5  # each copy is varied differently


def test_the_rate_is_the_share_of_texts_varied() -> None:
    titles = TITLES * 200
    for rate in (0.0, 0.3, 1.0):
        varied = Augmenter(("delete", "brand"), 0, rate).texts(titles, 0)
        assert sum(old != new for old, new in zip(titles, varied, strict=True)) / 1000 == pytest.approx(rate, abs=0.05)


def test_without_techniques_nothing_changes() -> None:
    assert Augmenter((), 0, 1.0).texts(TITLES, 0) == TITLES


def test_unknown_techniques_and_rates_are_refused() -> None:
    with pytest.raises(InputError, match=r"there is no augmentation 'swop'; choose from delete, swap"):
        Augmenter(("swop",), 0, 0.5)
    with pytest.raises(InputError, match="not a probability"):
        Augmenter((), 0, 1.5)


def test_defaults_exist() -> None:
    Augmenter(DEFAULT, 0, 0.3)


@given(labels=st.lists(st.sampled_from("abcd"), min_size=1), floor=st.integers(0, 30))
def test_rows_of_rare_classes_are_repeated_evenly(labels: list[str], floor: int) -> None:
    rows = floor_rows(labels, floor)
    assert rows == floor_rows(labels, floor)
    counts = Counter(labels[row] for row in rows)
    assert counts == {label: max(n, floor) for label, n in Counter(labels).items()}
    for label in counts:
        times = Counter(row for row in rows if labels[row] == label)
        assert set(times) == {row for row, each in enumerate(labels) if each == label}
        assert max(times.values()) - min(times.values()) <= 1


@pytest.mark.parametrize("name", ["products", "synonyms", "attributes", "brands", "lookalikes"])
def test_the_lexicon_has_no_duplicates(name: str) -> None:
    counts = Counter(word.casefold() if name != "lookalikes" else word for group in LEXICON[name] for word in group)
    assert [word for word, n in counts.items() if n > 1] == []
    assert all(word and word == clean(word) for word in counts)


@pytest.mark.long
def test_an_ablation_resumes(sample: Path, tmp_path: Path) -> None:

    def run(seeds: int, *techniques: str, rows: int = 300) -> dict[str, Any]:
        settings = TrainingSettings(epochs=1, max_tokens=16)
        return ablate(sample, "text", "category", tmp_path, settings, rows=rows, seeds=seeds, techniques=techniques)

    first = run(1, "swap")
    assert [(r["technique"], r["seed"]) for r in first["runs"]] == [("none", 0), ("swap", 0)]
    assert all(row["error_macro_f1"] is None for row in first["techniques"])
    more = run(2, "swap", "floor")
    assert more["runs"][:2] == first["runs"]
    assert len(more["runs"]) == 6
    swap = next(row for row in more["techniques"] if row["technique"] == "swap")
    by_seed = {(r["technique"], r["seed"]): r["accuracy"] for r in more["runs"]}
    added = [by_seed["swap", seed] - by_seed["none", seed] for seed in (0, 1)]
    assert swap["added_accuracy"] == pytest.approx(sum(added) / 2)
    assert swap["error_accuracy"] == pytest.approx(abs(added[0] - added[1]) / 2)
    assert "swap" in (tmp_path / "report.html").read_text("utf-8")

    with pytest.raises(InputError, match="other data or settings"):
        run(1, "swap", rows=200)
    with pytest.raises(InputError, match="there is no 'swop'"):
        run(1, "swop")


def test_ablation_measures_on_unchanged_texts(sample: Path) -> None:
    """The texts that an ablation measures on are not trained on, held out or varied."""
    whole = split_table(clean_rows(read_labelled(sample, "text", "category"))[0])
    parts = draw(whole, 100, seed=0)
    assert len(parts.train.texts) == 100
    assert parts.held_out == whole.validation
    assert not set(parts.train.texts) & set(parts.held_out.texts)
    assert not any(map(is_held_out, parts.train.texts + parts.held_out.texts))


def test_the_command_refuses_an_unknown_technique(sample: Path, tmp_path: Path) -> None:
    done = aisle("ablate", sample, "-o", tmp_path, "--techniques", "swop")
    assert done.returncode == 2
    assert "there is no 'swop'" in done.stderr
    assert len(done.stderr.splitlines()) == 1
