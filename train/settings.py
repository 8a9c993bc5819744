"""What decides the outcome of a training run; kept in the checkpoint's training.json."""

from __future__ import annotations

from dataclasses import dataclass

from aisle.preprocess.encode import MAX_TOKENS

SCRATCH = "scratch"


@dataclass(frozen=True)
class Settings:
    """What one training run is told."""

    model: str = SCRATCH  # or a Hugging Face BERT: a local folder or a hub name
    epochs: int = 2
    batch_size: int = 64  # texts a step, on all devices together
    learning_rate: float | None = None  # by default 5e-4 from scratch, 3e-5 from a BERT-base
    warmup: float = 0.1  # share of the steps
    weight_decay: float = 0.01
    dropout: float = 0.1
    max_tokens: int = MAX_TOKENS
    seed: int = 0
    augment: tuple[str, ...] = ()  # names of preprocess.augment.TECHNIQUES, applied anew each epoch
    augment_rate: float = 0.3  # share of a text that an augmentation touches
    class_floor: int = 0  # rows of rarer categories are repeated up to so many
    mixup: float = 0.0  # beta(mixup, mixup) mixes the embeddings of two texts; 0: off
    layer_decay: float | None = None  # each layer below learns so many times slower; 1.0 from scratch, else 0.95
    class_weight: float = 0.0  # a category counts frequency ** -class_weight; 0: all rows alike, 1: all categories
    focal: float = 0.0  # gamma of the focal loss; 0: plain cross-entropy
    label_smoothing: float = 0.0
    level_weight: float = 0.0  # of the loss at each level above the leaves
    accumulate: int = 1  # parts that a step's texts are computed in, to save memory
    patience: int = 2  # epochs without a better validation score before training stops
    folds: int = 0  # cross-validate in so many parts first; 0: don't
    layers: int = 4  # of a model from scratch
    hidden_size: int = 256  # likewise; a multiple of the 64 that an attention head is wide

    @property
    def from_scratch(self) -> bool:
        return self.model == SCRATCH
