"""The graph that is compiled: a Hugging Face BERT classifier over packed rows, with its own weights."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aisle.errors import InputError


class PackedBert(nn.Module):
    """`BertForSequenceClassification` without padding: rows hold many texts, attention stays inside each.

    Exact: it runs the same layers with the same weights, in an order that skips what nothing reads.
    """

    def __init__(self, model: Any) -> None:
        """Take over the weights of a `transformers.BertForSequenceClassification`.

        Raises:
            InputError: the model's architecture is another one.
        """
        super().__init__()
        config = model.config
        if config.model_type != "bert" or getattr(config, "is_decoder", False) or not hasattr(model, "classifier"):
            raise InputError(f"cannot compile a {type(model).__name__}; give a BertForSequenceClassification")
        bert = model.bert
        self.word = bert.embeddings.word_embeddings
        # Every token is of type 0, so its embedding is added to each position's once and for all.
        positions = bert.embeddings.position_embeddings.weight + bert.embeddings.token_type_embeddings.weight[0]
        self.position = nn.Embedding(positions.shape[0], positions.shape[1], _weight=positions.detach())
        self.norm = bert.embeddings.LayerNorm
        self.layers = nn.ModuleList(PackedLayer(layer, config.num_attention_heads) for layer in bert.encoder.layer)
        self.pooler = bert.pooler.dense
        self.classifier = model.classifier

    def forward(self, input_ids: Tensor, position_ids: Tensor, segment_ids: Tensor, cls_index: Tensor) -> Tensor:
        """Return logits [texts, labels] of packed rows; the arguments are those of `preprocess.pack.Packed`."""
        hidden = self.norm(self.word(input_ids) + self.position(position_ids))  # [rows, width, hidden]
        same_text = (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]  # [rows, 1, width, width]
        for layer in self.layers[:-1]:
            hidden = layer(hidden, same_text)
        # Only [CLS] is read from the last layer: all but its attention runs on one token a text.
        cls = self.layers[-1](hidden, same_text, cls_index)
        logits: Tensor = self.classifier(torch.tanh(self.pooler(cls)))
        return logits


class PackedLayer(nn.Module):
    def __init__(self, layer: Any, heads: int) -> None:
        super().__init__()
        attention = layer.attention.self
        self.heads = heads
        # One matrix product for query, key and value instead of three.
        self.qkv = nn.Linear(attention.query.in_features, 3 * attention.query.out_features)
        parts = attention.query, attention.key, attention.value
        self.qkv.weight.data = torch.cat([part.weight.detach() for part in parts])
        self.qkv.bias.data = torch.cat([part.bias.detach() for part in parts])
        self.project, self.norm = layer.attention.output.dense, layer.attention.output.LayerNorm
        self.up, self.activation = layer.intermediate.dense, layer.intermediate.intermediate_act_fn
        self.down, self.norm_out = layer.output.dense, layer.output.LayerNorm

    def forward(self, hidden: Tensor, same_text: Tensor, keep: Tensor | None = None) -> Tensor:
        """Return the layer's output [rows, width, hidden], or [texts, hidden] of the flattened tokens `keep`."""
        q, k, v = self.qkv(hidden).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        context = F.scaled_dot_product_attention(q, k, v, attn_mask=same_text).transpose(1, 2).flatten(2)
        if keep is not None:
            hidden, context = hidden.flatten(0, 1)[keep], context.flatten(0, 1)[keep]
        hidden = self.norm(hidden + self.project(context))
        output: Tensor = self.norm_out(hidden + self.down(self.activation(self.up(hidden))))
        return output
