"""Input layouts that packed rows are compared with: padded, and flat with windowed attention.

All use the weights of the same checkpoint. `build` uses packed rows, the fastest layout on CPUs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aisle.build.encoder import Shape
from aisle.build.graph import MASKED, PackedAttention, PackedEncoder
from aisle.preprocess.pack import Packed

Texts = tuple[npt.NDArray[np.integer[Any]], npt.NDArray[np.integer[Any]]]  # tokens end to end, length of each text


def padded(texts: Texts, width: int | None = None) -> Packed:
    """Put one text in each row, padded to the longest or to `width`. `PackedEncoder` then computes the padding too."""
    tokens, lengths = texts
    width = width or int(lengths.max())
    shape = (len(lengths), width)
    column = np.arange(width)
    real = column < lengths[:, None]
    input_ids, position_ids = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    input_ids[real] = tokens
    position_ids[real] = np.broadcast_to(column, shape)[real]
    return Packed(input_ids, position_ids, real.astype(np.int64), np.arange(len(lengths)) * width)


def flat(texts: Texts, window: int) -> Packed:
    """Concatenate texts of at most `window` tokens and cut them into rows of `window` tokens. A text may span rows."""
    tokens, lengths = texts
    row = np.zeros((3, -(-len(tokens) // window), window), np.int64)
    starts = np.cumsum(lengths) - lengths
    row[0].flat[: len(tokens)] = tokens
    row[1].flat[: len(tokens)] = np.arange(len(tokens)) - np.repeat(starts, lengths)
    row[2].flat[: len(tokens)] = np.repeat(np.arange(len(lengths)), lengths) + 1
    return Packed(row[0], row[1], row[2], starts)


class FlatEncoder(PackedEncoder):
    """Concatenated texts; each row of queries attends to the row before it, itself and the row after it.

    This is exact if no text is longer than a row. It is the blocked sliding window of Beltagy et al. 2020, "Longformer"
    (arXiv:2004.05150).
    """

    def attention(self, shape: Shape, number: int, dtype: torch.dtype) -> nn.Module:
        return FlatAttention(shape, number, dtype)

    def mask(self, segment_ids: Tensor) -> Tensor:
        """Return the attention bias, [rows, 1, width, 3 × width]."""
        keys = around(segment_ids, 1)
        return torch.where((segment_ids[:, :, None] == keys[:, None, :])[:, None], 0.0, MASKED)


class FlatAttention(PackedAttention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return super().attend(q, around(k, 2), around(v, 2), mask)


def around(x: Tensor, dim: int) -> Tensor:
    """Return each row of x [rows, …] concatenated with the rows before and after it along dimension `dim`."""
    wide = F.pad(x, (0, 0) * (x.ndim - 1) + (1, 1))  # [rows + 2, …]
    return torch.cat([wide[:-2], wide[1:-1], wide[2:]], dim)
