"""A checkpoint whose categories change: its texts, its output layer, and the new checkpoint that is written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from aisle.console import say
from aisle.errors import InputError
from aisle.files import put_in_place
from aisle.preprocess.clean import LabelledTexts, clean_rows
from aisle.preprocess.tables.table import read_labelled
from aisle.train.categories.names import Changes, changed, labelling_after
from aisle.train.core import sample
from aisle.train.core.added import added_weight, set_added
from aisle.train.core.checkpoint import Checkpoint, write_checkpoint
from aisle.train.core.decisions import Decisions, Floats, Ints
from aisle.train.core.families import output_layer
from aisle.train.core.predict import features_of
from aisle.train.core.resume import check_replaceable, working_folder
from aisle.train.core.sample import Sample, draw
from aisle.train.core.split import is_learnt, split
from aisle.train.fit.model import label_names

CALIBRATION = 4096  # texts of a table that a row is fitted on, at most
HELD_OUT = 8192  # texts of a table that it is measured on, at most


@dataclass(frozen=True)
class Table:
    """A table of labelled texts, used instead of the checkpoint's own sample."""

    path: Path
    text_column: str
    label_column: str


class Texts(NamedTuple):
    """Cleaned texts of the checkpoint's categories."""

    train: LabelledTexts
    validation: LabelledTexts
    held_out: LabelledTexts
    sample: Sample  # for the new checkpoint


class Layer(NamedTuple):
    """The weights of an output layer and, after them, those of added categories' rows (`core.added`)."""

    weight: Floats  # [labels, features + hidden]
    bias: Floats  # [labels]

    def logits(self, features: Floats) -> Floats:
        """Return the logits [texts, labels] of what `features` returns."""
        logits: Floats = features @ self.weight.T + self.bias
        return logits


class Change(NamedTuple):
    """What a command changes."""

    names: Changes  # category -> its new name
    added: Sequence[str] = ()
    layer: Layer | None = None  # a new output layer; None: the old one
    details: dict[str, Any] = {}  # noqa: RUF012 - of training.json, never changed

    def labels(self, old: Sequence[str]) -> list[str]:
        """Return the labels after the change, in the order of the logits."""
        return [*changed(old, self.names), *self.added]


def check_out(checkpoint: Path, out: Path, overwrite: bool) -> None:
    """Check that the new checkpoint may be written.

    Raises:
        InputError: it may not.
    """
    if out.resolve() == checkpoint.resolve():
        raise InputError(f"{out} is the old checkpoint; choose another folder, so that both can be compared")
    check_replaceable(out, "training.json", overwrite)


def read_texts(source: Checkpoint, table: Table | None) -> Texts:
    """Return the texts of the checkpoint's categories: those of its sample or, if given, more of them from a table.

    Raises:
        InputError: there are too few.
    """
    texts = _texts_of(source, table) if table else Texts(*source.sample, source.sample)
    if not (texts.held_out.texts and texts.validation.texts):
        where = table.path if table else source.folder
        raise InputError(f"{where}: no text is left to measure on; give a table with more rows with --data")
    return texts


def _texts_of(source: Checkpoint, table: Table) -> Texts:
    source.check_fields(table.text_column)
    rows = read_labelled(table.path, table.text_column, table.label_column)
    cleaned, _ = clean_rows(rows, source.labelling, learnable=is_learnt)
    known = set(source.labels)
    kept = [row for row in zip(cleaned.texts, cleaned.labels, strict=True) if row[1] in known]
    if len(kept) < len(cleaned.texts):
        say(f"{len(cleaned.texts) - len(kept)} rows with categories that the checkpoint does not know are left out")
    parts = split(LabelledTexts([text for text, _ in kept], [label for _, label in kept]))
    validation = _some(parts.validation, CALIBRATION)
    train = _some(parts.train, CALIBRATION - len(validation.texts))
    return Texts(train, validation, _some(parts.held_out, HELD_OUT), draw(parts))


def _some(table: LabelledTexts, count: int) -> LabelledTexts:
    """Return up to `count` texts of a table, drawn at random."""
    chosen = np.random.default_rng(0).permutation(len(table.texts))[:count].tolist()
    return LabelledTexts([table.texts[i] for i in chosen], [table.labels[i] for i in chosen])


def joined(*tables: LabelledTexts) -> LabelledTexts:
    """Return the texts of several tables in one."""
    return LabelledTexts(
        [text for table in tables for text in table.texts], [label for table in tables for label in table.labels]
    )


def relabelled(table: LabelledTexts, names: Changes) -> LabelledTexts:
    """Return the same texts with the new names of their categories."""
    return LabelledTexts(table.texts, [names.get(label, label) for label in table.labels])


