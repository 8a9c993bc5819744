"""The sample of texts in a checkpoint. It is used to calibrate and check an engine on any machine."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from aisle.console import say
from aisle.errors import InputError
from aisle.preprocess.clean import LabelledTexts, clean_rows
from aisle.preprocess.label_sets import joined
from aisle.preprocess.labels import Labelling
from aisle.preprocess.tables.table import read_labelled
from aisle.train.core.split import Split, is_learnt, split

FILE = "sample.jsonl"
EXAMPLES = "examples.jsonl"
TEXTS = {"train": 512, "validation": 512, "held_out": 2048}
LEAST = 32  # texts for calibration or a check; with fewer, ranges and shares are meaningless


class Sample(NamedTuple):
    """Cleaned texts with their labels, some of each part of the split."""

    train: LabelledTexts  # for calibration
    validation: LabelledTexts  # for choices, such as which layers stay in higher precision
    held_out: LabelledTexts  # for the check


def draw(parts: Split, seed: int = 0) -> Sample:
    """Draw texts of each part of a split at random."""
    rng = random.Random(seed)
    return Sample(*(_some(getattr(parts, part), count, rng) for part, count in TEXTS.items()))


def write_sample(folder: Path, sample: Sample) -> None:
    """Write sample.jsonl into a checkpoint."""
    with (folder / FILE).open("w", encoding="utf-8") as file:
        for part, table in zip(Sample._fields, sample, strict=True):
            for text, label in zip(table.texts, table.labels, strict=True):
                category = table.categories_of(label) if table.multi_label else label
                file.write(json.dumps({"part": part, "text": text, "category": category}, ensure_ascii=False) + "\n")


def write_examples(folder: Path, examples: LabelledTexts) -> None:
    """Write examples.jsonl into a checkpoint: the texts of added categories, which the training table may lack."""
    with (folder / EXAMPLES).open("w", encoding="utf-8") as file:
        for text, label in zip(examples.texts, examples.labels, strict=True):
            file.write(json.dumps({"text": text, "category": label}, ensure_ascii=False) + "\n")


def read_examples(checkpoint: Path) -> LabelledTexts:
    """Read a checkpoint's examples.jsonl; no text if it has none.

    Raises:
        InputError: the file is damaged.
    """
    examples = LabelledTexts([], [])
    try:
        for line in (checkpoint / EXAMPLES).open(encoding="utf-8"):
            row = json.loads(line)
            examples.texts.append(str(row["text"]))
            examples.labels.append(str(row["category"]))
    except FileNotFoundError:
        return examples
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{checkpoint}/{EXAMPLES} is damaged: {error}") from None
    return examples


def read_sample(checkpoint: Path) -> Sample:
    """Read a checkpoint's sample.jsonl.

    Raises:
        InputError: the checkpoint has no sample, or a sample of too few texts.
    """
    sample = Sample(LabelledTexts([], []), LabelledTexts([], []), LabelledTexts([], []))
    try:
        for line in (checkpoint / FILE).open(encoding="utf-8"):
            row = json.loads(line)
            table: LabelledTexts = getattr(sample, row["part"])
            table.texts.append(row["text"])
            table.multi_label = isinstance(row["category"], list)
            table.labels.append(joined(row["category"]) if table.multi_label else row["category"])
    except OSError:
        raise InputError(
            f"{checkpoint} has no sample of texts ({FILE}); put the file back, or give the training table too"
        ) from None
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{checkpoint}/{FILE} is damaged: {error}") from None
    _enough_rows(sum(len(part.texts) for part in sample), checkpoint)
    return sample


def sample_of(data: Path, text_column: str, label_column: str, labels: Sequence[str], labelling: Labelling) -> Sample:
    """Draw a sample from the table that the checkpoint was trained on. The same texts are held out as in training.

    `labelling` is how training changed the table's labels.

    Raises:
        InputError: the table has too few texts, or a category that the checkpoint does not know.
    """
    table, _ = clean_rows(read_labelled(data, text_column, label_column), labelling, learnable=is_learnt)
    unknown = sorted(table.counts().keys() - set(labels))
    if unknown:
        raise InputError(
            f"{data}: category {unknown[0]!r} is unknown to the checkpoint; give the table that it was trained on"
        )
    _enough_rows(len(table.texts), data)
    return draw(split(table))


def _some(table: LabelledTexts, count: int, rng: random.Random) -> LabelledTexts:
    chosen = sorted(rng.sample(range(len(table.texts)), min(count, len(table.texts))))
    return table.like([table.texts[i] for i in chosen], [table.labels[i] for i in chosen])


def topped_up(sample: Sample) -> Sample:
    """Return the sample of a small table with at least `LEAST` texts in the validation and in the held-out part.

    Missing texts come from the training part. They can serve because an engine is compared with its checkpoint; the
    two agree slightly more on texts that training saw.
    """
    validation = _more(sample.validation, sample.train)
    held_out = _more(_more(sample.held_out, sample.validation), sample.train)
    return Sample(sample.train, validation, held_out)


def _more(table: LabelledTexts, source: LabelledTexts) -> LabelledTexts:
    lacking = max(0, LEAST - len(table.texts))
    return source.like(table.texts + source.texts[:lacking], table.labels + source.labels[:lacking])


def warn_of_few(parts: Split) -> None:
    """Warn at the start when a table is too small to build an engine or to measure accuracy well."""
    rows = sum(len(part.texts) for part in parts[:3])
    held_out = len(parts.held_out.texts)
    if rows < LEAST:
        say(f"{rows} rows are too few to build an engine from this checkpoint; it needs {LEAST}")
    elif min(held_out, len(parts.validation.texts)) < LEAST:
        few = f"a small table: accuracy is measured on only {held_out} held-out texts, in steps of {1 / held_out:.0%}"
        if held_out < LEAST:
            few += f"; an engine is checked on these and on texts that training saw, {LEAST} together"
        say(few)


def _enough_rows(rows: int, source: Path) -> None:
    if rows < LEAST:
        raise InputError(
            f"{source}: {rows} usable rows are too few to calibrate or check an engine; give {LEAST} or more"
        )
