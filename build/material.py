"""What engines are made from and checked with: the model, and texts in the form that it reads."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from aisle.build import quantize
from aisle.build.gate import HeldOut
from aisle.build.graph import PackedBert
from aisle.console import say
from aisle.errors import InputError
from aisle.preprocess.encode import Encoder
from aisle.preprocess.pack import Packed, pack
from aisle.train.checkpoint import load_model, read_labels
from aisle.train.evaluate import logits_of
from aisle.train.sample import Sample, read_sample, sample_of

CALIBRATION_BATCH = 16  # texts


@dataclass(frozen=True)
class Table:
    """Where labelled texts come from, in place of those that the checkpoint carries."""

    path: Path
    text_column: str
    label_column: str


class Material:
    """One checkpoint, loaded once for all the engines made from it."""

    def __init__(self, checkpoint: Path, max_tokens: int | None, data: Table | None) -> None:
        """Load the model and the texts.

        Raises:
            InputError: the checkpoint is damaged or cannot be served, or there are too few texts.
        """
        self.labels = read_labels(checkpoint)
        self.encoder = Encoder(checkpoint / "tokenizer.json", max_tokens)
        self.model: Any = load_model(checkpoint)
        positions = self.model.config.max_position_embeddings
        if self.encoder.max_tokens > positions:
            raise InputError(f"{checkpoint} reads {positions} tokens at most; lower --max-tokens")
        self.sample: Sample = (
            sample_of(data.path, data.text_column, data.label_column, self.labels) if data else read_sample(checkpoint)
        )

    @cached_property
    def held_out(self) -> HeldOut:
        # Requests come in no order of length.
        order = random.Random(0).sample(range(len(self.sample.held_out.texts)), len(self.sample.held_out.texts))
        tokens = self.encoder.tokens([self.sample.held_out.texts[i] for i in order])
        labels = [self.sample.held_out.labels[i] for i in order]
        return HeldOut(tokens, labels, self.labels, logits_of(self.model, tokens, "asking PyTorch"))

    @cached_property
    def validation(self) -> list[Packed]:
        return self._packed(self.sample.validation.texts)

    @cached_property
    def ranges(self) -> tuple[quantize.Ranges, dict[str, float]]:
        """The best calibration's ranges, and the divergence that each calibration causes on the validation texts."""
        graph = PackedBert(self.model).eval()
        expected = quantize.logits(graph, self.validation)
        ranges = quantize.calibrate(graph, self._packed(self.sample.train.texts))
        losses = {}
        for method, found in ranges.items():
            actual = quantize.logits(quantize.quantized(PackedBert(self.model), found), self.validation)
            losses[method] = quantize.divergence(expected, actual)
        best = min(losses, key=losses.__getitem__)
        say(f"calibration: {best} (divergence: {', '.join(f'{name} {loss:.2g}' for name, loss in losses.items())})")
        return ranges[best], losses

    def _packed(self, texts: Sequence[str]) -> list[Packed]:
        tokens = self.encoder.tokens(texts)
        batches = [tokens[i : i + CALIBRATION_BATCH] for i in range(0, len(tokens), CALIBRATION_BATCH)]
        return [
            pack(np.concatenate([np.asarray(ids) for ids in batch]), np.array([len(ids) for ids in batch]), width)
            for batch in batches
            for width in (self.encoder.max_tokens,)
        ]
