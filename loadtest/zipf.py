"""Zipf traffic: few texts come often, many seldom, as search queries do."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence

DRAWN = 4096  # at a time


def zipf(texts: Sequence[str], seed: int, exponent: float = 1.0) -> Iterator[str]:
    """Yield texts without end: ranked in an order of the seed's, the n-th comes in proportion to n ** -exponent."""
    rng = random.Random(seed)
    ranked = rng.sample(texts, len(texts))
    cumulative = list(itertools.accumulate(rank**-exponent for rank in range(1, len(ranked) + 1)))
    while True:
        yield from rng.choices(ranked, cum_weights=cumulative, k=DRAWN)
