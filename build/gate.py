"""The gate: an engine is installed only if it answers as the PyTorch fp32 checkpoint does, on held-out texts."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from aisle.build.engine import Engine
from aisle.console import track
from aisle.train.metrics import score

Logits = npt.NDArray[np.float32]
FULL_BATCH = 64
TIMED_SECONDS = 3.0  # per figure of speed


class GateError(Exception):
    """The engine does not agree with the checkpoint; `row` says how far. Exit code 3."""

    def __init__(self, message: str, row: dict[str, Any]) -> None:
        super().__init__(message)
        self.row = row


@dataclass(frozen=True)
class Gate:
    """What is asked of an engine: shares, not percent."""

    agreement: float  # least share of texts with the checkpoint's own top category
    f1_loss: float  # largest loss of macro-F1

    def passes(self, row: dict[str, Any]) -> bool:
        return bool(row["agreement"] >= self.agreement and row["f1_loss"] <= self.f1_loss)


GATES = {"fp32": Gate(0.999, 0.001), "fp16": Gate(0.999, 0.001), "bf16": Gate(0.999, 0.001), "int8": Gate(0.99, 0.005)}


@dataclass(frozen=True)
class HeldOut:
    """Texts that neither training nor calibration saw, with what the checkpoint makes of them in PyTorch fp32."""

    tokens: Sequence[Sequence[int]]
    labels: Sequence[str]
    names: Sequence[str]  # of the categories, in the order of the logits
    expected: Logits  # [texts, categories]


def accuracy(logits: Logits, held_out: HeldOut) -> dict[str, float]:
    """Return the agreement with the checkpoint, the macro-F1 and its loss, as shares, and the largest |Δlogit|."""
    scores = [
        score(held_out.labels, [held_out.names[i] for i in each.argmax(1)]) for each in (held_out.expected, logits)
    ]
    return {
        "agreement": float((logits.argmax(1) == held_out.expected.argmax(1)).mean()),
        "macro_f1": scores[1]["macro_f1"],
        "f1_loss": scores[0]["macro_f1"] - scores[1]["macro_f1"],
        "largest_logit_error": float(np.abs(logits - held_out.expected).max()),
    }


def predict(engine: Engine, tokens: Sequence[Sequence[int]], size: int = FULL_BATCH) -> Logits:
    """Return the engine's logits of texts, `size` a batch, in the order in which they come."""
    batches = [tokens[i : i + size] for i in range(0, len(tokens), size)]
    return np.concatenate([call(engine, batch) for batch in track(batches, "checking the engine")])


def call(engine: Engine, texts: Sequence[Sequence[int]]) -> Logits:
    return engine(np.concatenate([np.asarray(text) for text in texts]), np.array([len(text) for text in texts]))


def speed(run: Callable[[Sequence[Sequence[int]]], Any], tokens: Sequence[Sequence[int]]) -> dict[str, float]:
    """Return the median latency of one text in ms, and the texts per second of full batches in order of arrival."""
    run(tokens[:FULL_BATCH])  # warm-up
    one = _timed(run, [tokens[i : i + 1] for i in range(min(len(tokens), 256))])
    batches = [tokens[i : i + FULL_BATCH] for i in range(0, len(tokens) - FULL_BATCH + 1, FULL_BATCH)]
    full = _timed(run, batches or [tokens])
    return {
        "latency_ms": float(np.median([seconds for seconds, _ in one])) * 1e3,
        "texts_per_second": sum(texts for _, texts in full) / sum(seconds for seconds, _ in full),
    }


def _timed(
    run: Callable[[Sequence[Sequence[int]]], Any], batches: Sequence[Sequence[Sequence[int]]]
) -> list[tuple[float, int]]:
    """Return seconds and texts of each batch, as many as the time allows, one at least."""
    run(batches[0])
    start, times = time.perf_counter(), []
    for batch in batches:
        before = time.perf_counter()
        run(batch)
        times.append((time.perf_counter() - before, len(batch)))
        if time.perf_counter() - start > TIMED_SECONDS:
            break
    return times
