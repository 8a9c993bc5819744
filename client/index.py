"""Search by meaning: an index over the embeddings of a file, and the rows of it that are most similar to a text."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from aisle.client.embedding import MODEL
from aisle.client.wire import shortened
from aisle.errors import InputError
from aisle.extras import install
from aisle.files import put_in_place, write_json
from aisle.preprocess.tables.columnar import load_pyarrow, open_parquet
from aisle.preprocess.tables.writing import file_format, replacing, write_rows

EXACT = 50_000  # vectors; above, an exact search takes longer than a classification, and a graph is searched instead
NEIGHBOURS = 32  # of each vector in the graph
BUILD_EFFORT, SEARCH_EFFORT = 200, 128  # candidates that are looked at; at least
INDEX, ROWS, ABOUT = "index.faiss", "rows.parquet", "index.json"
BLOCK = 1024  # rows that are compared with all at once
Vectors = npt.NDArray[np.float32]
Track = Callable[[Sequence[int]], Iterable[int]]


class Hit(NamedTuple):
    """A row of the indexed file."""

    row: int  # from 0
    text: str
    similarity: float  # cosine, from -1 to 1


def build_index(source: Path, out: Path) -> dict[str, Any]:
    """Index the embeddings of a file that `aisle embed` wrote as Parquet; write the folder `out`.

    Up to `EXACT` vectors are searched exactly; more of them by a graph of neighbours, which misses a few (Malkov and
    Yashunin 2018, "HNSW", arXiv:1603.09320). Rows without an embedding are left out.

    Raises:
        InputError: the file is not one of embeddings, it has none, or faiss is not installed.
    """
    faiss = _faiss()
    if out.exists() and not (out / ABOUT).is_file():
        raise InputError(f"{out} exists and is no index; choose another output")
    model, vectors, rows = _read(source)
    index: Any = faiss.IndexFlatIP(vectors.shape[1])
    if len(vectors) > EXACT:
        index = faiss.IndexHNSWFlat(vectors.shape[1], NEIGHBOURS, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = BUILD_EFFORT
    index.add(vectors)
    kind = "exact" if len(vectors) <= EXACT else "HNSW"
    about = {"model": model, "rows": len(vectors), "size": vectors.shape[1], "kind": kind, "source": source.name}
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as work:
        folder = Path(work, "index")
        folder.mkdir()
        faiss.write_index(index, str(folder / INDEX))
        load_pyarrow().parquet.write_table(rows, folder / ROWS)
        write_json(folder / ABOUT, about)
        put_in_place(folder, out)
    return {**about, "output": str(out)}


class Pair(NamedTuple):
    """Two rows of the indexed file that are similar."""

    row: int  # from 0; the smaller one
    text: str
    other_row: int
    other_text: str
    similarity: float  # cosine


class Index:
    """An index that `build_index` wrote. An exact one is read from the disk as it is needed."""

    def __init__(self, folder: Path) -> None:
        """Open an index.

        Raises:
            InputError: the folder holds none, or it is damaged; or faiss is not installed.
        """
        faiss = _faiss()
        try:
            self.about: dict[str, Any] = json.loads((folder / ABOUT).read_text("utf-8"))
            kind, count, _ = (self.about[name] for name in ("kind", "rows", "model"))
            flags = faiss.IO_FLAG_MMAP if kind == "exact" else 0
            self._index: Any = faiss.read_index(str(folder / INDEX), flags)
            rows = open_parquet(folder / ROWS, folder / ROWS).read()
            self._rows, self._texts = rows.column("row"), rows.column("text")
        except FileNotFoundError as error:
            raise InputError(
                f"{folder} holds no index: {error.filename} is missing; make one with aisle index"
            ) from None
        except (OSError, ValueError, TypeError, KeyError, RuntimeError):  # of JSON, faiss and Parquet
            raise InputError(f"{folder} holds no index that can be read: make it again with aisle index") from None
        if not len(rows) == self._index.ntotal == count:
            raise InputError(f"{folder} is damaged: its files do not belong together; make it again with aisle index")

    def check_model(self, fingerprint: str) -> Self:
        """Check that vectors of this model can be compared with those of the index.

        Raises:
            InputError: the index was made with another model.
        """
        if fingerprint != self.about["model"]:
            raise InputError(
                f"the index was made with model {self.about['model']}, but {fingerprint or 'an unknown one'} answers; "
                "embed and index the file again"
            )
        return self

    def search(self, vectors: Vectors, k: int) -> list[list[Hit]]:
        """Return the `k` rows that are most similar to each vector, the most similar first.

        Args:
            vectors: [n, size], of length 1, as `Classifier.embed` returns them. Longer ones than those of the index
                are shortened.

        Raises:
            InputError: the vectors are shorter.
        """
        if vectors.shape[1] < self._index.d:
            raise InputError(f"the index has vectors of {self._index.d} numbers, not {vectors.shape[1]}")
        similarity, numbers = self._nearest(shortened(vectors, self._index.d), k)
        return [list(self._hits(*each)) for each in zip(similarity, numbers, strict=True)]

    def pairs(self, least: float, nearest: int, track: Track = lambda starts: starts) -> tuple[list[Pair], int]:
        """Return each two rows whose similarity is `least` or more, the most similar first.

        Also returns the number of rows that may have more such rows than were looked at.

        Args:
            nearest: other rows that are looked at for each row. A pair is found if one of its rows is among the nearest
                of the other.
            track: wraps the blocks of rows, to show progress.
        """
        count, found, full = self._index.ntotal, dict[tuple[int, int], float](), 0
        for start in track(range(0, count, BLOCK)):
            vectors = self._index.reconstruct_n(start, min(BLOCK, count - start))
            similarity, numbers = self._nearest(vectors, nearest + 1)  # a row is the nearest of itself
            own = np.arange(start, start + len(vectors))[:, None]
            full += int((similarity >= least).all(axis=1).sum()) if nearest + 1 < count else 0
            for i, j in np.argwhere((similarity >= least) & (numbers != own) & (numbers >= 0)).tolist():
                pair = sorted((start + i, int(numbers[i, j])))
                found[pair[0], pair[1]] = float(similarity[i, j])
        ordered = sorted(found, key=lambda pair: (-found[pair], pair))
        pairs = [Pair(*self._row(one), *self._row(other), min(found[one, other], 1.0)) for one, other in ordered]
        return pairs, full

    def _row(self, number: int) -> tuple[int, str]:
        """Return the row of a vector in the indexed file, and its text."""
        return self._rows[number].as_py(), self._texts[number].as_py()

    def _nearest(self, vectors: Vectors, k: int) -> tuple[Vectors, npt.NDArray[np.int64]]:
        """Return similarity and number of the `k` nearest vectors, each [n, k]; -1 where a graph finds fewer."""
        k = min(k, self._index.ntotal)
        if self.about["kind"] == "HNSW":
            self._index.hnsw.efSearch = max(SEARCH_EFFORT, 2 * k)
        similarity, numbers = self._index.search(np.ascontiguousarray(vectors, np.float32), k)
        return similarity, numbers

    def _hits(self, similarity: Vectors, numbers: Sequence[int]) -> Iterator[Hit]:
        for value, number in zip(similarity.tolist(), numbers, strict=True):
            if number >= 0:  # a graph may find fewer than were asked for
                yield Hit(*self._row(int(number)), value)


def find_duplicates(
    folder: Path, out: Path, similarity: float, nearest: int, track: Track = lambda starts: starts
) -> dict[str, Any]:
    """Write the pairs of an index's rows that are so similar to a table; the arguments are those of `Index.pairs`.

    Raises:
        InputError: the folder holds no index, or the table cannot be written.
    """
    kind = file_format(out)  # fails early if the name cannot be written
    opened = Index(folder)
    pairs, full = opened.pairs(similarity, nearest, track)
    try:
        with replacing(out) as writing:
            write_rows(writing, lambda: (pair._asdict() for pair in pairs), [*Pair._fields], kind)
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror or error}") from None
    return {
        "pairs": len(pairs),
        "rows": opened.about["rows"],
        "rows_with_more": full,
        "similarity": similarity,
        "output": str(out),
    }


def _read(source: Path) -> tuple[str, Vectors, Any]:
    """Return the model's fingerprint, the vectors [rows, size], and a table of their row numbers and texts.

    Raises:
        InputError: the file is not one of embeddings, it has none, or they are damaged.
    """
    file = open_parquet(source, source)
    model = (file.schema_arrow.metadata or {}).get(MODEL)
    if model is None:
        raise InputError(f"{source} has no embeddings; make them with: aisle embed FILE -o {source}")
    table = file.read(columns=["row", "text", "embedding"])
    table = table.filter(table.column("embedding").is_valid())
    if not len(table):
        raise InputError(f"{source}: no row has an embedding")
    embeddings = table.column("embedding").combine_chunks()
    flat = embeddings.flatten().to_numpy(zero_copy_only=False)  # a null becomes NaN
    if len(embeddings.value_lengths().unique()) > 1 or not np.isfinite(flat).all():
        raise InputError(f"{source}: its embeddings are damaged; embed the file again")
    return model.decode(), flat.reshape(len(table), -1), table.select(["row", "text"])


def _faiss() -> Any:
    try:
        import faiss
    except ImportError:
        raise InputError(f"an index needs an extra: {install('index')}") from None
    return faiss