def relabelled_sample(texts: Sample, names: Changes) -> Sample:
    """Return the same sample with the new names of its categories."""
    return Sample(*(relabelled(part, names) for part in texts))


def own_sample(source: Checkpoint) -> Sample:
    """Return the checkpoint's sample; an empty one if it has none."""
    if (source.folder / sample.FILE).is_file():
        return source.sample
    return Sample(*(LabelledTexts([], []) for _ in Sample._fields))


def numbers(labels: Sequence[str], table: LabelledTexts) -> Ints:
    """Return the number of each text's label, [texts]."""
    number = {label: i for i, label in enumerate(labels)}
    return np.array([number[label] for label in table.labels], np.int64)


def layer_of(source: Checkpoint) -> Layer:
    """Return the weights of the checkpoint's output layer."""
    layer, added = output_layer(source.model), added_weight(source.model)
    if added is None:
        added = torch.zeros(layer.out_features, source.model.config.hidden_size)
    weight = torch.cat([layer.weight, added], dim=1)
    return Layer(weight.detach().double().numpy(), layer.bias.detach().double().numpy())


def below(source: Checkpoint) -> slice:
    """Return which of the features added categories read."""
    return slice(output_layer(source.model).in_features, None)


def features(source: Checkpoint, texts: Sequence[str], description: str) -> Floats:
    """Return what the logits of cleaned texts are linear in, [texts, features + hidden]."""
    return features_of(source.model, source.tokenizer.tokens(texts), description).astype(np.float64)


def write_changed(
    source: Checkpoint,
    change: Change,
    out: Path,
    *,
    texts: Sample,
    examples: LabelledTexts,
    decisions: Decisions | None,
    metrics: dict[str, Any],
) -> None:
    """Write the new checkpoint to `out`. The model in `source` is changed too.

    Raises:
        InputError: `out` cannot be written, or rows of the training table have a new name already.
    """
    training = _training(source, change)
    tokenizer, fingerprint, heads = source.tokenizer, source.fingerprint, source.head_rows
    _replace_layer(source.model, change.labels(source.labels), change.layer)
    with working_folder(out, {"checkpoint": fingerprint, **change.details}) as work:
        write_checkpoint(
            *(work / "checkpoint", source.model, tokenizer, texts, metrics, training, decisions),
            examples=examples,
            heads=heads,
        )
        put_in_place(work / "checkpoint", out)


def _training(source: Checkpoint, change: Change) -> dict[str, Any]:
    """Return the new training.json: the old one, how the old table's labels are read now, and this step."""
    training = source.training
    data = training.get("data", {})
    labelling = labelling_after(source.labelling, data.get("cleaning", {}), change.names)
    step = {"checkpoint_sha256": source.fingerprint, **change.details}
    return {
        **training,
        "data": {**data, **labelling.metadata()},
        "prototypes": [*prototypes_after(source, change.names), *change.added],
        "categories": [*training.get("categories", []), step],
    }


def prototypes_after(source: Checkpoint, new_names: Changes) -> list[str]:
    """Return the new names of the categories that were added without training. Merged with a trained one, none is."""
    trained = {new_names.get(label, label) for label in source.labels if label not in source.prototypes}
    return [name for name in changed(source.prototypes, new_names) if name not in trained]


def _replace_layer(model: Any, labels: Sequence[str], layer: Layer | None) -> None:
    """Give the logits of a model new names and, if there is one, a new output layer."""
    names = label_names(labels)
    model.config.id2label, model.config.label2id = names["id2label"], names["label2id"]
    if layer is None:
        return
    model.num_labels = len(labels)
    last = output_layer(model)
    weight = torch.from_numpy(layer.weight).float()
    weight, added = weight[:, : last.in_features].contiguous(), weight[:, last.in_features :].contiguous()
    last.weight = torch.nn.Parameter(weight)
    last.bias = torch.nn.Parameter(torch.from_numpy(layer.bias).float())
    last.out_features = len(labels)
    if added.any() or added_weight(model) is not None:
        set_added(model, added)


def old_metrics(source: Checkpoint, names: Changes) -> dict[str, Any]:
    """Return metrics.json with the new names of the categories; an empty one if there is none.

    Raises:
        InputError: it is damaged.
    """
    try:
        metrics: dict[str, Any] = json.loads((source.folder / "metrics.json").read_text("utf-8"))
        return {**metrics, "per_class": {names.get(name, name): row for name, row in metrics["per_class"].items()}}
    except OSError:
        return {}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{source.folder}/metrics.json is damaged: {error}") from None
