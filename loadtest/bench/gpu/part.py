"""part.py NAME SETTINGS OUT: measure one part, and append each row to OUT at once."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from aisle.loadtest.bench.gpu import engines, service, training
from aisle.loadtest.bench.gpu.engines import Bench, Row

MEASURES: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "fixtures": engines.fixtures,
    "peaks": engines.peaks,
    "flat-fp16": engines.flat("fp16"),
    "flat-bf16": engines.flat("bf16"),
    "flat-fp8": engines.flat("fp8"),
    "padded": engines.padded,
    "padded-compiled": engines.padded_compiled,
    "packed": engines.packed,
    "versions": engines.versions,
    "load-fp16": engines.load("fp16"),
    "load-fp8": engines.load("fp8"),
    "service-fp16": service.served("fp16"),
    "service-fp8": service.served("fp8"),
    "train": training.train,
    "sentence-transformers": service.sentence_transformers,
    "dynamic-batching": service.dynamic_batching,
}


def main() -> None:
    name, settings, out = sys.argv[1], json.loads(sys.argv[2]), Path(sys.argv[3])
    for row in MEASURES[name](Bench(settings)):
        with out.open("a") as file:
            file.write(json.dumps({"part": name, **row}) + "\n")


if __name__ == "__main__":
    main()
