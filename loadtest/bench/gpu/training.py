"""The training part of `aisle bench gpu`: steps of `aisle train` and of the Trainer of transformers, same texts."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch

from aisle.loadtest.bench.gpu.engines import Bench, Row
from aisle.loadtest.bench.gpu.measure import device, synchronize
from aisle.preprocess.clean import LabelledTexts
from aisle.train.core.checkpoint import Checkpoint
from aisle.train.core.predict import pad
from aisle.train.core.processes import Processes
from aisle.train.core.settings import TrainingSettings
from aisle.train.core.split import Split
from aisle.train.fit.classification import Classification
from aisle.train.fit.loop import Hooks, fit

SIZE = 64  # texts of a step
NOTHING = LabelledTexts([], [])


def train(bench: Bench) -> Iterator[Row]:
    """Measure both: BERT with random weights, bf16 where it is fast, batches of 64 texts.

    `aisle train` batches texts of similar length. The Trainer, with its default settings, takes them in random order.
    """
    texts = bench.texts()[: SIZE * (2 if bench.dry else 100)]
    names = [f"category {number}" for number in range(10)]
    labels = [names[number % 10] for number in range(len(texts))]
    yield _row("aisle train", len(texts), _ours(bench, LabelledTexts(texts, labels), names))
    if importlib.util.find_spec("accelerate"):
        yield _row("transformers Trainer", len(texts), _trainer(bench, texts))
    else:
        yield {"system": "transformers Trainer", "error": "accelerate is not installed"}


def _row(system: str, texts: int, seconds: float) -> Row:
    return {"system": f"training step, {system}", "batch": SIZE, "texts_per_second": texts / seconds}


def _ours(bench: Bench, rows: LabelledTexts, names: list[str]) -> float:
    """Return the seconds of an epoch after the first."""
    settings = TrainingSettings(epochs=3, batch_size=SIZE, learning_rate=1e-5, patience=3)
    parts = Split(rows, NOTHING, NOTHING, names)
    task = Classification(parts, Checkpoint(bench.checkpoint).tokenizer, settings, device())
    ends: list[float] = []

    def note(*_: Any) -> None:
        synchronize()
        ends.append(time.perf_counter())

    fit(bench.model(), task, settings, Processes(0, 1, device()), Hooks(after_epoch=note))
    return min(end - start for start, end in pairwise(ends))


def _trainer(bench: Bench, texts: list[str]) -> float:
    """Return the seconds of an epoch after the first."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    tokens = Checkpoint(bench.checkpoint).tokenizer.tokens(texts)
    rows = [{"input_ids": ids, "labels": number % 10} for number, ids in enumerate(tokens)]
    ends: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_epoch_end(self, *_: Any, **__: Any) -> None:
            synchronize()
            ends.append(time.perf_counter())

    def collate(batch: list[Row]) -> dict[str, torch.Tensor]:
        input_ids, attention_mask = pad([row["input_ids"] for row in batch])
        labels = torch.tensor([row["labels"] for row in batch])
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}

    on_gpu = device().type == "cuda"
    arguments = TrainingArguments(
        output_dir=str(bench.work / "trainer"),
        per_device_train_batch_size=SIZE,
        num_train_epochs=3,
        learning_rate=1e-5,
        bf16=on_gpu,
        use_cpu=not on_gpu,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    model = bench.model().train()
    Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collate, callbacks=[Clock()]).train()
    return min(end - start for start, end in pairwise(ends))
