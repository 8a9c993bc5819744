"""A profile of texts: their scripts and their lengths."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np

from aisle.preprocess.han import HAN

EDGES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 2**15 + 1)  # characters, for the histogram

_LETTER = re.compile(r"[^\W\d_]")
_HAN = re.compile(f"[{HAN}]")
_LATIN = re.compile("[A-Za-z\u00c0-\u024f]")


def profile(texts: Iterable[str]) -> dict[str, Any]:
    """Return the scripts (as `languages`) and the lengths of texts, in characters."""
    languages: Counter[str] = Counter()
    lengths: Counter[int] = Counter()
    for text in texts:
        languages[script(text)] += 1
        lengths[len(text)] += 1
    sizes = np.array(sorted(lengths))
    rows = np.array([lengths[size] for size in sizes.tolist()])
    total = rows.cumsum()
    at = {f"p{q}": int(sizes[np.searchsorted(total, q / 100 * total[-1])]) for q in (50, 90, 99)}
    histogram, _ = np.histogram(sizes, EDGES, weights=rows)
    return {
        "languages": dict(languages.most_common()),
        "lengths": {
            "mean": round(float((sizes * rows).sum() / total[-1]), 1),
            **at,
            "longest": int(sizes[-1]),
            "histogram": [
                {"from": low, "to": high - 1, "rows": int(n)}
                for (low, high), n in zip(itertools.pairwise(EDGES), histogram, strict=True)
            ],
        },
    }


def script(text: str) -> str:
    """Return the script of nine tenths of a text's letters: Han, Latin, both together (mixed) or other."""
    letters = len(_LETTER.findall(text))
    if not letters:
        return "no letters"
    han, latin = len(_HAN.findall(text)), len(_LATIN.findall(text))
    shares = {"Han": han, "Latin": latin, "mixed": han + latin}
    return next((name for name, count in shares.items() if count >= 0.9 * letters), "other")
