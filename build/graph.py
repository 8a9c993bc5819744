"""The graph that is compiled: a classifier of transformers over packed rows, with its own weights."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from aisle.build.encoder import Encoder, Layer, Pooled, Shape, rotate
from aisle.build.families import shape_of_model, weights_of_model

MASKED = -1e9  # added to the attention scores between different texts: after softmax they are exactly 0


class Batch(NamedTuple):
    """What every layer's attention reads of a batch."""

    masks: dict[int, Tensor]  # by window: [rows, 1 or heads, width, width], added to the scores
    turns: dict[float, tuple[Tensor, Tensor]]  # by rotary base: cosine and sine, [rows, 1, width, head size]
    bucket: Tensor | None  # [width, width], the number of the distance between two tokens


class PackedEncoder(Encoder):
    """A classifier of transformers without padding: rows hold many texts, attention stays inside each.

    Exact: it has the same layers and weights, and skips only values that are never read.
    """

    def __init__(self, model: Any, dtype: torch.dtype = torch.float32) -> None:
        """Copy the weights of a classifier.

        Raises:
            InputError: it is no classifier of a family in `families.FAMILIES`.
        """
        shape = shape_of_model(model)
        super().__init__(shape, dtype, lambda number: self.attention(shape, number, dtype), Layer)
        if shape.relative == "bias":
            self.register_buffer("distance_bias", torch.empty(shape.heads, 2 * shape.positions - 1))
        if shape.relative == "disentangled":
            self.register_buffer("distance_bucket", torch.empty(2 * shape.positions - 1, dtype=torch.long))
        weights = weights_of_model(model)
        self.load(weights | _scaled(weights, shape))
        self.requires_grad_(False)

    def attention(self, shape: Shape, number: int, dtype: torch.dtype) -> nn.Module:
        """Return the attention of a layer."""
        return PackedAttention(shape, number, dtype)

    def forward(self, input_ids: Tensor, position_ids: Tensor, segment_ids: Tensor, cls_index: Tensor) -> Tensor:
        """Return logits [texts, labels] in fp32; the arguments are those of `preprocess.pack.Packed`."""
        return self.classify(self.pooled(input_ids, position_ids, segment_ids, cls_index))

    def pooled(self, input_ids: Tensor, position_ids: Tensor, segment_ids: Tensor, cls_index: Tensor) -> Pooled:
        """Return what is read of the hidden states."""
        hidden = self.embed(input_ids, position_ids)  # [rows, width, hidden]
        batch = self.batch(position_ids, segment_ids)
        for layer in self.layers[:-1]:
            hidden = layer(hidden, batch)
        texts = segment_ids.flatten()
        below = mean(hidden.flatten(0, 1), texts, cls_index) if self.shape.reads_below else None
        if self.shape.averages:
            hidden = self.last(self.layers[-1](hidden, batch)).flatten(0, 1)
            return self.choose(hidden[cls_index], mean(hidden, texts, cls_index), below)
        # Only [CLS] is read, so the last layer, except its attention, runs on one token per text.
        first = self.last(self.layers[-1](hidden, batch, cls_index))
        return Pooled(first, first, below)

    def batch(self, position_ids: Tensor, segment_ids: Tensor) -> Batch:
        """Compute once what all layers read."""
        shape = self.shape
        mask = self.mask(segment_ids)
        column = torch.arange(segment_ids.shape[1], device=segment_ids.device)
        # A text's tokens are neighbours in a row, so columns differ as positions do.
        away = column[None, :] - column[:, None]  # from the query to the key
        number = away + shape.positions - 1
        if shape.relative == "bias":
            mask = mask + self.get_buffer("distance_bias")[:, number.clamp(0, 2 * shape.positions - 2)]
        masks = {0: mask}
        for window in {*shape.windows} - {0}:
            masks[window] = torch.where(away.abs() <= window, mask, MASKED)
        bucket = None
        if shape.relative == "disentangled":
            bucket = self.get_buffer("distance_bucket")[number.clamp(0, 2 * shape.positions - 2)]
        return Batch(masks, self.turns(position_ids), bucket)

    def mask(self, segment_ids: Tensor) -> Tensor:
        """Return the attention mask [rows, 1, width, width], added to the scores: 0 within a text, else `MASKED`."""
        return torch.where((segment_ids[:, :, None] == segment_ids[:, None, :])[:, None], 0.0, MASKED)


class WithEmbeddings(nn.Module):
    """The graph with the embedding of each text after its logits, as it is exported."""

    def __init__(self, encoder: PackedEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, position_ids: Tensor, segment_ids: Tensor, cls_index: Tensor) -> Tensor:
        """Return [texts, labels + hidden] in fp32."""
        return self.encoder.outputs(self.encoder.pooled(input_ids, position_ids, segment_ids, cls_index))


class PackedAttention(nn.Module):
    """Attention within the texts of packed rows. The scale of the scores is contained in the queries' weights."""

    def __init__(self, shape: Shape, number: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.heads, self.relative = shape.heads, shape.relative == "disentangled"
        self.window = shape.windows[number] if shape.windows else 0
        self.theta = shape.thetas[number] if shape.thetas else 0.0
        if self.relative:
            size = shape.heads, shape.buckets, shape.width
            self.register_buffer("distance_key", torch.empty(size, dtype=dtype))
            self.register_buffer("distance_query", torch.empty(size, dtype=dtype))

    def forward(self, qkv: Tensor, batch: Batch) -> Tensor:
        # Each [rows, heads, width, hidden / heads].
        q, k, v = qkv.view(*qkv.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        if self.theta:
            q, k = (rotate(each, *batch.turns[self.theta]) for each in (q, k))
        mask = batch.masks[self.window]
        if self.relative:
            mask = mask + self.of_distances(q, k, batch.bucket)
        return self.attend(q, k, v, mask).transpose(1, 2).flatten(2)

    def of_distances(self, q: Tensor, k: Tensor, bucket: Tensor | None) -> Tensor:
        """Return the scores [rows, heads, width, width] of contents with distances, both ways, as in DeBERTa."""
        assert bucket is not None
        shape = (*q.shape[:2], *bucket.shape)
        to_key = (q @ self.get_buffer("distance_key").transpose(1, 2)).float().gather(3, bucket.expand(shape))
        to_query = (k @ self.get_buffer("distance_query").transpose(1, 2)).float().gather(3, bucket.t().expand(shape))
        return to_key + to_query.transpose(2, 3)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        attention: Tensor = ((q @ k.transpose(2, 3)).float() + mask).softmax(-1).to(v.dtype)
        return attention @ v


def mean(hidden: Tensor, segments: Tensor, starts: Tensor) -> Tensor:
    """Return the mean hidden state of each text, [texts, hidden].

    Args:
        hidden: [tokens, hidden].
        segments: [tokens], a number for each text.
        starts: [texts], where each text starts.
    """
    own = (segments[starts][:, None] == segments[None]).float()  # [texts, tokens]
    return (own @ hidden.float()) / own.sum(1, keepdim=True)


def _scaled(weights: dict[str, Tensor], shape: Shape) -> dict[str, Tensor]:
    """Return the weights that change when the scale of the attention scores goes into the queries."""
    kinds = 3 if shape.relative == "disentangled" else 1  # contents, and contents with distances both ways
    scale = 1 / math.sqrt(shape.width * kinds)
    found = {}
    for name, tensor in weights.items():
        if ".qkv." in name:
            queries, others = tensor.detach()[: shape.hidden], tensor.detach()[shape.hidden :]
            found[name] = torch.cat([queries * scale, others])
        elif name.endswith("distance_query"):
            found[name] = tensor * scale
    return found
