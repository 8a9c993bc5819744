"""The whole pipeline, end to end: sample catalogue, training, build, a real Triton, categories over gRPC."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from aisle.build.build import build
from aisle.client import Classifier
from aisle.console import say
from aisle.deploy.server.triton import ServerOptions, free_ports, running
from aisle.errors import InputError
from aisle.preprocess.tables.table import column, read_rows
from aisle.train.fit.train import TrainingSettings, train
from aisle.train.synthetic.catalogue import write_sample

TEXTS = Path(__file__).with_name("demo.jsonl")
EPOCHS = 4  # an epoch takes half a minute, because the sample's titles are short


def demo(work: Path, repository: Path, texts: Path, rows: int) -> dict[str, Any]:
    """Train and serve a model on the sample, and classify a file of texts. A checkpoint of an earlier run is reused.

    Args:
        work: the folder for the catalogue, the checkpoint and Triton's log.
        repository: the model repository to build into.
        texts: a table with the column `text`.
        rows: the number of titles in the catalogue.

    Returns the version and the predictions, each with the milliseconds of its call.

    Raises:
        InputError, ServerError, GateError: a stage failed.
    """
    to_classify = [text for (text,) in column(read_rows(texts), ["text"], texts)]
    if not to_classify:
        raise InputError(f"{texts} has no text to classify; give another table")
    table, checkpoint = work / f"sample-{rows}.csv", work / f"sample-{rows}"
    if not (checkpoint / "training.json").exists():
        say("1/4 writing a SYNTHETIC catalogue of product titles")
        write_sample(table, rows, seed=0)
        say("2/4 training a small BERT on it, from scratch")
        train(table, "text", "category", checkpoint, _settings(rows))
    say("3/4 compiling it for this CPU")
    version = build(checkpoint, repository)["version"]
    say("4/4 starting Triton and classifying texts")
    grpc_port, metrics_port = free_ports(2)
    options = ServerOptions(repository, grpc_port=grpc_port, metrics_port=metrics_port)
    with (work / "triton.log").open("wb") as log, running(options, log), Classifier(f"localhost:{grpc_port}") as server:
        server.classify(["warm-up"])
        predictions = [_classify(server, text or "") for text in to_classify]
    return {"version": version, "checkpoint": str(checkpoint), "synthetic": True, "predictions": predictions}


def _settings(rows: int) -> TrainingSettings:
    """Return the settings for a catalogue of `rows` titles. A small one needs small batches for enough steps."""
    return TrainingSettings(epochs=EPOCHS, batch_size=min(64, max(8, rows // 100)))


def _classify(server: Classifier, text: str) -> dict[str, Any]:
    """Classify one text. If the server refuses it, the result has the reason as `error` and no category."""
    start = time.perf_counter()
    try:
        answer = server.classify([text])[0]
    except InputError as error:
        return {"text": text, "category": None, "confidence": None, "milliseconds": None, "error": str(error)}
    milliseconds = (time.perf_counter() - start) * 1e3
    return {
        "text": text,
        "category": answer.category,
        "confidence": answer.confidence,
        "milliseconds": round(milliseconds, 2),
    }
