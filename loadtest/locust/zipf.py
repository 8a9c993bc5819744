"""Zipf traffic: a few texts come often and many come rarely, as with search queries."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence

DRAW_SIZE = 4096


def zipf(texts: Sequence[str], seed: int, exponent: float = 1.0) -> Iterator[str]:
    """Yield texts endlessly. The seed ranks them; the frequency of rank n is proportional to n ** -exponent."""
    rng = random.Random(seed)
    ranked = rng.sample(texts, len(texts))
    cumulative = list(itertools.accumulate(rank**-exponent for rank in range(1, len(ranked) + 1)))
    while True:
        yield from rng.choices(ranked, cum_weights=cumulative, k=DRAW_SIZE)
