"""The gate: an engine is installed only if it agrees with the PyTorch fp32 checkpoint on held-out texts."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from aisle.build.engine import Engine
from aisle.console import track
from aisle.errors import InputError
from aisle.preprocess.label_sets import Flags, indicators
from aisle.train.core.decisions import Decisions
from aisle.train.core.heads import Heads, spans
from aisle.train.core.metrics import score, score_sets
from aisle.train.core.multi_label import Thresholds

Logits = npt.NDArray[np.float32]
FULL_BATCH = 64
TIMED_SECONDS = 3.0  # for each measured speed


class GateError(Exception):
    """The engine does not agree with the checkpoint; `row` holds the measurements. Exit code 3."""

    def __init__(self, message: str, row: dict[str, Any]) -> None:
        super().__init__(message)
        self.row = row


@dataclass(frozen=True)
class Gate:
    """Thresholds that an engine must meet, as shares from 0 to 1."""

    agreement: float  # smallest allowed agreement with the checkpoint's categories; see `accuracy`
    f1_loss: float  # largest allowed loss of macro-F1; of micro-F1, if the model is multi-label

    def passes(self, row: dict[str, Any]) -> bool:
        """Return whether the measurements of `accuracy` meet the thresholds."""
        good = row["agreement"] >= self.agreement and row["f1_loss"] <= self.f1_loss
        return bool(good and not row["not_finite"] and not self.failed_attributes(row))

    def failed_attributes(self, row: dict[str, Any]) -> dict[str, float]:
        """Return the attributes whose agreement is too low, and this agreement."""
        found: dict[str, float] = row.get("attributes", {})
        return {name: agreement for name, agreement in found.items() if not agreement >= self.agreement}

    def is_looser_than(self, other: Gate) -> bool:
        """Return whether either threshold is weaker than that of `other`."""
        return self.agreement < other.agreement or self.f1_loss > other.f1_loss


GATES = {
    **dict.fromkeys(("fp32", "fp16", "bf16"), Gate(0.999, 0.001)),
    **dict.fromkeys(("int8", "fp8"), Gate(0.99, 0.005)),
}


@dataclass(frozen=True)
class HeldOut:
    """Texts that neither training nor calibration saw, with the checkpoint's logits in PyTorch fp32."""

    tokens: Sequence[Sequence[int]]
    labels: Sequence[str]  # true categories or, if unknown, the checkpoint's own predictions
    names: Sequence[str]  # of the categories, in the order of the logits
    expected: Logits  # [texts, categories and, after them, the values of each further head]
    seen_in_training: int = 0  # number of these texts that training saw; above 0 only for small tables
    decisions: Decisions | None = None  # of the checkpoint
    thresholds: Thresholds | None = None  # of a multi-label checkpoint, whose labels are sets of categories
    heads: Heads = ()  # of the checkpoint

    def __post_init__(self) -> None:
        """Refuse a checkpoint whose own logits are NaN or infinite: nothing can be compared with it."""
        if not np.isfinite(self.expected).all():
            raise InputError(
                "the checkpoint's own logits are not finite: training diverged; train again with a lower learning rate"
            )


def accuracy(logits: Logits, held_out: HeldOut) -> dict[str, Any]:
    """Return agreement with the checkpoint, macro-F1 and its loss (shares from 0 to 1), and the largest |Δlogit|.

    `decision_agreement`, if the checkpoint has decisions, is the share of texts with the same decision; it is no gate.

    For a multi-label model, see `_set_accuracy`. `attributes` are the agreements of further heads.

    A text with a logit that is not finite is counted in `not_finite` and never agrees. One such text fails the gate.
    """
    finite = np.isfinite(logits).all(axis=1)
    logits = np.where(finite[:, None], logits, 0)
    measure = _set_accuracy if held_out.thresholds else _category_accuracy
    categories = slice(0, len(held_out.names))
    own = replace(held_out, expected=held_out.expected[:, categories])
    return {
        **measure(logits[:, categories], finite, own),
        **({"attributes": _attribute_agreement(logits, finite, held_out)} if held_out.heads else {}),
        "not_finite": int((~finite).sum()),
        "seen_in_training": held_out.seen_in_training,
        "largest_logit_error": float(np.abs(logits - held_out.expected)[finite].max(initial=0.0)),
    }


