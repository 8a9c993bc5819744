"""Embed a whole file: one vector for each row, in order and in constant memory. A bad row does not affect others."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from aisle.client.bulk import Track, check_fields, scan_source, usable
from aisle.client.classifier import Classifier
from aisle.client.protocol import Embedding, Failure
from aisle.client.wire import check_one_version
from aisle.errors import InputError
from aisle.preprocess.tables.columnar import load_pyarrow
from aisle.preprocess.tables.passthrough import encodable
from aisle.preprocess.tables.table import read_rows
from aisle.preprocess.tables.writing import refuse_same, replacing

MODEL = b"aisle.model"  # the key of the model's fingerprint in the Parquet file's metadata
GROUP = 4096  # rows that are written at once


class EmbeddedRow(NamedTuple):
    text: str | None
    values: npt.NDArray[np.float32] | None  # [size]
    error: str | None


Write = Callable[[Sequence[EmbeddedRow]], None]


def embed_file(
    classifier: Classifier,
    source: Path,
    out: Path,
    text_column: str,
    track: Track = lambda rows, _: rows,
    *,
    size: int | None = None,
) -> dict[str, Any]:
    """Write the embedding of each row of `source` to `out`.

    A `.parquet` file has the columns `row` (from 0), `text`, `embedding` and `error`, and knows its model. A `.npy`
    file has an array [rows, size] in fp32, with NaN in rows without a usable text.

    Args:
        size: as in `Classifier.embed`.

    Raises:
        InputError: the file cannot be read, the output cannot be written, or the model has no embeddings.
        Unavailable, ClassifierError: the server failed, or another version went live meanwhile. Nothing is written.
    """
    if out.suffix not in WRITERS:
        raise InputError(f"{out}: embeddings are written as {' or '.join(WRITERS)}")
    refuse_same(source, out)
    start = time.perf_counter()
    columns, total = scan_source(source, text_column, None)
    check_fields(text_column, columns, classifier.models(bulk=True).fields)
    (probe,) = classifier.stream_embeddings(["probe"], size=size)
    if isinstance(probe, Failure):
        raise InputError(probe.message)
    model = classifier.fingerprints(bulk=True).get(probe.version, "")
    size, errors = len(probe.values), 0
    rows = iter(track(_rows(classifier, source, text_column, probe.version, size), total))
    with replacing(out) as writing, WRITERS[out.suffix](writing, total, size, model) as write:
        while group := list(itertools.islice(rows, GROUP)):
            write(group)
            errors += sum(row.error is not None for row in group)
    seconds = time.perf_counter() - start
    return {
        "rows": total,
        "size": size,
        "errors": errors,
        "version": probe.version,
        "model": model,
        "seconds": round(seconds, 3),
        "texts_per_second": round(total / seconds, 1),
        "output": str(out),
    }


def _rows(classifier: Classifier, source: Path, text_column: str, version: int, size: int) -> Iterator[EmbeddedRow]:
    """Yield each row's text with its embedding, or with the reason why it has none."""
    sent: deque[tuple[str | None, Failure | None]] = deque()

    def texts() -> Iterable[str | None]:
        for row in read_rows(source):
            sent.append(usable(row, text_column))
            yield sent[-1][0]

    for answer in classifier.stream_embeddings(texts(), size=size):
        text, fault = sent.popleft()
        if isinstance(answer, Embedding):
            check_one_version({version, answer.version})
            yield EmbeddedRow(text, answer.values, None)
        else:
            yield EmbeddedRow(text and encodable(text), None, (fault or answer).message)


@contextmanager
def _parquet(path: Path, total: int, size: int, model: str) -> Iterator[Write]:
    arrow = load_pyarrow()
    vector = arrow.list_(arrow.float32())  # with a fixed size, Parquet cannot hold missing ones
    fields = [("row", arrow.int64()), ("text", arrow.string()), ("embedding", vector), ("error", arrow.string())]
    schema = arrow.schema(fields, metadata={MODEL: model.encode()})
    done = 0
    with arrow.parquet.ParquetWriter(path, schema) as file:

        def write(rows: Sequence[EmbeddedRow]) -> None:
            nonlocal done
            numbers = range(done, done + len(rows))
            done += len(rows)
            texts, values, errors = zip(*rows, strict=True)
            file.write_table(arrow.table([numbers, texts, values, errors], schema=schema))

        yield write


@contextmanager
def _npy(path: Path, total: int, size: int, model: str) -> Iterator[Write]:
    array: Any = np.lib.format.open_memmap(  # type: ignore[no-untyped-call]
        path, "w+", np.float32, (total, size)
    )
    done = 0

    def write(rows: Sequence[EmbeddedRow]) -> None:
        nonlocal done
        for row in rows:
            array[done] = np.nan if row.values is None else row.values
            done += 1

    yield write
    array.flush()


WRITERS = {".parquet": _parquet, ".npy": _npy}
