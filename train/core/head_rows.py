"""The weights of further heads: rows of the output layer, after those of the categories."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from aisle.errors import InputError
from aisle.train.core.added import added_weight, set_added
from aisle.train.core.checkpoint import HEAD_ROWS as FILE
from aisle.train.core.families import output_layer
from aisle.train.core.heads import Heads, load_heads, save_heads, spans, width


class HeadRows(NamedTuple):
    """The rows of all heads."""

    heads: Heads
    weight: Tensor  # [values of all heads, features]
    bias: Tensor  # [values of all heads]


def new_rows(model: Any, heads: Heads) -> HeadRows:
    """Return random rows for new heads, drawn as transformers draws those of a classifier."""
    deviation = float(getattr(model.config, "initializer_range", 0.02))
    weight = torch.empty(width(heads), output_layer(model).in_features).normal_(0.0, deviation)
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
    """Append the rows of heads to the output layer of a classifier, and return the classifier."""
    layer = output_layer(model)
    _set_layer(layer, torch.cat([layer.weight.detach(), rows.weight]), torch.cat([_bias(layer), rows.bias]))
    added = added_weight(model)
    if added is not None:  # rows of added categories read something else, which heads do not
        set_added(model, torch.cat([added.detach(), added.new_zeros(len(rows.bias), added.shape[1])]))
    return model


def cut_rows(model: Any, heads: Heads) -> HeadRows:
    """Take the rows of heads out of the output layer of a classifier, and return them."""
    layer = output_layer(model)
    place = layer.out_features - width(heads)
    weight, bias = layer.weight.detach(), _bias(layer)
    _set_layer(layer, weight[:place].clone(), bias[:place].clone())
    return HeadRows(heads, weight[place:].clone(), bias[place:].clone())


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


def _set_layer(layer: Any, weight: Tensor, bias: Tensor) -> None:
    layer.weight, layer.bias = torch.nn.Parameter(weight), torch.nn.Parameter(bias)
    layer.out_features = len(bias)


def _bias(layer: Any) -> Tensor:
    bias: Tensor = layer.bias.detach() if layer.bias is not None else layer.weight.new_zeros(len(layer.weight))
    return bias
