"""The divergence between the probabilities of two multi-label models."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def binary_divergence(expected: Tensor, actual: Tensor) -> Tensor:
    """Return the Kullback-Leibler divergence of each text, in nats, summed over its categories, [texts].

    Each category is its own yes-or-no question, so the divergence is that between Bernoulli distributions.

    Args:
        expected, actual: logits [texts, labels].
    """
    share = expected.sigmoid()
    yes = F.logsigmoid(expected) - F.logsigmoid(actual)
    no = F.logsigmoid(-expected) - F.logsigmoid(-actual)
    return (share * yes + (1 - share) * no).sum(dim=1)
