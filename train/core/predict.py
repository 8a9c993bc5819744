"""Run a model in PyTorch: token ids in, logits out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from aisle.console import track
from aisle.errors import InputError


def logits_of(model: Any, tokens: Sequence[Sequence[int]], description: str) -> npt.NDArray[np.float32]:
    """Return logits [texts, labels] in fp32; batches hold texts of similar length.

    Raises:
        InputError: a logit is not finite.
    """
    order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
    batches = [order[i : i + 64] for i in range(0, len(order), 64)]
    logits = np.empty((len(tokens), model.config.num_labels), np.float32)
    with torch.inference_mode():
        for batch in track(batches, description):
            input_ids, attention_mask = pad([tokens[i] for i in batch])
            output = model(input_ids=input_ids.to(model.device), attention_mask=attention_mask.to(model.device))
            logits[batch] = output.logits.float().cpu().numpy()
    if not np.isfinite(logits).all():
        raise InputError(
            "the model's logits are not finite: training diverged; train it again with a lower learning rate"
        )
    return logits


def pad(tokens: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `input_ids` and `attention_mask`, both [texts, longest]."""
    input_ids = torch.zeros(len(tokens), max(map(len, tokens)), dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(tokens):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        attention_mask[row, : len(ids)] = 1
    return input_ids, attention_mask
