"""Packing: texts of all lengths share rows, so that the encoder computes almost no padding.

After Krell et al. 2021, "Efficient Sequence Packing without Cross-contamination" (arXiv:2107.02027).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


class Packed(NamedTuple):
    """The engine's inputs. Attention stays inside a segment."""

    input_ids: Ints  # [rows, width]
    position_ids: Ints  # [rows, width], from 0 in each text
    segment_ids: Ints  # [rows, width], the text's number from 1; 0 is padding
    cls_index: Ints  # [texts], where each text starts in the flattened rows


WIDEST = 512  # tokens; only a longer text gets a wider row, because attention costs the square of the width
TARGET_FILL = 0.96  # share of tokens that are not padding; above it, narrower rows are not tried


def pack(
    tokens: npt.NDArray[np.integer[Any]], lengths: npt.NDArray[np.integer[Any]], width: int, *, narrow: bool = True
) -> Packed:
    """Lay texts into rows of at most `width` tokens, best-fit decreasing.

    Args:
        tokens: [sum of lengths], the texts' token ids end to end.
        lengths: [texts], each at least 1 and at most `width`.
        width: the largest width of a row, in tokens. Texts that fill less than one row get one row of the width that
            they need.
        narrow: try narrower rows if they have less padding. False for engines that compile each shape.
    """
    total = int(lengths.sum())
    if narrow:
        width = min(width, max(WIDEST, -(-int(lengths.max()) // 8) * 8))
    width = min(width, -(-total // 8) * 8)
    starts, rows = _best_fit(lengths, width)
    if narrow and total < TARGET_FILL * rows * width:
        for less in range(width - 8, int(lengths.max()) - 1, -8):
            if -(-total // less) * less < rows * width:  # otherwise even full rows would have as many tokens
                fewer = _best_fit(lengths, less)
                if fewer[1] * less < rows * width:
                    width, (starts, rows) = less, fewer
    text_of_token = np.repeat(np.arange(len(lengths)), lengths)
    position = np.arange(total) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    where = starts[text_of_token] + position
    input_ids, position_ids, segment_ids = np.zeros((3, rows * width), np.int64)
    input_ids[where] = tokens
    position_ids[where] = position
    segment_ids[where] = text_of_token + 1
    shape = (rows, width)
    return Packed(input_ids.reshape(shape), position_ids.reshape(shape), segment_ids.reshape(shape), starts)


def _best_fit(lengths: npt.NDArray[np.integer[Any]], width: int) -> tuple[Ints, int]:
    """Return where each text starts in the flattened rows, and how many rows there are.

    The longest text comes first, and each goes into the fullest row that has room. Each text takes constant time.
    """
    starts = np.empty(len(lengths), np.int64)
    rows_with: list[list[int]] = [[] for _ in range(width + 1)]  # the rows, by their number of free tokens
    free_somewhere = 0  # bit f is set where rows_with[f] holds a row
    rows = 0
    order = np.argsort(-lengths, kind="stable")
    places = []
    for length in lengths[order].tolist():
        fitting = free_somewhere >> length
        if fitting:
            free = length + (fitting & -fitting).bit_length() - 1
            row = rows_with[free].pop()
            if not rows_with[free]:
                free_somewhere ^= 1 << free
        else:
            free, row, rows = width, rows, rows + 1
        places.append(row * width + width - free)
        left = free - length
        if left:
            rows_with[left].append(row)
            free_somewhere |= 1 << left
    starts[order] = places
    return starts, rows
