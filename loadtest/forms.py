"""The forms of one encoder that were compared: padded, packed rows, flat with windowed attention.

All run the weights of one checkpoint; `build` keeps the fastest, packed rows. This is what it was held against.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aisle.build.graph import MASKED, PackedBert, PackedLayer
from aisle.preprocess.pack import Packed, pack

Texts = tuple[npt.NDArray[np.integer[Any]], npt.NDArray[np.integer[Any]]]  # tokens end to end, tokens of each text


def padded(texts: Texts, width: int | None = None) -> Packed:
    """Lay out one text a row, as wide as the longest text or as `width`: what PackedBert then runs is padding."""
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
    """Lay out all texts end to end in one row, filled up to whole windows."""
    tokens, lengths = texts
    packed = pack(tokens, np.minimum(lengths, window), window)  # checks that no text is longer than the window
    total = -(-len(tokens) // window) * window
    starts = np.cumsum(lengths) - lengths
    row = np.zeros((3, 1, total), np.int64)
    row[0, 0, : len(tokens)] = tokens
    row[1, 0, : len(tokens)] = np.arange(len(tokens)) - np.repeat(starts, lengths)
    row[2, 0, : len(tokens)] = np.repeat(np.arange(len(lengths)), lengths) + 1
    return packed._replace(input_ids=row[0], position_ids=row[1], segment_ids=row[2], cls_index=starts)


class FlatBert(PackedBert):
    """Texts end to end; each window of queries attends to the window before it, itself and the one after.

    Exact where no text is longer than the window. After Beltagy et al. 2020, "Longformer" (arXiv:2004.05150), its
    sliding window in blocks.
    """

    def __init__(self, model: Any, dtype: torch.dtype, window: int) -> None:
        super().__init__(model, dtype)
        self.window = window
        layers = model.bert.encoder.layer
        self.layers = nn.ModuleList(FlatLayer(layer, model.config, dtype, window) for layer in layers)

    def mask(self, segment_ids: Tensor) -> Tensor:
        """Return what is added to the scores, [windows, 1, window, 3 × window]."""
        queries = segment_ids.view(-1, self.window)
        keys = around(segment_ids[:, None, :, None], self.window)[:, 0, :, 0]
        return torch.where((queries[:, :, None] == keys[:, None, :])[:, None], 0.0, MASKED)


class FlatLayer(PackedLayer):
    def __init__(self, layer: Any, config: Any, dtype: torch.dtype, window: int) -> None:
        super().__init__(layer, config, dtype)
        self.window = window

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        heads, _, size = q[0].shape
        queries = q[0].reshape(heads, -1, self.window, size).transpose(0, 1)  # [windows, heads, window, size of a head]
        context = super().attend(queries, around(k, self.window), around(v, self.window), mask)
        return context.transpose(0, 1).flatten(1, 2)[None]


def around(x: Tensor, window: int) -> Tensor:
    """Return each window of x [1, heads, tokens, size] with its neighbours, [windows, heads, 3 × window, size]."""
    wide = F.pad(x[0], (0, 0, window, window))
    wide = wide.reshape(wide.shape[0], -1, window, wide.shape[2])  # [heads, windows + 2, window, size]
    return torch.cat([wide[:, :-2], wide[:, 1:-1], wide[:, 2:]], 2).transpose(0, 1)
