"""Augmentation: training texts varied anew in each epoch, so that a model learns what does not matter.

Each technique is an object with one method. All are label-safe: the names of products, which tell the category, are
never deleted or masked, and a change that lets the name of another product appear is undone. Labels are not seen here,
and evaluation texts never come here.
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
from aisle.preprocess.clean import TextError, prepare
from aisle.preprocess.encode import MASK

FEWEST = 4  # words or Chinese characters; of fewer, none can be spared
DELETED = SWAPPED = 0.1  # share of them (alpha in Wei and Zou 2019)
MASKED = 0.15  # as in BERT
MISTYPED = 0.05  # share of the characters that have a double

with Path(__file__).with_name("lexicon.toml").open("rb") as _file:
    LEXICON: dict[str, list[list[str]]] = {
        name: [list(line) if name == "lookalikes" else line.split("/") for line in lines]
        for name, lines in tomllib.load(_file).items()
    }
PRODUCTS = {word.casefold(): group[0] for group in LEXICON["products"] for word in group}

_HAN = "\u3400-\u9fff"
_LETTER = rf"[^\W{_HAN}]"  # or digit, of any other script


def _any_of(words: Iterable[str]) -> str:
    """Return a pattern of words, the longest first; a Latin letter or digit at their ends ends a text's word too."""
    longest_first = sorted({word.casefold() for word in words}, key=lambda word: (-len(word), word))
    return "|".join(
        (rf"(?<!{_LETTER})" if word[0].isascii() else "")
        + re.escape(word)
        + (rf"(?!{_LETTER})" if word[-1].isascii() else "")
        for word in longest_first
    )


_PRODUCT = re.compile(_any_of(PRODUCTS), re.I)
_WORD = rf"[{_HAN}]|{_LETTER}+(?:[.,]\d{_LETTER}*)*"  # 2.5kg is one word
_UNIT = re.compile(rf"(?P<product>{_PRODUCT.pattern})|(?P<word>{_WORD})|\s+|.", re.I | re.S)


class Technique(Protocol):
    """One way to vary a text."""

    name: str

    def __call__(self, text: str, rng: random.Random) -> str:
        """Return a cleaned text varied, or as it was where the technique does not apply."""


def split(text: str) -> tuple[list[str], list[int]]:
    """Return the pieces of a text, in order, and the numbers of those that can be spared.

    A piece is the name of a product, one Chinese character, one word of another script, or what lies between.
    """
    found = list(_UNIT.finditer(text))
    return [each[0] for each in found], [i for i, each in enumerate(found) if each["word"]]


def products(text: str) -> set[str]:
    """Return the products that a text names, each by the first of its names."""
    return {PRODUCTS[word.casefold()] for word in _PRODUCT.findall(text)}


def _accept(text: str, changed: str, *, mistyped: bool = False) -> str:
    """Return `changed`, cleaned, or `text` where it is no valid text any more or names other products.

    Only where it is `mistyped` may the name of a product no longer be one.
    """
    try:
        changed = prepare(changed)
    except TextError:
        return text
    named, wanted = products(changed), products(text)
    return changed if named == wanted or (mistyped and named < wanted) else text


def _some(rng: random.Random, items: Sequence[int], share: float) -> list[int]:
    """Return a random share of the items, one at least."""
    return rng.sample(items, max(1, round(share * len(items))))


class Delete:
    """Random deletion (Wei and Zou 2019)."""

    name = "delete"

    def __call__(self, text: str, rng: random.Random) -> str:
        pieces, spare = split(text)
        if len(spare) < FEWEST:
            return text
        for i in _some(rng, spare, DELETED):
            pieces[i] = ""
        return _accept(text, "".join(pieces))


class Swap:
    """Random swap (Wei and Zou 2019), of neighbours: the Chinese reader's eye forgives that, as in 研表究明."""

    name = "swap"

    def __call__(self, text: str, rng: random.Random) -> str:
        pieces, spare = split(text)
        if len(spare) < FEWEST:
            return text
        for i in _some(rng, range(1, len(spare)), SWAPPED):
            a, b = spare[i - 1], spare[i]
            pieces[a], pieces[b] = pieces[b], pieces[a]
        return _accept(text, "".join(pieces))


class MaskSpans:
    """Spans of mask tokens, their lengths drawn as in SpanBERT (Joshi et al. 2020): geometric, 10 at most."""

    name = "mask"

    def __call__(self, text: str, rng: random.Random) -> str:
        pieces, spare = split(text)
        if len(spare) < FEWEST:
            return text
        left = max(1, round(MASKED * len(spare)))
        while left > 0:
            length = 1
            while length < min(left, 10) and rng.random() > 0.2:
                length += 1
            start = rng.randrange(len(spare) - length + 1)
            for i in spare[start : start + length]:
                pieces[i] = MASK
            left -= length
        return _accept(text, "".join(pieces))


