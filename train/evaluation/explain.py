"""Explain: which words of a text decided its category."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aisle.client import Prediction
from aisle.errors import InputError
from aisle.preprocess.clean import prepare
from aisle.train.core.checkpoint import Checkpoint
from aisle.train.evaluation.attribution import Attribution, Reading, Weights, attribute, read
from aisle.train.evaluation.predictors import CheckpointPredictor, open_predictor


def explain(
    texts: Sequence[str], *, checkpoint: Path | None = None, url: str = "", report: Path | None = None
) -> dict[str, Any]:
    """Explain the category of each text: by integrated gradients from a checkpoint, by occlusion through a server.

    With both, the server gives the category. `report` is the HTML page to write.

    Raises:
        InputError: a text cannot be classified, neither checkpoint nor server is given, or the two do not match.
        ServerError: the server failed.
    """
    if not texts:
        raise InputError("give a text to explain, or a table with --check")
    prepared = [prepare(text) for text in texts]
    source = Checkpoint(checkpoint) if checkpoint else None
    if source:
        source.check_one_category("aisle explain")
    local = CheckpointPredictor(source) if source else None
    with open_predictor(local, url) as predictor:
        readings = [read(text, local.tokenizer if local else None) for text in prepared]
        if source:
            _check_one_window(readings, source)
        predictions, weights, attributions = attribute(readings, local, predictor)
    result = {
        "checkpoint": str(checkpoint) if checkpoint else None,
        "url": url or None,
        "methods": list(weights),
        "explanations": explanations(readings, predictions, weights, attributions),
    }
    if report:
        from aisle.train.evaluation.explanation_report import write_explanations

        write_explanations(result, report)
    return result


def _check_one_window(readings: Sequence[Reading], checkpoint: Checkpoint) -> None:
    """Check that the model reads each text at once.

    Raises:
        InputError: a text has several windows, which integrated gradients do not explain together.
    """
    most = checkpoint.tokenizer.max_tokens
    if long := next((each for each in readings if len(each.tokens) > most), None):
        raise InputError(
            f"{long.text[:40]!r}… has more than the {most} tokens of a window; explain it through a server alone: --url"
        )


def explanations(
    readings: Sequence[Reading],
    predictions: Sequence[Prediction],
    weights: dict[str, Weights],
    attributions: Sequence[Attribution],
) -> list[dict[str, Any]]:
    """Return the explanation of each text: its category, its words with their weights, and the completeness."""
    found = []
    for i, (reading, prediction) in enumerate(zip(readings, predictions, strict=True)):
        words = [
            {
                "word": reading.text[start:end],
                "start": start,
                "end": end,
                **{method: of_texts[i][number] for method, of_texts in weights.items()},
            }
            for number, (start, end) in enumerate(reading.words)
        ]
        found.append(
            {
                "text": reading.text,
                "unread_characters": reading.unread,
                "category": prediction.category,
                "confidence": prediction.confidence,
                "words": words,
            }
        )
        if attributions:
            each = attributions[i]
            found[-1]["completeness"] = {
                "log_probability": each.value,
                "baseline": each.baseline,
                "sum": sum(each.weights),
                "gap": each.gap,
            }
    return found
