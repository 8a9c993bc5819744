"""Run a model in PyTorch: token ids in; logits, embeddings, or what the logits are linear in out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from aisle.console import track
from aisle.errors import InputError
from aisle.preprocess.windows import KEY, Windows, averaged, separate
from aisle.train.core.added import Below, mean_hidden
from aisle.train.core.families import embedding_pooling, output_layer
from aisle.train.core.head_rows import values_of

Tokens = Sequence[Sequence[int]]


def logits_of(model: Any, tokens: Tokens, description: str) -> npt.NDArray[np.float32]:
    """Return logits [texts, labels] in fp32; batches hold texts of similar length. Those of further heads come last.

    Of a text with several windows they are the mean.

    Raises:
        InputError: a logit is not finite.
    """
    windows, counts = _windows(model, tokens)
    found = np.empty((len(windows), model.config.num_labels + values_of(model)), np.float32)
    for batch, output, _ in _run(model, windows, description):
        found[batch] = output.logits.float().cpu().numpy()
    logits = averaged(found, counts)
    if not np.isfinite(logits).all():
        raise InputError(
            "the model's logits are not finite: training diverged; train it again with a lower learning rate"
        )
    return logits


def embeddings_of(model: Any, tokens: Tokens, description: str) -> npt.NDArray[np.float32]:
    """Return embeddings [texts, hidden] of length 1 in fp32, as the engine returns them."""
    windows, counts = _windows(model, tokens)
    found = np.empty((len(windows), model.config.hidden_size), np.float32)
    with last_hidden_states(model) as hidden:
        for batch, _, attention_mask in _run(model, windows, description):
            found[batch] = pooled(model.config, hidden.pop(), attention_mask.sum(dim=1)).float().cpu().numpy()
    return F.normalize(torch.from_numpy(averaged(found, counts)), dim=1).numpy()


def features_of(model: Any, tokens: Tokens, description: str) -> npt.NDArray[np.float32]:
    """Return what the logits are linear in, [texts, features + hidden] in fp32.

    These are the inputs of the output layer and, after them, what the rows of added categories read (`core.added`).
    """
    layer, seen = output_layer(model), list[Tensor]()
    below = Below(model)
    hook = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    windows, counts = _windows(model, tokens)
    found = np.empty((len(windows), layer.in_features + model.config.hidden_size), np.float32)
    try:
        for batch, _, _ in _run(model, windows, description):
            found[batch] = torch.cat([seen.pop().float(), below.mean()], dim=1).cpu().numpy()
    finally:
        hook.remove()
        below.remove()
    return averaged(found, counts)


def _windows(model: Any, tokens: Tokens) -> tuple[Tokens, npt.NDArray[np.integer[Any]]]:
    """Return what the model reads at once, and how many of these each text has: its windows, or the text itself."""
    windows = Windows.of(getattr(model.config, KEY, None))
    return separate(tokens, windows.tokens) if windows else (tokens, np.ones(len(tokens), np.int64))


def _run(model: Any, tokens: Tokens, description: str) -> Iterator[tuple[list[int], Any, Tensor]]:
    """Yield the rows, the output and the attention mask of each batch, of texts of similar length."""
    order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
    batches = [order[i : i + 64] for i in range(0, len(order), 64)]
    with torch.inference_mode():
        for batch in track(batches, description):
            input_ids, attention_mask = (each.to(model.device) for each in pad([tokens[i] for i in batch]))
            yield batch, model(input_ids=input_ids, attention_mask=attention_mask), attention_mask


@contextmanager
def last_hidden_states(model: Any) -> Iterator[list[Tensor]]:
    """Collect the last hidden states, [texts, tokens, hidden], of each call of a classifier."""
    found: list[Tensor] = []
    hook = model.base_model.register_forward_hook(lambda _model, _inputs, output: found.append(output[0]))
    try:
        yield found
    finally:
        hook.remove()


def pooled(config: Any, hidden: Tensor, lengths: Tensor) -> Tensor:
    """Return embeddings [texts, hidden], not normalized: the first token's hidden state, or the mean of all.

    Args:
        hidden: last hidden states, [texts, tokens, hidden].
        lengths: tokens of each text, [texts].
    """
    if embedding_pooling(config) == "first":
        return hidden[:, 0]
    return mean_hidden(hidden, torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None])


def pad(tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Return `input_ids` and `attention_mask`, both [texts, longest]."""
    input_ids = torch.zeros(len(tokens), max(map(len, tokens)), dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(tokens):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        attention_mask[row, : len(ids)] = 1
    return input_ids, attention_mask