class Replace:
    """Words give way to others of their group in the lexicon, the same word to the same one throughout a text."""

    def __init__(self, name: str, groups: Sequence[Sequence[str]]) -> None:
        self.name = name
        self._others = {
            word.casefold(): [other for other in group if other != word]
            for group in groups
            if len(group) > 1
            for word in group
        }
        # Product names match too, so that no part of one is replaced.
        self._pattern = re.compile(_any_of([*self._others, *PRODUCTS]), re.I)

    def __call__(self, text: str, rng: random.Random) -> str:
        found = sorted({word.casefold() for word in self._pattern.findall(text)} & self._others.keys())
        if not found:
            return text
        chosen = {word: rng.choice(self._others[word]) for word in rng.sample(found, (len(found) + 1) // 2)}
        return _accept(text, self._pattern.sub(lambda match: chosen.get(match[0].casefold(), match[0]), text))


@dataclass
class Mistype:
    """Characters give way to others that are easily taken for them; `doubles` tells which."""

    name: str
    doubles: Callable[[], dict[str, str]]

    def __call__(self, text: str, rng: random.Random) -> str:
        doubles = self.doubles()
        places = [i for i, character in enumerate(text) if character in doubles]
        if not places:
            return text
        characters = list(text)
        for i in _some(rng, places, MISTYPED):
            characters[i] = rng.choice(doubles[characters[i]])
        return _accept(text, "".join(characters), mistyped=True)


@cache
def homophones() -> dict[str, str]:
    """Return the common characters that are typed as each common character is, tones aside."""
    from pypinyin import lazy_pinyin

    # The first level of GB 2312: the 3,755 characters of common use, by code 0xB0A1 to 0xD7F9.
    codes = (bytes([row, cell]) for row in range(0xB0, 0xD8) for cell in range(0xA1, 0xFF))
    common = [character for code in codes if (character := code.decode("gb2312", "ignore"))]
    sounds = defaultdict(list)
    for character in common:
        sounds[lazy_pinyin(character)[0]].append(character)
    return _doubles(sounds.values())


@cache
def lookalikes() -> dict[str, str]:
    """Return the characters that look like each one."""
    return _doubles(LEXICON["lookalikes"])


def _doubles(groups: Iterable[Sequence[str]]) -> dict[str, str]:
    found = {each: "".join(other for other in group if other != each) for group in groups for each in group}
    return {character: others for character, others in found.items() if others}


class LoseSpaces:
    """Spaces that were not typed: each falls away with even chances."""

    name = "spaces"

    def __call__(self, text: str, rng: random.Random) -> str:
        places = [i for i, character in enumerate(text) if character == " "]
        gone = set(_some(rng, places, 0.5)) if places else set()
        return _accept(text, "".join(character for i, character in enumerate(text) if i not in gone), mistyped=True)


class ChangeWidths:
    """What scanners and input methods make of wide characters, as far as cleaning does not undo it.

    Full-width letters and digits are folded by cleaning. What is left: Chinese punctuation in half width, and a run of
    characters set wide and so read with spaces between.
    """

    name = "width"
    _narrow = str.maketrans("。、“”‘’「」『』—", '.,""\'\'""""-')
    _run = re.compile(rf"[{_HAN}]{{2,8}}")

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
DEFAULT: tuple[str, ...] = ()  # those that the ablation showed to help


class Augmenter:
    """Varies training texts: text i of an epoch always comes out the same for a seed."""

    def __init__(self, names: Sequence[str], seed: int, rate: float) -> None:
        """Take techniques by name.

        Args:
            names: keys of TECHNIQUES.
            seed: of all choices.
            rate: the probability that a text is varied, by one technique that applies to it.

        Raises:
            InputError: there is no such technique, or the rate is no probability.
        """
        unknown = sorted(set(names) - TECHNIQUES.keys())
        if unknown:
            raise InputError(f"no augmentation is called {unknown[0]!r}; there are: {', '.join(TECHNIQUES)}")
        if not 0 <= rate <= 1:
            raise InputError(f"an augmentation rate of {rate:g} is no probability; give 0 to 1")
        self._techniques = [TECHNIQUES[name] for name in names]
        self._seed = seed
        self._rate = rate

    def texts(self, texts: Sequence[str], epoch: int) -> list[str]:
        """Return the cleaned texts as they are to be learnt from in an epoch."""
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
    """Return every row's number, and those of rarer classes again and again until each class has `floor` of them.

    The rows of a class are repeated evenly: none once more than another but for the last round, drawn at random.
    """
    rows: dict[str, list[int]] = defaultdict(list)
    for row, label in enumerate(labels):
        rows[label].append(row)
    chosen = list(range(len(labels)))
    for label, own in rows.items():
        rounds, rest = divmod(max(0, floor - len(own)), len(own))
        chosen += own * rounds + random.Random(label).sample(own, rest)
    return chosen
