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
    """Computes MinHash signatures. They ignore what `content_key` ignores: case, spaces and punctuation."""

    def __init__(self) -> None:
        self._minhash = MinHash(PERMUTATIONS, hashfunc=int)  # the pieces are hashed already

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
    """The near-duplicates of each text."""

    leader: Integers  # [texts], the first near text with the same label; the text itself if there is none
    rival: Integers  # [texts], the first near text with another label; -1 if there is none


def neighbours(signatures: Signatures, labels: npt.NDArray[np.integer[Any]], threshold: float) -> Neighbours:
    """Compare every text with the leaders before it. A text that has a leader leads no other.

    Two texts are near if their estimated Jaccard similarity is `threshold` or more. They are compared if a band of
    their signatures is equal. At the threshold this finds 95 of 100 pairs, above it more.
    `signatures` may be a memory map. Memory holds about 80 bytes for each text, whatever its length, and some hundred
    bytes for each band that a text shares with another.

    Args:
        labels: [texts], numbers. Texts with a negative number are left out.
        threshold: above 0, up to 1.
    """
    text, bucket = _shared_buckets(signatures, labels, _band_width(threshold))
    starts = np.flatnonzero(np.diff(text, prepend=-1))
    leader = np.arange(len(signatures))
    rival = np.full(len(signatures), -1)
    leading: dict[int, list[int]] = {}  # bucket -> the leaders in it
    for start, end in itertools.pairwise([*starts, len(text)]):
        own, shared = int(text[start]), bucket[start:end].tolist()
        known = np.array(sorted({other for each in shared for other in leading.get(each, ())}), np.int64)
        near = known[(signatures[known] == signatures[own]).mean(axis=1) >= threshold]
        same = labels[near] == labels[own]
        rival[own] = near[~same][0] if not same.all() else -1
        if same.any():
            leader[own] = near[same][0]
        else:
            for each in shared:
                leading.setdefault(each, []).append(own)
    return Neighbours(leader, rival)


def _shared_buckets(
    signatures: Signatures, labels: npt.NDArray[np.integer[Any]], width: int
) -> tuple[Integers, Integers]:
    """Return each text that shares a band with another, with the bucket of that band; sorted by text."""
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
    return text[order], bucket[order]


def _band_width(threshold: float) -> int:
    """Return the largest band for which two texts at the threshold share a band with probability 0.95."""
    widths = range(PERMUTATIONS, 0, -1)
    return next(r for r in widths if (1 - threshold**r) ** (PERMUTATIONS // r) <= 0.05 or r == 1)


def _crowded(band: Signatures) -> tuple[Integers, Integers]:
    """Return the texts whose band equals that of another text, and the number of the bucket of each."""
    weights = np.random.default_rng(0).integers(0, 2**64, band.shape[1], np.uint64)
    hashes = np.zeros(len(band), np.uint64)
    for column, weight in enumerate(weights):
        hashes += band[:, column] * weight  # a collision only adds a comparison
    order = np.argsort(hashes, kind="stable")
    new = np.diff(hashes[order], prepend=~hashes[order[:1]]) != 0
    bucket = np.cumsum(new) - 1
    crowded = np.bincount(bucket, minlength=1)[bucket] > 1
    return order[crowded], bucket[crowded]
