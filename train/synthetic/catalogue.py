"""A SYNTHETIC catalogue: product titles generated from the hand-written words of catalogue.toml.

It serves to demonstrate and test the whole pipeline without real data. Scores on it say nothing about real titles.
"""

from __future__ import annotations

import random
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from aisle.errors import InputError
from aisle.preprocess.tables.table import Row
from aisle.preprocess.tables.writing import file_format, replacing, write_rows

with Path(__file__).with_name("catalogue.toml").open("rb") as _file:
    CATALOGUE: dict[str, Any] = tomllib.load(_file)
LEAVES: list[dict[str, Any]] = CATALOGUE["leaf"]


def _families(leaf: dict[str, Any]) -> list[dict[str, Any]]:
    return [family for family in CATALOGUE["family"] if leaf["path"][2] in family["leaves"]]


def _neighbours(leaf: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the leaves that are easily confused with a leaf: those of its shelf and of its families."""
    related = {leaf["path"][1]}.union(*(family["leaves"] for family in _families(leaf)))
    return [other for other in LEAVES if other != leaf and related.intersection(other["path"])]


FAMILIES = [_families(leaf) for leaf in LEAVES]
NEIGHBOURS = [_neighbours(leaf) for leaf in LEAVES]


def labels() -> list[str]:
    """Return the categories, each the path from department to leaf."""
    return [" > ".join(leaf["path"]) for leaf in LEAVES]


def generate(rows: int, seed: int) -> Iterator[Row]:
    """Yield rows of `text` and `category`: imbalanced, noisy, with duplicates and broken rows; reproducible by seed."""
    rng = random.Random(seed)
    names = labels()
    # The most frequent leaf is six times as frequent as the rarest. The order is random, not the file's.
    weights = [1 / (1 + 5 * rank / (len(LEAVES) - 1)) for rank in rng.sample(range(len(LEAVES)), len(LEAVES))]
    recent: list[Row] = []
    for _ in range(rows):
        draw = rng.random()
        if recent and draw < 0.03:
            yield rng.choice(recent)  # a duplicate
        elif recent and draw < 0.035:
            # A wrong label.
            yield {"text": rng.choice(recent)["text"], "category": rng.choice(names)}
        else:
            number = rng.choices(range(len(LEAVES)), weights)[0]
            row = {"text": title(rng, number), "category": names[number]}
            if draw < 0.04:
                row["text"] = rng.choice(["", " ", "<br>"])
            elif draw < 0.045:
                row["category"] = ""
            else:
                recent = [*recent[-199:], row]
            yield row


def title(rng: random.Random, number: int) -> str:
    """Return one title of the leaf `number`."""
    leaf = LEAVES[number]
    english = rng.random() < 0.12
    suffix, language = ("_en", "en") if english else ("", "zh")
    words = rng.sample(leaf["attributes" + suffix], rng.choice([0, 1, 2, 2, 3, 3]))
    # Some titles omit the product's noun: they name a family of similar products, or nothing.
    named = not words or rng.random() > 0.05
    source = leaf if named else rng.choice([*FAMILIES[number], CATALOGUE["unnamed"]])
    words.append(rng.choice(source["nouns" + suffix]))
    rng.shuffle(words)
    if named and not english and rng.random() < 0.06:
        words.append(rng.choice(leaf["nouns_en"]))
    if rng.random() < 0.7:
        brands = CATALOGUE["brands"][leaf["path"][0]]
        words.insert(0, rng.choice(brands["en" if rng.random() < 0.2 else language]))
    if rng.random() < 0.6:
        words.append(rng.choice(leaf["units"]).replace("{n}", str(rng.randint(1, 9))))
    if rng.random() < 0.2:  # names an accessory or another product
        other = rng.choice(rng.choice(NEIGHBOURS[number])["nouns" + suffix])
        link = rng.choice(["for ", "not ", "with "] if english else ["适用", "配", "可搭", "非", "送"])
        words.insert(rng.randint(0, len(words)), link + other)
    if rng.random() < 0.35:
        promotion = rng.choice(CATALOGUE["promotions"][language])
        words.insert(rng.choice([0, len(words)]), f"【{promotion}】" if rng.random() < 0.4 else promotion)
    text = (" " if english or rng.random() < 0.5 else "").join(words)
    for chance, noise in NOISE:
        if rng.random() < chance:
            text = noise(rng, text)
    return text


def full_width(_: random.Random, text: str) -> str:
    """Return the text in the full-width forms of its ASCII characters."""
    return "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text)


def markup(rng: random.Random, text: str) -> str:
    """Return the text with a tag or an entity, as pasted from a web page."""
    return rng.choice([f"<b>{text}</b>", f"{text}<br/>", f"{text}&nbsp;&amp;&nbsp;赠品", f"<p>{text}</p>"])


def shouting(rng: random.Random, text: str) -> str:
    """Return the text with repeated punctuation or an emoji."""
    return text + rng.choice(["!!!", "！！！", "~~~", "。。。", "🔥", "❤️", " ✨✨"])


def typo(rng: random.Random, text: str) -> str:
    """Return the text with one character dropped, or two swapped."""
    at = rng.randrange(max(1, len(text) - 1))
    return text[:at] + (
        text[at + 1 :] if rng.random() < 0.5 else text[at + 1 : at + 2] + text[at : at + 1] + text[at + 2 :]
    )


def spaces(rng: random.Random, text: str) -> str:
    """Return the text with too much white space."""
    return rng.choice(["  ", "\t", "　", " "]) + text.replace(" ", "   ", 1) + " "


NOISE: list[tuple[float, Callable[[random.Random, str], str]]] = [
    (0.03, typo),
    (0.04, full_width),
    (0.06, shouting),
    (0.05, spaces),
    (0.04, markup),
]


def write_sample(out: Path, rows: int, seed: int) -> dict[str, Any]:
    """Write a table of synthetic titles; the file's suffix decides its format. It is complete or not there at all.

    Raises:
        InputError: the suffix is unknown, or the file cannot be written.
    """
    kind = file_format(out)
    try:
        with replacing(out) as writing:
            write_rows(writing, lambda: generate(rows, seed), ["text", "category"], kind)
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror}") from None
    return {"rows": rows, "categories": len(LEAVES), "synthetic": True, "seed": seed, "output": str(out)}
