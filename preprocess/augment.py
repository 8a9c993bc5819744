"""Augmentation: vary the training texts in each epoch, so that a model learns to ignore what does not matter.

Each technique is an object with one method. All are label-safe: product names decide the category, so they are never
deleted or masked, and a change that creates the name of another product is undone. Labels are not used here, and
evaluation texts are never augmented.
"""

from __future__ import annotations

import random
import re
import tomllib
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

from aisle.errors import InputError
from aisle.preprocess.clean import prepare
from aisle.preprocess.encode import MASK
from aisle.preprocess.han import HAN
from aisle.preprocess.values import TextError

FEWEST = 4  # words or Chinese characters; a text with fewer is not changed
DELETED = SWAPPED = 0.1  # share of them (alpha in Wei and Zou 2019)
MASKED = 0.15  # as in BERT
MISTYPED = 0.05  # share of the characters that can be mistaken for another

with Path(__file__).with_name("lexicon.toml").open("rb") as _file:
    LEXICON: dict[str, list[list[str]]] = {
        name: [list(line) if name == "lookalikes" else line.split("/") for line in lines]
        for name, lines in tomllib.load(_file).items()
    }
PRODUCTS = {word.casefold(): group[0] for group in LEXICON["products"] for word in group}

_LETTER = rf"[^\W{HAN}]"  # a letter or digit of any script but Chinese


def _any_of(words: Iterable[str]) -> str:
    """Return a pattern of words, the longest first. ASCII words match whole words only."""
    longest_first = sorted({word.casefold() for word in words}, key=lambda word: (-len(word), word))
    return "|".join(
        (rf"(?<!{_LETTER})" if word[0].isascii() else "")
        + re.escape(word)
        + (rf"(?!{_LETTER})" if word[-1].isascii() else "")
        for word in longest_first
    )


_PRODUCT = re.compile(_any_of(PRODUCTS), re.I)
_WORD = rf"[{HAN}]|{_LETTER}+(?:[.,]\d{_LETTER}*)*"  # 2.5kg is one word
_UNIT = re.compile(rf"(?P<product>{_PRODUCT.pattern})|(?P<word>{_WORD})|\s+|.", re.I | re.S)


class Technique(Protocol):
    """One way to vary a text."""

    name: str

    def __call__(self, text: str, rng: random.Random) -> str:
        """Return a varied copy of a cleaned text, or the text itself if the technique does not apply."""


def split(text: str) -> tuple[list[str], list[int]]:
    """Return the pieces of a text, in order, and the indices of the words, which may be changed.

    A piece is a product name, one Chinese character, one word of another script, or the characters between them.
    Chinese characters outside product names count as words.
    """
    found = list(_UNIT.finditer(text))
    return [each[0] for each in found], [i for i, each in enumerate(found) if each["word"]]


def products(text: str) -> set[str]:
    """Return the products that a text names; the first name of a product stands for all its names."""
    return {PRODUCTS[word.casefold()] for word in _PRODUCT.findall(text)}


def _accept(text: str, changed: str, *, mistyped: bool = False) -> str:
    """Return `changed`, cleaned, or `text` if the change made it invalid or changed the products that it names.

    If the change is a typing error (`mistyped`), a product name may be lost, but none may appear.
    """
    try:
        changed = prepare(changed)
    except TextError:
        return text
    named, wanted = products(changed), products(text)
    return changed if named == wanted or (mistyped and named < wanted) else text


def _some(rng: random.Random, items: Sequence[int], share: float) -> list[int]:
    """Return a random share of the items, at least one."""
    return rng.sample(items, max(1, round(share * len(items))))


class Delete:
    """Random deletion (Wei and Zou 2019)."""

    name = "delete"

    def __call__(self, text: str, rng: random.Random) -> str:
        pieces, words = split(text)
        if len(words) < FEWEST:
            return text
        for i in _some(rng, words, DELETED):
            pieces[i] = ""
        return _accept(text, "".join(pieces))


class Swap:
    """Random swap of neighbours (Wei and Zou 2019). Chinese readers hardly notice it, as in 研表究明."""

    name = "swap"

    def __call__(self, text: str, rng: random.Random) -> str:
        pieces, words = split(text)
        if len(words) < FEWEST:
            return text
        for i in _some(rng, range(1, len(words)), SWAPPED):
            a, b = words[i - 1], words[i]
            pieces[a], pieces[b] = pieces[b], pieces[a]
        return _accept(text, "".join(pieces))


class MaskSpans:
    """Mask spans of words. Their lengths are geometric, at most 10, as in SpanBERT (Joshi et al. 2020)."""

    name = "mask"

    def __call__(self, text: str, rng: random.Random) -> str:
        pieces, words = split(text)
        if len(words) < FEWEST:
            return text
        left = max(1, round(MASKED * len(words)))
        while left > 0:
            length = 1
            while length < min(left, 10) and rng.random() > 0.2:
                length += 1
            start = rng.randrange(len(words) - length + 1)
            for i in words[start : start + length]:
                pieces[i] = MASK
            left -= length
        return _accept(text, "".join(pieces))


