"""Classify a table in constant memory: one JSON object per row, with an error if the text is bad."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from aisle.client import Classifier, Failure
from aisle.preprocess.tables.table import read_rows

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("table", type=Path, help="CSV, TSV, JSONL or Parquet with a column `text`")
parser.add_argument("output", type=Path)
parser.add_argument("--url", default="localhost:8001")
options = parser.parse_args()


def texts() -> Iterator[str | None]:
    for row in read_rows(options.table):
        yield row["text"]


bad = rows = 0
with Classifier(options.url) as classifier, options.output.open("w", encoding="utf-8") as file:
    for answer in classifier.stream(texts()):
        rows += 1
        if isinstance(answer, Failure):
            bad += 1
            line: dict[str, str | float] = {"error": answer.message}
        else:
            line = {"category": answer.category, "confidence": round(answer.confidence, 4)}
        file.write(json.dumps(line, ensure_ascii=False) + "\n")
print(f"{rows} rows, {bad} of them bad; see {options.output}")
