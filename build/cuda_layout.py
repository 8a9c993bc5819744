"""The memory layout of a batch of flat tokens: texts end to end, padded to one of a fixed set of sizes (buckets)."""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True, order=True)
class Bucket:
    """A batch size that has a CUDA graph."""

    tokens: int
    texts: int  # the offsets describe this many texts; those at the end may be empty


def buckets(max_batch_tokens: int, max_texts: int) -> list[Bucket]:
    """Return the sizes that batches are padded to, smallest first.

    Each number of tokens has two: one for texts of usual length and one for very short texts. Attention starts a block
    for every text, even an empty one, so a bucket should not hold many more texts than needed.
    """
    steps = [64, 128, 192, 256, 384, 512, 768, 1024, 1280, 1536, 1792, *range(2048, 4096, 256)]
    steps += [*range(4096, 16384, 512), *range(16384, 32768, 1024), *range(32768, 2**17 + 1, 2048)]
    steps = [each for each in steps if each < max_batch_tokens] + [max_batch_tokens]
    most = -(-(max_texts + 16) // 16) * 16
    sizes = {
        Bucket(tokens, min(most, -(-tokens // tokens_per_text // 16) * 16 + 16))
        for tokens in steps
        for tokens_per_text in (40, 4)
    }
    return sorted(sizes)


class Layout:
    """The layout of a batch in one int32 array: token ids, positions and offsets, of a bucket's size."""

    def __init__(self, max_batch_tokens: int, max_texts: int, max_tokens: int) -> None:
        self.max_tokens, self.max_texts = max_tokens, max_texts
        self.buckets = buckets(max(max_batch_tokens, max_tokens), max_texts)
        self.largest = Bucket(self.buckets[-1].tokens, max(each.texts for each in self.buckets))
        self.size = 2 * self.largest.tokens + self.largest.texts + 1

    def bucket(self, tokens: int, texts: int) -> Bucket | None:
        """Return the smallest bucket that holds a batch and its filler texts, or None."""
        start = bisect.bisect_left(self.buckets, Bucket(tokens, 0))
        for each in self.buckets[start:]:
            if each.texts >= texts + -(-(each.tokens - tokens) // self.max_tokens) and texts <= self.max_texts:
                return each
        return None

    def fill(self, host: npt.NDArray[np.int32], tokens: Ints, lengths: Ints, bucket: Bucket) -> None:
        """Write a batch into `host`.

        Spare tokens form filler texts of at most `max_tokens` tokens, whose logits are never read. Spare offsets repeat
        the last one, so their texts are empty.
        """
        input_ids, position_ids, offsets = self.views(host, bucket)
        used, texts = len(tokens), len(lengths)
        input_ids[:used], input_ids[used:] = tokens, 0
        offsets[0] = 0
        np.cumsum(lengths, out=offsets[1 : texts + 1])
        rest = np.arange(used + self.max_tokens, bucket.tokens + self.max_tokens, self.max_tokens)
        offsets[texts + 1 :] = bucket.tokens
        offsets[texts + 1 : texts + 1 + len(rest)] = np.minimum(rest, bucket.tokens)
        starts = offsets[: texts + len(rest)]
        position_ids[:] = np.arange(bucket.tokens) - np.repeat(starts, np.diff(offsets[: texts + len(rest) + 1]))

    def views(self, flat: Any, bucket: Bucket) -> tuple[Any, Any, Any]:
        """Return token ids [tokens], positions [tokens] and offsets [texts + 1] of an array or a tensor."""
        tokens, texts = bucket.tokens, bucket.texts
        return flat[:tokens], flat[tokens : 2 * tokens], flat[2 * tokens : 2 * tokens + texts + 1]

    def pieces(self, tokens: Ints, lengths: Ints) -> Iterable[tuple[Ints, Ints]]:
        """Split a batch that fits no bucket into batches that fit one."""
        if self.bucket(len(tokens), len(lengths)):
            return [(tokens, lengths)]
        if len(lengths) == 1:
            raise ValueError(f"a text has {len(tokens)} tokens; at most {self.max_tokens} are allowed")
        half = len(lengths) // 2
        middle = int(lengths[:half].sum())
        first, rest = (tokens[:middle], lengths[:half]), (tokens[middle:], lengths[half:])
        return [*self.pieces(*first), *self.pieces(*rest)]
