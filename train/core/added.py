"""The rows of categories that were added without training.

What the output layer reads tells the trained categories apart, and little else. Before the last layer, texts of other
categories still differ. So a row of an added category reads the mean hidden state there. It costs little: an engine
computes the first token only in its last layer.

Such rows are in the model's weights, as `added_classifier`; what they give is added to the logits.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn

NAME = "added_classifier"
_LAYER = re.compile(r"layers?\.\d+$")


def mean_hidden(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """Return the mean hidden state of each text, [texts, hidden] in fp32.

    Args:
        hidden: [texts, tokens, hidden].
        attention_mask: [texts, tokens].
    """
    weights = attention_mask[:, :, None].float()
    return (hidden.float() * weights).sum(dim=1) / weights.sum(dim=1)


class Below:
    """Keeps what goes into the last layer of a model, while the model runs."""

    def __init__(self, model: Any) -> None:
        self._mask: Tensor | None = None
        self._hidden: Tensor | None = None
        last = [module for name, module in model.named_modules() if _LAYER.search(name)][-1]
        self._hooks = [
            model.register_forward_pre_hook(self._keep_mask, with_kwargs=True),
            last.register_forward_pre_hook(self._keep_hidden, with_kwargs=True),
        ]

    def mean(self) -> Tensor:
        """Return the mean hidden state of each text of the last batch, [texts, hidden], in fp32."""
        assert self._hidden is not None
        if self._mask is None:
            return self._hidden.float().mean(dim=1)
        return mean_hidden(self._hidden, self._mask)

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _keep_mask(self, _: Any, args: Any, named: dict[str, Any]) -> None:
        self._mask = named.get("attention_mask", args[1] if len(args) > 1 else None)

    def _keep_hidden(self, _: Any, args: Any, named: dict[str, Any]) -> None:
        self._hidden = args[0] if args else named["hidden_states"]


def added_weight(model: Any) -> Tensor | None:
    """Return the weights [labels, hidden] of added categories' rows, zero in all other rows; None if there are none."""
    layer = getattr(model, NAME, None)
    return None if layer is None else layer.weight


def set_added(model: Any, weight: Tensor) -> None:
    """Give a model rows for added categories, in place of those that it has.

    Args:
        weight: [labels, hidden].
    """
    is_new = added_weight(model) is None
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight.float())
    setattr(model, NAME, layer)
    if not is_new:
        return
    below = Below(model)

    def add(module: Any, _: Any, output: Any) -> Any:
        output.logits = output.logits + getattr(module, NAME)(below.mean())
        return output

    model.register_forward_hook(add)


def load_added(model: Any, folder: Path) -> None:
    """Give a model the rows of added categories that a checkpoint's weights have, if any."""
    file = folder / "model.safetensors"
    if not file.is_file():
        return
    with safe_open(file, "pt") as weights:
        if f"{NAME}.weight" in weights.keys():  # noqa: SIM118 - it is no dictionary
            set_added(model, weights.get_tensor(f"{NAME}.weight"))
