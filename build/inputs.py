"""The inputs of a build: the model, and the tokenized texts that calibrate and check its engines."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from aisle.build import fp8, quantize
from aisle.build.gate import HeldOut
from aisle.build.graph import PackedEncoder
from aisle.console import say
from aisle.errors import InputError
from aisle.preprocess.clean import LabelledTexts, prepare
from aisle.preprocess.label_sets import joined
from aisle.preprocess.pack import Packed, pack
from aisle.preprocess.tables.table import column, read_rows
from aisle.preprocess.values import TextError
from aisle.preprocess.windows import separate
from aisle.train.core.checkpoint import Checkpoint
from aisle.train.core.families import token_limit
from aisle.train.core.heads import spans
from aisle.train.core.predict import logits_of
from aisle.train.core.sample import LEAST, TEXTS, Sample, sample_of, topped_up

CALIBRATION_BATCH_SIZE = 16  # texts


@dataclass(frozen=True)
class DataSource:
    """A table of labelled texts, used instead of the checkpoint's own sample."""

    path: Path
    text_column: str
    label_column: str


@dataclass(frozen=True)
class TextSource:
    """A table of texts without labels, on which the engine is compared with its checkpoint."""

    path: Path
    text_column: str


class BuildInputs:
    """A checkpoint and its texts, loaded once for all engines built from it."""

    def __init__(
        self, checkpoint: Path, max_tokens: int | None, data: DataSource | None, held_out: TextSource | None = None
    ) -> None:
        """Load the model and the texts.

        Args:
            held_out: texts to check with, instead of those of the checkpoint or `data`. If neither of these has texts,
                `held_out` is split: half to calibrate and choose layers, half to check.

        Raises:
            InputError: the checkpoint is damaged or cannot be served, or there are too few texts.
        """
        self.checkpoint = Checkpoint(checkpoint, max_tokens)
        self.labels = self.checkpoint.labels
        self.tokenizer = self.checkpoint.tokenizer
        self.model: Any = self.checkpoint.whole_model
        positions = token_limit(self.model.config)
        if self.tokenizer.max_tokens > positions:
            raise InputError(f"{checkpoint} has positions for only {positions} tokens; lower --max-tokens")
        own = _sample(self.checkpoint, data, held_out)
        self.sample = own if held_out else topped_up(own)
        self.seen_in_training = len(self.sample.held_out.texts) - len(own.held_out.texts)
        if self.seen_in_training:
            say(
                f"{len(own.held_out.texts)} texts are held out: the engine is checked on these and on "
                f"{self.seen_in_training} that training saw"
            )

    @property
    def texts(self) -> list[str]:
        """All texts of the sample, cleaned."""
        return [*self.sample.train.texts, *self.sample.validation.texts, *self.sample.held_out.texts]

    @cached_property
    def held_out(self) -> HeldOut:
        """The texts that engines are checked on, in random order: requests do not arrive sorted by length."""
        texts = self.sample.held_out.texts
        order = random.Random(0).sample(range(len(texts)), len(texts))
        tokens = self.tokenizer.tokens([texts[i] for i in order])
        expected = logits_of(self.model, tokens, "running the checkpoint in PyTorch")
        known = self.sample.held_out.labels
        labels = [known[i] for i in order] if known else self._own_answers(expected)
        own = self.checkpoint
        return HeldOut(
            *(tokens, labels, self.labels, expected, self.seen_in_training, own.decisions, own.thresholds, own.heads)
        )

    def _own_answers(self, logits: npt.NDArray[np.float32]) -> list[str]:
        """Return the checkpoint's own labels of texts with these logits [texts, labels or more]."""
        thresholds = self.checkpoint.thresholds
        if thresholds:
            return [joined(names) for names in thresholds.named(thresholds.apply(logits).reached)]
        return [self.labels[i] for i in logits[:, : len(self.labels)].argmax(1)]

    @cached_property
    def places(self) -> list[slice]:
        """The logits of the categories, and those of each further head."""
        return [slice(0, len(self.labels)), *spans(len(self.labels), self.checkpoint.heads)]

    @cached_property
    def validation(self) -> list[Packed]:
        """The texts on which calibrations and layers are compared."""
        return self._packed(self.sample.validation.texts)

    @cached_property
    def ranges(self) -> tuple[quantize.Ranges, dict[str, float]]:
        """The ranges of the best calibration method, and the divergence of each method on the validation texts."""
        graph = PackedEncoder(self.model).eval()
        expected = quantize.logits(graph, self.validation)
        ranges = quantize.calibrate(graph, self._packed(self.sample.train.texts))
        losses = {}
        for method, found in ranges.items():
            actual = quantize.logits(quantize.quantized(PackedEncoder(self.model), found), self.validation)
            losses[method] = quantize.divergence(expected, actual, self.checkpoint.multi_label, self.places)
        best = min(losses, key=losses.__getitem__)
        say(f"calibration: {best} (divergence: {', '.join(f'{name} {loss:.2g}' for name, loss in losses.items())})")
        return ranges[best], losses

    @cached_property
    def largest_inputs(self) -> quantize.Ranges:
        """The largest |input| of each linear layer of the encoder on the training texts, for fp8."""
        return fp8.largest_inputs(PackedEncoder(self.model).eval(), self._packed(self.sample.train.texts))

    def _packed(self, texts: Sequence[str]) -> list[Packed]:
        tokens, _ = separate(self.tokenizer.tokens(texts), self.tokenizer.max_tokens)
        batches = [tokens[i : i + CALIBRATION_BATCH_SIZE] for i in range(0, len(tokens), CALIBRATION_BATCH_SIZE)]
        return [
            pack(
                np.concatenate([np.asarray(ids) for ids in batch]),
                np.array([len(ids) for ids in batch]),
                self.tokenizer.max_tokens,
            )
            for batch in batches
        ]


