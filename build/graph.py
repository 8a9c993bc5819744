"""The graph that is compiled: a Hugging Face BERT classifier over packed rows, with its own weights."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aisle.errors import InputError

MASKED = -1e9  # added to the attention scores between different texts: after softmax they are exactly 0


class PackedBert(nn.Module):
    """`BertForSequenceClassification` without padding: rows hold many texts, attention stays inside each.

    Exact: it has the same layers and weights, and skips only values that are never read.
    With a 16-bit `dtype`, embeddings and matrix products use it; sums, LayerNorm, softmax and classifier use fp32.
    """

    def __init__(self, model: Any, dtype: torch.dtype = torch.float32) -> None:
        """Copy the weights of a `transformers.BertForSequenceClassification`.

        Raises:
            InputError: the model is not a BERT classifier.
        """
        super().__init__()
        config = model.config
        if config.model_type != "bert" or getattr(config, "is_decoder", False) or not hasattr(model, "classifier"):
            raise InputError(f"cannot compile a {type(model).__name__}; give a BertForSequenceClassification")
        bert = model.bert
        embeddings = bert.embeddings
        # Every token has type 0, so the embedding of type 0 is added to the position embeddings here.
        position = embeddings.position_embeddings.weight + embeddings.token_type_embeddings.weight[0]
        self.word = embedding(embeddings.word_embeddings.weight, dtype)
        self.position = embedding(position, dtype)
        self.norm = SumNorm(embeddings.LayerNorm, dtype)
        self.layers = nn.ModuleList(PackedLayer(layer, config, dtype) for layer in bert.encoder.layer)
        self.pooler = linear(bert.pooler.dense, torch.float32)
        self.classifier = linear(model.classifier, torch.float32)

    def forward(self, input_ids: Tensor, position_ids: Tensor, segment_ids: Tensor, cls_index: Tensor) -> Tensor:
        """Return logits [texts, labels] in fp32; the arguments are those of `preprocess.pack.Packed`."""
        hidden = self.norm(self.word(input_ids), self.position(position_ids))  # [rows, width, hidden]
        mask = self.mask(segment_ids)
        for layer in self.layers[:-1]:
            hidden = layer(hidden, mask)
        # The classifier reads only [CLS], so the last layer, except its attention, runs on one token per text.
        cls = self.layers[-1](hidden, mask, cls_index)
        logits: Tensor = self.classifier(torch.tanh(self.pooler(cls.float())))
        return logits

    def mask(self, segment_ids: Tensor) -> Tensor:
        """Return the attention mask [rows, 1, width, width], added to the scores: 0 within a text, else `MASKED`."""
        return torch.where((segment_ids[:, :, None] == segment_ids[:, None, :])[:, None], 0.0, MASKED)


class PackedLayer(nn.Module):
    def __init__(self, layer: Any, config: Any, dtype: torch.dtype) -> None:
        super().__init__()
        attention, self.heads = layer.attention.self, config.num_attention_heads
        scale = 1 / math.sqrt(attention.query.out_features // self.heads)
        # One matrix product for query, key and value; the query's weights contain the scale of the scores.
        self.qkv = nn.Linear(attention.query.in_features, 3 * attention.query.out_features, dtype=dtype)
        parts = (attention.query, scale), (attention.key, 1.0), (attention.value, 1.0)
        self.qkv.weight.data = torch.cat([part.weight.detach() * factor for part, factor in parts]).to(dtype)
        self.qkv.bias.data = torch.cat([part.bias.detach() * factor for part, factor in parts]).to(dtype)
        self.project = linear(layer.attention.output.dense, dtype)
        self.norm = SumNorm(layer.attention.output.LayerNorm, dtype)
        self.up, self.activation = linear(layer.intermediate.dense, dtype), layer.intermediate.intermediate_act_fn
        self.down = linear(layer.output.dense, dtype)
        self.norm_out = SumNorm(layer.output.LayerNorm, dtype)

    def forward(self, hidden: Tensor, mask: Tensor, keep: Tensor | None = None) -> Tensor:
        """Return the layer's output [rows, width, hidden], or only [texts, hidden] for the flattened tokens `keep`."""
        # Each [rows, heads, width, hidden / heads].
        q, k, v = self.qkv(hidden).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        context = self.attend(q, k, v, mask).transpose(1, 2).flatten(2)
        if keep is not None:
            hidden, context = hidden.flatten(0, 1)[keep], context.flatten(0, 1)[keep]
        hidden = self.norm(hidden, self.project(context))
        output: Tensor = self.norm_out(hidden, self.down(self.activation(self.up(hidden))))
        return output

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        attention: Tensor = ((q @ k.transpose(2, 3)).float() + mask).softmax(-1).to(v.dtype)
        return attention @ v


class SumNorm(nn.Module):
    """LayerNorm of a sum, computed in fp32 for every input and output type."""

    def __init__(self, norm: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight, self.bias = norm.weight.detach().float(), norm.bias.detach().float()
        self.eps, self.dtype = norm.eps, dtype

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        total = a.float() + b.float()
        return F.layer_norm(total, self.weight.shape, self.weight, self.bias, self.eps).to(self.dtype)


def embedding(weight: Tensor, dtype: torch.dtype) -> nn.Embedding:
    """Return an embedding with the weights [entries, hidden], converted to a type."""
    return nn.Embedding(weight.shape[0], weight.shape[1], _weight=weight.detach().to(dtype))


def linear(source: nn.Linear, dtype: torch.dtype) -> nn.Linear:
    """Return a copy of a linear layer, converted to a type."""
    copy = nn.Linear(source.in_features, source.out_features, dtype=dtype)
    copy.load_state_dict(source.state_dict())
    return copy
