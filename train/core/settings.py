"""The settings that decide the outcome of a training run. They are kept in the checkpoint's training.json.

The options of the command line are made from these fields, so that each setting is described once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from aisle.preprocess import MAX_TOKENS

SCRATCH = "scratch"
PRETRAINING_EPOCHS = 8  # of the steps that come before a fine-tuning


def option(
    default: Any,
    description: str,
    *,
    low: float | None = None,
    high: float | None = None,
    multiple_of: int | None = None,
    choices: Callable[[], Sequence[str]] | None = None,
    shown: str | None = None,
) -> Any:
    """Return a dataclass field that is also an option of the command line.

    Args:
        low, high: the bounds of a number, both included.
        choices: the names that are allowed, read only when one is given.
        shown: what the help shows as the default.
    """
    metadata = {
        "help": description,
        "min": low,
        "max": high,
        "multiple_of": multiple_of,
        "choices": choices,
        "shown": shown,
    }
    return field(default=default, metadata=metadata)


def augmentations() -> list[str]:
    """Return the names of the augmentation techniques."""
    from aisle.preprocess.augment import TECHNIQUES

    return list(TECHNIQUES)


@dataclass(frozen=True)
class TrainingSettings:
    """The settings of one training run."""

    model: str = option(SCRATCH, "The encoder to start from, a folder or hub name; or 'scratch'.")
    epochs: int = option(2, "Passes over the training texts.", low=1)
    batch_size: int = option(64, "Texts per step, on all devices together.", low=1, high=65536)
    learning_rate: float | None = option(
        None, "Peak learning rate.", low=1e-8, high=1, shown="5e-4 from scratch, 3e-5 for a BERT-base"
    )
    warmup: float = 0.1  # share of the steps
    weight_decay: float = option(0.01, "Weight decay of AdamW.", low=0, high=10)
    dropout: float = option(0.1, "Share of the activations that a training step drops.", low=0, high=0.9)
    max_tokens: int = option(MAX_TOKENS, "Tokens of a text; the rest is cut off.", low=8, high=8192)
    windows: int = option(
        1, "Read a longer text in up to this number of parts of --max-tokens; logits are averaged.", low=1, high=64
    )
    seed: int = option(0, "Seed of the random numbers.", low=0, high=2**32 - 1)
    augment: tuple[str, ...] = option(
        (), "Vary texts by a technique of augmentation; repeatable.", choices=augmentations
    )
    augment_rate: float = option(0.3, "Probability that an epoch varies a text.", low=0, high=1)
    class_floor: int = option(0, "Repeat rows of rarer categories up to this number of rows.", low=0, high=10_000)
    mixup: float = option(0.0, "Mix the embeddings of two texts by beta(a, a); 0: off.", low=0, high=100)
    layer_decay: float | None = option(
        None, "Learning rate of a layer relative to the layer above.", low=0.1, high=1, shown="0.95; from scratch 1"
    )
    class_weight: float = option(
        0.0, "Weight a category by frequency ** -w. 0: all rows are equal, 1: all categories are.", low=0, high=1
    )
    focal: float = option(0.0, "Gamma of the focal loss; 0: plain cross-entropy.", low=0, high=10)
    label_smoothing: float = option(0.0, "Share of the target probability spread over all categories.", low=0, high=0.9)
    level_weight: float = option(
        0.0, "Weight of the loss at each upper level of categories like 'A > B > C'.", low=0, high=100
    )
    contrastive: str | None = option(
        None, "A column, such as a product number: texts with the same value get similar embeddings.", shown="off"
    )
    accumulate: int = option(1, "Compute a step in this number of parts, to save memory.", low=1, high=65536)
    patience: int = option(2, "Stop after this number of epochs without a better score.", low=1)
    folds: int = option(0, "Cross-validate first, with this number of folds; 0: off.", low=0)
    layers: int = option(4, "Layers of a model from scratch.", low=1, high=96)
    hidden_size: int = option(
        256, "Hidden size of a model from scratch, a multiple of 64.", low=64, high=4096, multiple_of=64
    )

    @property
    def from_scratch(self) -> bool:
        return self.model == SCRATCH


@dataclass(frozen=True)
class DecisionTargets:
    """What the decisions of a checkpoint are fitted to; see `aisle.train.core.decision_fit`."""

    accept_precision: float = option(
        0.98, "Precision wanted of the categories that are accepted without a review.", low=0.5, high=0.999
    )
    set_error: float = option(
        0.05, "Share of texts whose prediction set may lack the correct category.", low=0.0001, high=0.5
    )
    unknown_share: float = option(
        0.01, "Share of texts of known categories that may be called unknown; 0: no text is.", low=0, high=0.5
    )


@dataclass(frozen=True)
class StudentSpec:
    """The settings of a distillation, in addition to those of every training."""

    layers: int | None = option(None, "Layers of the student.", low=1, shown="half of the teacher's")
    hidden_size: int | None = option(None, "Hidden size of the student.", low=1, shown="the teacher's")
    temperature: float = option(2.0, "Temperature of the teachers' and the student's probabilities.", low=0.1, high=100)
    label_weight: float = option(
        0.5, "Weight of the labels in the loss; the teachers' probabilities get the rest.", low=0, high=1
    )
    hidden_weight: float = option(1.0, "Weight of the error of the hidden states; 0: off.", low=0, high=1000)
    linear_share: float = option(
        0.0, "Weight of a linear SVM among the teachers, which helps with few texts.", low=0, high=1
    )
    prune: bool = option(True, "Remove the vocabulary pieces that occur in no text.")


@dataclass(frozen=True)
class Privacy:
    """Differential privacy of a training; see `aisle.train.fit.private`."""

    dp_epsilon: float | None = option(
        None,
        "Train with differential privacy of this epsilon; 8 is common, less is safer.",
        low=0.01,
        high=1000,
        shown="off",
    )
    dp_delta: float = option(
        1e-5, "Delta of the differential privacy, well below 1 / training texts.", low=1e-12, high=0.1
    )

    @property
    def on(self) -> bool:
        return self.dp_epsilon is not None