def _sample(checkpoint: Checkpoint, data: DataSource | None, held_out: TextSource | None) -> Sample:
    """Return the texts to calibrate, choose layers and check with; if `held_out` is given, they have no labels.

    Raises:
        InputError: there are too few.
    """
    own = _own_sample(checkpoint, data)
    if held_out:
        checkpoint.check_fields(held_out.text_column)
        return _with_held_out(own, held_out)
    if own is None:
        raise InputError(
            f"{checkpoint.folder} has no texts (sample.jsonl); name the training table after it, or give some hundred "
            "texts of the kind that it will classify with --held-out"
        )
    return own


def _own_sample(checkpoint: Checkpoint, data: DataSource | None) -> Sample | None:
    """Return a sample of `data` or the checkpoint's own sample; None if there is neither."""
    if data:
        checkpoint.check_fields(data.text_column)
        return sample_of(data.path, data.text_column, data.label_column, checkpoint.labels, checkpoint.labelling)
    return checkpoint.sample if (checkpoint.folder / "sample.jsonl").is_file() else None


def _with_held_out(own: Sample | None, held_out: TextSource) -> Sample:
    """Return a sample, without labels, whose held-out part comes from a table; without `own`, all parts do.

    Raises:
        InputError: the table has too few texts.
    """
    texts = _texts(held_out)
    random.Random(0).shuffle(texts)
    if own:
        seen = {*own.train.texts, *own.validation.texts}
        parts = [own.train.texts, own.validation.texts, [text for text in texts if text not in seen]]
    else:
        quarter = len(texts) // 4
        parts = [texts[:quarter], texts[quarter : 2 * quarter], texts[2 * quarter :]]
    sizes = TEXTS.values()
    sample = Sample(*(LabelledTexts(part[:size], []) for part, size in zip(parts, sizes, strict=True)))
    if min(len(part.texts) for part in sample) < LEAST:
        needed = LEAST if own else 4 * LEAST
        raise InputError(
            f"{held_out.path}: {len(texts)} usable texts are too few; give at least {needed} different ones"
        )
    return sample


def _texts(source: TextSource) -> list[str]:
    """Return the distinct texts of a file, cleaned as in the server, in order; texts that it refuses are dropped."""
    rows = column(read_rows(source.path), [source.text_column], source.path)
    found: dict[str, None] = {}
    for (raw,) in rows:
        with contextlib.suppress(TextError):
            found[prepare(raw)] = None
    return list(found)
