"""The outputs of further heads, for requests that ask for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from aisle.deploy.serving.answers import Logits, rank
from aisle.train.core.heads import Heads, load_heads, spans, width

OUTPUTS = ("attribute", "attribute_value", "attribute_confidence")
MISSING = (
    "this version has no attributes; train them with aisle train --also COLUMN, then build and deploy the checkpoint"
)
Tensors = dict[str, Any]


class Attributes:
    """Computes the attributes of a version."""

    def __init__(self, heads: Heads) -> None:
        self.width = width(heads)  # logits of all heads, which follow those of the categories
        self._places = spans(0, heads)
        self._names = np.array([head.name.encode() for head in heads], np.object_)
        self._values = [np.array([label.encode() for label in head.labels], np.object_) for head in heads]

    @staticmethod
    def load(folder: Path) -> Attributes:
        """Read the heads of a version folder; there may be none.

        Raises:
            InputError: they are damaged.
        """
        return Attributes(load_heads(folder))

    def __bool__(self) -> bool:
        """Return whether there is an attribute."""
        return self.width > 0

    def tensors(self, logits: Logits) -> Tensors:
        """Return the names, values and confidences, each [texts, heads], for logits [texts, width].

        An answer names its attributes, so that its reader need not know which version answered.
        """
        ranked = [rank(logits[:, place], 1) for place in self._places]
        values = [own[best[:, 0]] for own, (best, _) in zip(self._values, ranked, strict=True)]
        return {
            "attribute": np.repeat(self._names[None], len(logits), axis=0),
            "attribute_value": np.stack(values, axis=1),
            "attribute_confidence": np.concatenate([share for _, share in ranked], axis=1),
        }