def _attribute_agreement(logits: Logits, finite: Flags, held_out: HeldOut) -> dict[str, float]:
    """Return the share of texts to which engine and checkpoint give the same value, for each attribute."""
    found = {}
    for head, place in zip(held_out.heads, spans(len(held_out.names), held_out.heads), strict=True):
        same = held_out.expected[:, place].argmax(axis=1) == logits[:, place].argmax(axis=1)
        found[head.name] = float((finite & same).mean())
    return found


def _category_accuracy(logits: Logits, finite: Flags, held_out: HeldOut) -> dict[str, float]:
    """Return what `accuracy` measures of one category per text."""
    best = [each.argmax(1) for each in (held_out.expected, logits)]
    named = [[held_out.names[i] for i in each] for each in best]
    named[1] = [name if known else "" for name, known in zip(named[1], finite, strict=True)]
    scores = [score(held_out.labels, names) for names in named]
    agreement = {"agreement": float((finite & (best[0] == best[1])).mean())}
    if held_out.decisions:
        agreement["decision_agreement"] = _same_decisions(held_out.decisions, held_out.expected, logits, finite)
    macro_f1 = [each["macro_f1"] for each in scores]
    return {**agreement, "macro_f1": macro_f1[1], "f1_loss": macro_f1[0] - macro_f1[1]}


def _set_accuracy(logits: Logits, finite: Flags, held_out: HeldOut) -> dict[str, float]:
    """Return what `accuracy` measures of the sets of categories that a multi-label model gives.

    `agreement` is the mean over the texts of the shared part of both sets: the categories that both give, of those that
    either gives (Jaccard). It is 1 if the sets are equal. `same_sets` is the share of texts with equal sets. `f1_loss`
    is the loss of micro-F1.
    """
    assert held_out.thresholds
    assigned = [held_out.thresholds.apply(each) for each in (held_out.expected, logits)]
    before, now = assigned[0].reached, assigned[1].reached
    now &= finite[:, None]
    either = (before | now).sum(axis=1)
    shared = np.where(either, (before & now).sum(axis=1) / np.maximum(either, 1), 1.0)
    actual = indicators(held_out.labels, held_out.names)
    scores = [score_sets(actual, each, held_out.names) for each in assigned]
    return {
        "agreement": float((shared * finite).mean()),
        "same_sets": float(((before == now).all(axis=1) & finite).mean()),
        **{name: scores[1][name] for name in ("micro_f1", "macro_f1")},
        "f1_loss": scores[0]["micro_f1"] - scores[1]["micro_f1"],
    }


def _same_decisions(decisions: Decisions, expected: Logits, logits: Logits, finite: Flags) -> float:
    """Return the share of texts that get the same decision and category from the engine as from the checkpoint."""
    before, now = decisions.apply(expected), decisions.apply(logits)
    return float((finite & (before.outcome == now.outcome) & (before.category == now.category)).mean())


def check_finite(graph: nn.Module, precision: str) -> None:
    """Make sure that all weights are finite in their type: the largest fp16 number is 65,504.

    Raises:
        InputError: a weight is not finite; the message names it.
    """
    for name, weight in graph.state_dict().items():
        if not torch.isfinite(weight).all():
            raise InputError(f"{precision} cannot hold the weights of {name}: give --precision bf16 or fp32")


def predict(engine: Engine, tokens: Sequence[Sequence[int]], size: int = FULL_BATCH) -> Logits:
    """Return the engine's logits of texts, `size` in a batch, in order."""
    batches = [tokens[i : i + size] for i in range(0, len(tokens), size)]
    return np.concatenate([run_engine(engine, batch) for batch in track(batches, "checking the engine")])


def run_engine(engine: Engine, texts: Sequence[Sequence[int]]) -> Logits:
    """Return the engine's logits [texts, labels] of one batch of token ids."""
    return engine(np.concatenate([np.asarray(text) for text in texts]), np.array([len(text) for text in texts]))


def speed(run: Callable[[Sequence[Sequence[int]]], Any], tokens: Sequence[Sequence[int]]) -> dict[str, float]:
    """Return the median latency of one text in ms, and texts per second with full batches in the given order."""
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
    """Return (seconds, texts) of each batch: as many as fit in `TIMED_SECONDS`, at least one."""
    run(batches[0])
    start, times = time.perf_counter(), []
    for batch in batches:
        before = time.perf_counter()
        run(batch)
        times.append((time.perf_counter() - before, len(batch)))
        if time.perf_counter() - start > TIMED_SECONDS:
            break
    return times