class Replace:
    """Replace words by others of their group in the lexicon. All occurrences of a word get the same replacement."""

    def __init__(self, name: str, groups: Sequence[Sequence[str]]) -> None:
        self.name = name
        self._others = {
            word.casefold(): [other for other in group if other != word]
            for group in groups
            if len(group) > 1
            for word in group
        }
        # Product names match too, so that no part of a product name is replaced.
        self._pattern = re.compile(_any_of([*self._others, *PRODUCTS]), re.I)

    def __call__(self, text: str, rng: random.Random) -> str:
        found = sorted({word.casefold() for word in self._pattern.findall(text)} & self._others.keys())
        if not found:
            return text
        chosen = {word: rng.choice(self._others[word]) for word in rng.sample(found, (len(found) + 1) // 2)}
        return _accept(text, self._pattern.sub(lambda match: chosen.get(match[0].casefold(), match[0]), text))


@dataclass
class Mistype:
    """Replace characters by others that are easily mistaken for them; `confusable` returns these for each character."""

    name: str
    confusable: Callable[[], dict[str, str]]

    def __call__(self, text: str, rng: random.Random) -> str:
        others = self.confusable()
        places = [i for i, character in enumerate(text) if character in others]
        if not places:
            return text
        characters = list(text)
        for i in _some(rng, places, MISTYPED):
            characters[i] = rng.choice(others[characters[i]])
        return _accept(text, "".join(characters), mistyped=True)


@cache
def homophones() -> dict[str, str]:
    """Return, for each common character, the others with the same pinyin without tones."""
    from pypinyin import lazy_pinyin

    # The first level of GB 2312 has the 3,755 most common characters, at codes 0xB0A1 to 0xD7F9.
    codes = (bytes([row, cell]) for row in range(0xB0, 0xD8) for cell in range(0xA1, 0xFF))
    common = [character for code in codes if (character := code.decode("gb2312", "ignore"))]
    sounds = defaultdict(list)
    for character in common:
        sounds[lazy_pinyin(character)[0]].append(character)
    return _others_in_group(sounds.values())


@cache
def lookalikes() -> dict[str, str]:
    """Return, for each character, the others that look like it."""
    return _others_in_group(LEXICON["lookalikes"])


def _others_in_group(groups: Iterable[Sequence[str]]) -> dict[str, str]:
    found = {each: "".join(other for other in group if other != each) for group in groups for each in group}
    return {character: others for character, others in found.items() if others}


class LoseSpaces:
    """Drop spaces, each with probability 1/2."""

    name = "spaces"

    def __call__(self, text: str, rng: random.Random) -> str:
        places = [i for i, character in enumerate(text) if character == " "]
        dropped = set(_some(rng, places, 0.5)) if places else set()
        return _accept(text, "".join(character for i, character in enumerate(text) if i not in dropped), mistyped=True)


class ChangeWidths:
    """Change widths as scanners and input methods do.

    Cleaning folds full-width letters and digits, so only two changes remain: Chinese punctuation in half width, and a
    run of Chinese characters with spaces between them.
    """

    name = "width"
    _narrow = str.maketrans("。、“”‘’「」『』—", '.,""\'\'""""-')
    _run = re.compile(rf"[{HAN}]{{2,8}}")

    def __call__(self, text: str, rng: random.Random) -> str:
        runs = list(self._run.finditer(text))
        narrow = text.translate(self._narrow)
        if narrow != text and (not runs or rng.random() < 0.5):
            return _accept(text, narrow, mistyped=True)
        if not runs:
            return text
        run = rng.choice(runs)
        return _accept(text, text[: run.start()] + " ".join(run[0]) + text[run.end() :], mistyped=True)


TECHNIQUES: dict[str, Technique] = {
    technique.name: technique
    for technique in (
        Delete(),
        Swap(),
        MaskSpans(),
        Replace("synonym", LEXICON["synonyms"] + LEXICON["products"]),
        Replace("brand", LEXICON["brands"]),
        Replace("attribute", LEXICON["attributes"]),
        Mistype("homophone", homophones),
        Mistype("lookalike", lookalikes),
        LoseSpaces(),
        ChangeWidths(),
    )
}
DEFAULT: tuple[str, ...] = ()  # the techniques that an ablation showed to help: none


class Augmenter:
    """Varies training texts. The result for text i in an epoch depends on the seed alone."""

    def __init__(self, names: Sequence[str], seed: int, rate: float) -> None:
        """Take techniques by name.

        Args:
            names: keys of TECHNIQUES.
            seed: of the random choices.
            rate: the probability that a text is varied. One technique that applies to the text is used.

        Raises:
            InputError: there is no such technique, or the rate is no probability.
        """
        unknown = sorted(set(names) - TECHNIQUES.keys())
        if unknown:
            raise InputError(f"there is no augmentation {unknown[0]!r}; choose from {', '.join(TECHNIQUES)}")
        if not 0 <= rate <= 1:
            raise InputError(f"the augmentation rate {rate:g} is not a probability; give a number from 0 to 1")
        self._techniques = [TECHNIQUES[name] for name in names]
        self._seed = seed
        self._rate = rate

    def texts(self, texts: Sequence[str], epoch: int) -> list[str]:
        """Return the texts of an epoch: cleaned texts, some of them varied."""
        return [self._vary(text, random.Random(f"{self._seed} {epoch} {i}")) for i, text in enumerate(texts)]

    def _vary(self, text: str, rng: random.Random) -> str:
        if rng.random() >= self._rate:
            return text
        for technique in rng.sample(self._techniques, len(self._techniques)):
            changed = technique(text, rng)
            if changed != text:
                return changed
        return text


def floor_rows(labels: Sequence[str], floor: int) -> list[int]:
    """Return the row numbers, with rows of rarer classes repeated until each class has at least `floor` rows.

    All rows of a class are repeated equally often, except in the last round, whose rows are drawn at random.
    """
    rows: dict[str, list[int]] = defaultdict(list)
    for row, label in enumerate(labels):
        rows[label].append(row)
    chosen = list(range(len(labels)))
    for label, own in rows.items():
        rounds, rest = divmod(max(0, floor - len(own)), len(own))
        chosen += own * rounds + random.Random(label).sample(own, rest)
    return chosen
