"""The whole way, end to end: sample catalogue, training, build, a real Triton, categories over gRPC."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from aisle.build.build import build
from aisle.client import Classifier
from aisle.console import say
from aisle.deploy.triton import Options, free_ports, running
from aisle.preprocess.table import read_rows
from aisle.train.catalogue import write_sample
from aisle.train.train import Settings, train

TEXTS = Path(__file__).with_name("demo.jsonl")
ROWS = 16000
EPOCHS = 4  # the sample's titles are short, an epoch takes half a minute


def demo(work: Path, repository: Path, texts: Path) -> dict[str, Any]:
    """Classify a file of texts with a model made on the spot; what an earlier run made is used again.

    Returns the predictions, each with the milliseconds that its call took, and how good the model is.

    Raises:
        InputError, ServerError, GateError: as the stages.
    """
    table, checkpoint = work / "sample.csv", work / "sample"
    if not (checkpoint / "training.json").exists():
        say("1/4 writing a SYNTHETIC catalogue of product titles")
        write_sample(table, ROWS, seed=0)
        say("2/4 training a small BERT on it, from scratch")
        train(table, "text", "category", checkpoint, Settings(epochs=EPOCHS))
    say("3/4 compiling it for this CPU")
    version = build(checkpoint, repository)["version"]
    say("4/4 starting Triton and asking it")
    grpc_port, metrics_port = free_ports(2)
    options = Options(repository, grpc_port=grpc_port, metrics_port=metrics_port)
    rows = []
    with (work / "triton.log").open("wb") as log, running(options, log), Classifier(f"localhost:{grpc_port}") as server:
        server.classify(["warm-up"])
        for row in read_rows(texts):
            start = time.perf_counter()
            answer = server.classify([row["text"]])[0]
            milliseconds = (time.perf_counter() - start) * 1e3
            rows.append(
                {
                    "text": row["text"],
                    "category": answer.category,
                    "confidence": answer.confidence,
                    "milliseconds": round(milliseconds, 2),
                }
            )
    return {"version": version, "checkpoint": str(checkpoint), "synthetic": True, "predictions": rows}
