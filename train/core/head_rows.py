"""The weights of further heads, and how a classifier of transformers gets them.

A head reads what the classifier reads of the last hidden states: the first token's, or the mean. It does not read what
the layer below the classifier's output makes of it. That layer has a tanh, which the category saturates early in a
training, and then other answers are hardly learnt.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from aisle.errors import InputError
from aisle.train.core.added import mean_hidden
from aisle.train.core.checkpoint import HEAD_ROWS as FILE
from aisle.train.core.families import classifier_pooling
from aisle.train.core.heads import Heads, load_heads, save_heads, spans, width

NAME = "attribute_heads"  # in a model


class HeadRows(NamedTuple):
    """The rows of all heads."""

    heads: Heads
    weight: Tensor  # [values of all heads, hidden]
    bias: Tensor  # [values of all heads]


class AttributeHeads(nn.Linear):
    """All heads of a model as one layer. It gives the model's output their logits, after those of the categories."""

    def __init__(self, model: Any, rows: HeadRows) -> None:
        super().__init__(rows.weight.shape[1], len(rows.bias))
        self.weight, self.bias = nn.Parameter(rows.weight.clone()), nn.Parameter(rows.bias.clone())
        self._averages = classifier_pooling(model.config) == "mean"
        self._mask: Tensor | None = None
        self._hidden: Tensor | None = None
        self.hooks = [
            model.register_forward_pre_hook(self._keep_mask, with_kwargs=True),
            model.base_model.register_forward_hook(self._keep_hidden),
            model.register_forward_hook(self._append),
        ]

    def _keep_mask(self, _: Any, args: Any, named: dict[str, Any]) -> None:
        self._mask = named.get("attention_mask", args[1] if len(args) > 1 else None)

    def _keep_hidden(self, _: Any, args: Any, output: Any) -> None:
        self._hidden = output[0]

    def _append(self, _: Any, args: Any, output: Any) -> Any:
        assert self._hidden is not None
        if not self._averages:
            read = self._hidden[:, 0]
        elif self._mask is None:
            read = self._hidden.mean(dim=1)
        else:
            read = mean_hidden(self._hidden, self._mask)
        self._hidden = self._mask = None  # frees memory, and the graph of a training step
        output.logits = torch.cat([output.logits.float(), self(read.float()).float()], dim=1)
        return output


def values_of(model: Any) -> int:
    """Return how many logits of a model belong to further heads."""
    heads = getattr(model, NAME, None)
    return 0 if heads is None else int(heads.out_features)


def new_rows(model: Any, heads: Heads) -> HeadRows:
    """Return random rows for new heads, drawn as transformers draws those of a classifier."""
    deviation = float(getattr(model.config, "initializer_range", 0.02))
    weight = torch.empty(width(heads), model.config.hidden_size).normal_(0.0, deviation)
    return HeadRows(heads, weight, torch.zeros(len(weight)))


def kept_rows(new: HeadRows, old: HeadRows) -> HeadRows:
    """Return the new rows, with the old ones for values that both have."""
    before = {
        (head.name, label): span.start + i
        for head, span in zip(old.heads, spans(0, old.heads), strict=True)
        for i, label in enumerate(head.labels)
    }
    for head, span in zip(new.heads, spans(0, new.heads), strict=True):
        for row, label in enumerate(head.labels, start=span.start):
            if (known := before.get((head.name, label))) is not None:
                new.weight[row], new.bias[row] = old.weight[known], old.bias[known]
    return new


def add_rows(model: Any, rows: HeadRows) -> Any:
    """Give a classifier further heads, and return it."""
    setattr(model, NAME, AttributeHeads(model, rows))
    return model


def cut_rows(model: Any, heads: Heads) -> HeadRows:
    """Take the heads from a classifier, and return their rows."""
    layer = getattr(model, NAME)
    for hook in layer.hooks:
        hook.remove()
    delattr(model, NAME)
    return HeadRows(heads, layer.weight.detach(), layer.bias.detach())


def save_rows(folder: Path, rows: HeadRows) -> None:
    """Write heads.json and heads.safetensors into a checkpoint."""
    save_heads(folder, rows.heads)
    tensors = {}
    for head, span in zip(rows.heads, spans(0, rows.heads), strict=True):
        tensors[f"{head.name}.weight"] = rows.weight[span].cpu().contiguous()
        tensors[f"{head.name}.bias"] = rows.bias[span].cpu().contiguous()
    save_file(tensors, folder / FILE)


def load_rows(folder: Path) -> HeadRows | None:
    """Read the heads of a checkpoint; None if it has none.

    Raises:
        InputError: a file is missing or damaged, or a weight is not finite.
    """
    heads = load_heads(folder)
    if not heads:
        return None
    try:
        found = load_file(folder / FILE)
        parts = [[found[f"{head.name}.{part}"].float() for head in heads] for part in ("weight", "bias")]
        rows = HeadRows(heads, torch.cat(parts[0]), torch.cat(parts[1]))
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        raise InputError(f"{folder}/{FILE} is missing or damaged: {error}".splitlines()[0]) from None
    if any(len(weight) != len(head.labels) for head, weight in zip(heads, parts[0], strict=True)):
        raise InputError(f"{folder}/{FILE} is for other values than heads.json; put the right file there")
    if not all(torch.isfinite(each).all() for each in rows[1:]):
        raise InputError(f"{folder}/{FILE}: a weight is not finite; train again with a lower --learning-rate")
    return rows
