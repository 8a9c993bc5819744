"""The texts that a checkpoint carries, so that an engine can be calibrated and checked wherever it is built."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from aisle.errors import InputError
from aisle.preprocess.clean import Table, clean_rows
from aisle.preprocess.table import read_labelled
from aisle.train.data import Split, split

TEXTS = {"train": 512, "validation": 512, "held_out": 2048}
LEAST = 32  # texts: with fewer, neither ranges nor shares mean anything


class Sample(NamedTuple):
    """Cleaned texts with their labels, some of each part of the split."""

    train: Table  # to calibrate with
    validation: Table  # to choose with
    held_out: Table  # to check with


def draw(parts: Split, seed: int = 0) -> Sample:
    """Draw texts of each part of a split at random."""
    rng = random.Random(seed)
    return Sample(*(_some(getattr(parts, part), count, rng) for part, count in TEXTS.items()))


def write_sample(folder: Path, sample: Sample) -> None:
    """Write sample.jsonl into a checkpoint."""
    with (folder / "sample.jsonl").open("w", encoding="utf-8") as file:
        for part, table in zip(Sample._fields, sample, strict=True):
            for text, label in zip(table.texts, table.labels, strict=True):
                file.write(json.dumps({"part": part, "text": text, "category": label}, ensure_ascii=False) + "\n")


def read_sample(checkpoint: Path) -> Sample:
    """Read a checkpoint's sample.jsonl.

    Raises:
        InputError: the checkpoint carries no texts, or too few.
    """
    sample = Sample(Table([], []), Table([], []), Table([], []))
    try:
        for line in (checkpoint / "sample.jsonl").open(encoding="utf-8"):
            row = json.loads(line)
            table: Table = getattr(sample, row["part"])
            table.texts.append(row["text"])
            table.labels.append(row["category"])
    except OSError:
        raise InputError(f"{checkpoint} carries no texts (sample.jsonl); give the training table with --data") from None
    except (ValueError, KeyError, AttributeError) as error:
        raise InputError(f"{checkpoint}/sample.jsonl is damaged: {error}") from None
    return _enough(sample, checkpoint)


def sample_of(data: Path, text_column: str, label_column: str, labels: Sequence[str]) -> Sample:
    """Draw a sample from the table that the checkpoint was trained on; content decides which texts are held out.

    Raises:
        InputError: it holds too few texts, or a category that the checkpoint does not know.
    """
    table, _ = clean_rows(read_labelled(data, text_column, label_column))
    unknown = sorted(set(table.labels) - set(labels))
    if unknown:
        raise InputError(f"{data}: category {unknown[0]!r} is unknown to the checkpoint; give the table it was made of")
    _enough_rows(len(table.texts), data)
    return _enough(draw(split(table)), data)


def _some(table: Table, count: int, rng: random.Random) -> Table:
    chosen = sorted(rng.sample(range(len(table.texts)), min(count, len(table.texts))))
    return Table([table.texts[i] for i in chosen], [table.labels[i] for i in chosen])


def _enough(sample: Sample, source: Path) -> Sample:
    _enough_rows(min(len(table.texts) for table in sample), source)
    return sample


def _enough_rows(rows: int, source: Path) -> None:
    if rows < LEAST:
        raise InputError(f"{source}: {rows} usable rows are too few to calibrate or check with; give {LEAST} or more")
