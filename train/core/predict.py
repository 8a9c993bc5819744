"""Run a model in PyTorch: token ids in, logits or what they are linear in out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from aisle.console import track
from aisle.errors import InputError
from aisle.train.core.added import Below
from aisle.train.core.families import output_layer


def logits_of(model: Any, tokens: Sequence[Sequence[int]], description: str) -> npt.NDArray[np.float32]:
    """Return logits [texts, labels] in fp32; batches hold texts of similar length.

    Raises:
        InputError: a logit is not finite.
    """
    logits = _run(model, tokens, description, model.config.num_labels, lambda output: output.logits)
    if not np.isfinite(logits).all():
        raise InputError(
            "the model's logits are not finite: training diverged; train it again with a lower learning rate"
        )
    return logits


def features_of(model: Any, tokens: Sequence[Sequence[int]], description: str) -> npt.NDArray[np.float32]:
    """Return what the logits are linear in, [texts, features + hidden] in fp32.

    These are the inputs of the output layer and, after them, what the rows of added categories read (`core.added`).
    """
    layer, seen = output_layer(model), list[torch.Tensor]()
    below = Below(model)
    hook = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    width = layer.in_features + model.config.hidden_size
    try:
        return _run(model, tokens, description, width, lambda _: torch.cat([seen.pop().float(), below.mean()], dim=1))
    finally:
        hook.remove()
        below.remove()


def _run(
    model: Any, tokens: Sequence[Sequence[int]], description: str, width: int, read: Callable[[Any], torch.Tensor]
) -> npt.NDArray[np.float32]:
    """Return [texts, width]: what `read` takes from the model's output. Batches hold texts of similar length."""
    order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
    batches = [order[i : i + 64] for i in range(0, len(order), 64)]
    values = np.empty((len(tokens), width), np.float32)
    with torch.inference_mode():
        for batch in track(batches, description):
            input_ids, attention_mask = pad([tokens[i] for i in batch])
            output = model(input_ids=input_ids.to(model.device), attention_mask=attention_mask.to(model.device))
            values[batch] = read(output).float().cpu().numpy()
    return values


def pad(tokens: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `input_ids` and `attention_mask`, both [texts, longest]."""
    input_ids = torch.zeros(len(tokens), max(map(len, tokens)), dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(tokens):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        attention_mask[row, : len(ids)] = 1
    return input_ids, attention_mask
