"""Near-duplicates: texts whose sets of three-character pieces overlap, found with MinHash and banding.

Broder 1997, "On the resemblance and containment of documents"; Leskovec et al., "Mining of Massive Datasets", ch. 3.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from datasketch import MinHash

from aisle.preprocess.clean import content

PERMUTATIONS = 128  # the Jaccard similarity is estimated with a standard error of 0.035 at 0.8

Signatures = npt.NDArray[np.uint32]  # [texts, PERMUTATIONS]
Integers = npt.NDArray[np.int64]


class Signer:
    """Computes MinHash signatures; what `content_key` ignores is ignored here too."""

    def __init__(self) -> None:
        self._minhash = MinHash(PERMUTATIONS, hashfunc=int)  # the pieces come hashed

    def __call__(self, text: str) -> npt.NDArray[np.uint32]:
        """Return the signature [PERMUTATIONS] of one cleaned text; a text of up to three characters is one piece."""
        code = np.frombuffer(content(text).encode("utf-32-le"), np.uint32).astype(np.uint64)
        code = np.pad(code, (0, max(0, 3 - len(code))))
        pieces = code[:-2] << np.uint64(42) | code[1:-1] << np.uint64(21) | code[2:]  # a code point has 21 bits
        hashes = pieces * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(32)
        self._minhash.clear()
        self._minhash.update_batch(hashes.tolist())
        signature: npt.NDArray[np.uint32] = self._minhash.hashvalues
        return signature


class Neighbours(NamedTuple):
    """What each text is near to."""

    leader: Integers  # [texts], the first near text of its own label; itself if there is none
    rival: Integers  # [texts], the first near text of another label; -1 if there is none


def neighbours(signatures: Signatures, labels: npt.NDArray[np.integer[Any]], threshold: float) -> Neighbours:
    """Compare every text with the leaders before it; a text that has a leader leads none.

    Near: an estimated Jaccard similarity of `threshold` or more. Texts are compared where a band of their signatures
    is equal, which at least 95 in 100 pairs at the threshold have, and more above it.
    `signatures` may be a memory map: of all texts, some 80 bytes each are held at once, whatever their length; of those
    that share a band with another, some hundred bytes a band more.

    Args:
        labels: [texts], numbers; texts whose number is negative are left out.
        threshold: above 0, up to 1.
    """
    width = _band_width(threshold)
    texts, buckets = [], []
    found = 0
    for band in range(PERMUTATIONS // width):
        text, bucket = _crowded(signatures[:, band * width : (band + 1) * width])
        inside = labels[text] >= 0
        texts.append(text[inside])
        buckets.append(bucket[inside] + found)
        found += len(signatures)
    text, bucket = np.concatenate(texts), np.concatenate(buckets)
    order = np.argsort(text, kind="stable")
    text, bucket = text[order], bucket[order]
    starts = np.flatnonzero(np.diff(text, prepend=-1))

    leader = np.arange(len(signatures))
    rival = np.full(len(signatures), -1)
    leading: dict[int, list[int]] = {}  # bucket -> the leaders in it
    for start, end in itertools.pairwise([*starts, len(text)]):
        own, shared = int(text[start]), bucket[start:end].tolist()
        known = np.array(sorted({other for each in shared for other in leading.get(each, ())}), np.int64)
        near = known[(signatures[known] == signatures[own]).mean(axis=1) >= threshold]
        akin = labels[near] == labels[own]
        rival[own] = near[~akin][0] if not akin.all() else -1
        if akin.any():
            leader[own] = near[akin][0]
        else:
            for each in shared:
                leading.setdefault(each, []).append(own)
    return Neighbours(leader, rival)


def _band_width(threshold: float) -> int:
    """Return the most values a band may have for two texts at the threshold to share one with probability 0.95."""
    widths = range(PERMUTATIONS, 0, -1)
    return next(r for r in widths if (1 - threshold**r) ** (PERMUTATIONS // r) <= 0.05 or r == 1)


def _crowded(band: Signatures) -> tuple[Integers, Integers]:
    """Return the texts whose band equals another's, and for each the number of its bucket."""
    weights = np.random.default_rng(0).integers(0, 2**64, band.shape[1], np.uint64)
    hashes = np.zeros(len(band), np.uint64)
    for column, weight in enumerate(weights):
        hashes += band[:, column] * weight  # a collision only adds a comparison
    order = np.argsort(hashes, kind="stable")
    new = np.diff(hashes[order], prepend=~hashes[order[:1]]) != 0
    bucket = np.cumsum(new) - 1
    crowded = np.bincount(bucket, minlength=1)[bucket] > 1
    return order[crowded], bucket[crowded]
