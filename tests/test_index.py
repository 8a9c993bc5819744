"""Indexes over embeddings: exact and by a graph, with the real server's vectors and with random ones."""

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow
import pyarrow.parquet
import pytest

from aisle.client import Classifier, index
from aisle.client.embedding import MODEL, embed_file
from aisle.client.index import Index, build_index
from aisle.errors import InputError
from tests.conftest import Server, aisle


def random_vectors(count: int, seed: int = 0) -> npt.NDArray[np.float32]:
    """Return vectors of length 1 in 50 clusters, as texts of categories are."""
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(50, 32))[rng.integers(0, 50, count)] + 0.5 * rng.normal(size=(count, 32))
    unit: npt.NDArray[np.float32] = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    return unit


def write_vectors(path: Path, vectors: npt.NDArray[np.float32], model: str = "a1") -> None:
    columns = {
        "row": range(len(vectors)),
        "text": [f"text {row}" for row in range(len(vectors))],
        "embedding": pyarrow.array(list(vectors), pyarrow.list_(pyarrow.float32())),
    }
    table = pyarrow.table(columns).replace_schema_metadata({MODEL: model})
    pyarrow.parquet.write_table(table, path)


@pytest.mark.parametrize("kind", ["exact", "HNSW"])
def test_the_most_similar_rows_are_found(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, asked = random_vectors(3000), random_vectors(50, seed=1)
    write_vectors(tmp_path / "vectors.parquet", vectors)
    monkeypatch.setattr(index, "EXACT", {"exact": 3000, "HNSW": 2999}[kind])
    assert build_index(tmp_path / "vectors.parquet", tmp_path / "index")["kind"] == kind
    opened = Index(tmp_path / "index")
    expected = np.argsort(-(asked @ vectors.T), axis=1)[:, :10]
    found = opened.search(asked, 10)
    shares = [
        len({hit.row for hit in hits} & {*best}) / 10 for hits, best in zip(found, expected.tolist(), strict=True)
    ]
    assert np.mean(shares) >= {"exact": 1.0, "HNSW": 0.95}[kind]
    first = found[0][0]
    assert first.text == f"text {first.row}"
    assert first.similarity == pytest.approx(float(asked[0] @ vectors[first.row]), abs=1e-5)
    assert len(opened.search(asked[:1], 9999)[0]) <= 3000
    longer = np.concatenate([asked * 0.6, np.full_like(asked, 0.1)], axis=1)  # is shortened to the index's size
    assert opened.search(longer[:1], 10)[0][0].row == first.row


def test_similar_texts_are_found_through_the_server(server: Server, classifier: Classifier, tmp_path: Path) -> None:
    table = tmp_path / "table.jsonl"
    texts = [*(f"红富士苹果 {number}斤" for number in range(5)), "", "usb c cable 2m", "蓝牙耳机 降噪"]
    table.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    embed_file(classifier, table, tmp_path / "vectors.parquet", "text")
    done = aisle("index", tmp_path / "vectors.parquet", "-o", tmp_path / "index", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"] == 7  # without the empty text
    done = aisle("similar", "usb c cable 2m", "--index", tmp_path / "index", "-k", 2, "--url", server.url, "--json")
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout)["similar"]
    assert (found["hits"][0]["row"], found["hits"][0]["text"]) == (6, "usb c cable 2m")
    assert found["hits"][0]["similarity"] == pytest.approx(1, abs=1e-3)
    assert "usb c cable" in aisle("similar", "usb", "--index", tmp_path / "index", "--url", server.url).stdout


def test_an_index_of_another_model_is_refused(server: Server, tmp_path: Path) -> None:
    write_vectors(tmp_path / "vectors.parquet", random_vectors(10), "another")
    build_index(tmp_path / "vectors.parquet", tmp_path / "index")
    done = aisle("similar", "usb", "--index", tmp_path / "index", "--url", server.url)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "was made with model another" in done.stderr
    with pytest.raises(InputError, match="vectors of 32 numbers, not 3"):
        Index(tmp_path / "index").search(np.ones((1, 3), np.float32), 1)


def test_an_index_replaces_only_an_index(tmp_path: Path) -> None:
    write_vectors(tmp_path / "vectors.parquet", random_vectors(10))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="is no index"):
        build_index(tmp_path / "vectors.parquet", tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").exists()
    build_index(tmp_path / "vectors.parquet", tmp_path / "index")
    write_vectors(tmp_path / "vectors.parquet", random_vectors(20))
    build_index(tmp_path / "vectors.parquet", tmp_path / "index")
    assert Index(tmp_path / "index").about["rows"] == 20
    assert {each.name for each in tmp_path.iterdir()} == {"vectors.parquet", "mine", "index"}


def test_damaged_embeddings_are_refused(tmp_path: Path) -> None:
    """A NaN would make its row impossible to find, in silence."""
    whole = [row.tolist() for row in random_vectors(3)]
    for damaged in ([float("nan"), *whole[0][1:]], [None, *whole[0][1:]], whole[0][1:]):
        embeddings = pyarrow.array([damaged, *whole[1:]], pyarrow.list_(pyarrow.float32()))
        table = pyarrow.table({"row": range(3), "text": ["a", "b", "c"], "embedding": embeddings})
        pyarrow.parquet.write_table(table.replace_schema_metadata({MODEL: "a1"}), tmp_path / "vectors.parquet")
        with pytest.raises(InputError, match="its embeddings are damaged"):
            build_index(tmp_path / "vectors.parquet", tmp_path / "index")
    write_vectors(tmp_path / "vectors.parquet", random_vectors(3))
    build_index(tmp_path / "vectors.parquet", tmp_path / "index")
    pyarrow.parquet.write_table(pyarrow.table({"other": [1, 2, 3]}), tmp_path / "index" / "rows.parquet")
    with pytest.raises(InputError, match="no index that can be read"):
        Index(tmp_path / "index")


def test_other_files_are_refused(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "table.parquet")
    with pytest.raises(InputError, match="has no embeddings; make them with: aisle embed"):
        build_index(tmp_path / "table.parquet", tmp_path / "index")
    (tmp_path / "text.parquet").write_text("text")
    with pytest.raises(InputError, match="not a Parquet file"):
        build_index(tmp_path / "text.parquet", tmp_path / "index")
    with pytest.raises(InputError, match="holds no index"):
        Index(tmp_path)
    write_vectors(tmp_path / "vectors.parquet", random_vectors(10))
    for name, content in (("index.json", b"[]"), ("index.json", b'{"kind": "exact"}'), ("index.faiss", b"damaged")):
        build_index(tmp_path / "vectors.parquet", tmp_path / "index")
        (tmp_path / "index" / name).write_bytes(content)
        with pytest.raises(InputError, match="holds no index"):
            Index(tmp_path / "index")


@pytest.mark.parametrize("kind", ["exact", "HNSW"])
def test_pairs_are_those_of_a_comparison_of_all_with_all(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = random_vectors(1500)
    vectors[700] = vectors[3]
    write_vectors(tmp_path / "vectors.parquet", vectors)
    monkeypatch.setattr(index, "EXACT", {"exact": 1500, "HNSW": 1499}[kind])
    monkeypatch.setattr(index, "BLOCK", 400)
    build_index(tmp_path / "vectors.parquet", tmp_path / "index")
    found, more = Index(tmp_path / "index").pairs(0.9, 30)
    similar = np.triu(vectors @ vectors.T, 1)
    expected = {(int(row), int(other)) for row, other in np.argwhere(similar >= 0.9)}
    rows = [(pair.row, pair.other_row) for pair in found]
    assert len(expected) > 50
    assert len(rows) == len(set(rows))
    assert set(rows) <= expected
    assert len(rows) >= {"exact": 1.0, "HNSW": 0.95}[kind] * len(expected)
    assert rows[0] == (3, 700)
    assert found[0].similarity == pytest.approx(1, abs=1e-5)
    assert [pair.similarity for pair in found] == sorted((pair.similarity for pair in found), reverse=True)
    assert found[1].text == f"text {found[1].row}"
    assert more == 0
    fewer, more = Index(tmp_path / "index").pairs(0.9, 1)
    assert len(fewer) < len(expected)
    assert more == sum(1 for row in range(1500) if (similar[row] >= 0.9).any() or (similar[:, row] >= 0.9).any())


def test_duplicates_are_listed_by_command(tmp_path: Path) -> None:
    vectors = random_vectors(40)
    vectors[9] = vectors[2]
    write_vectors(tmp_path / "vectors.parquet", vectors)
    build_index(tmp_path / "vectors.parquet", tmp_path / "index")
    out = tmp_path / "pairs.csv"
    done = aisle("duplicates", tmp_path / "index", "-o", out, "--similarity", 0.999, "--json")
    assert done.returncode == 0, done.stderr
    result = {"pairs": 1, "rows": 40, "rows_with_more": 0, "similarity": 0.999, "output": str(out)}
    assert json.loads(done.stdout) == result
    assert out.read_text("utf-8").splitlines() == ["row,text,other_row,other_text,similarity", "2,text 2,9,text 9,1.0"]
    done = aisle("duplicates", tmp_path, "-o", out)
    assert (done.returncode, "holds no index" in done.stderr) == (2, True)
    done = aisle("duplicates", tmp_path / "index", "-o", tmp_path / "pairs.npy")
    assert (done.returncode, "unknown file format" in done.stderr) == (2, True)


def test_too_many_pairs_are_told(tmp_path: Path) -> None:
    """Of 30 equal rows, each has more equal ones than are looked at; and no search was learnt."""
    write_vectors(tmp_path / "vectors.parquet", np.repeat(random_vectors(1), 30, axis=0))
    build_index(tmp_path / "vectors.parquet", tmp_path / "index")
    done = aisle("duplicates", tmp_path / "index", "-o", tmp_path / "pairs.csv", "--nearest", 5)
    assert done.returncode == 0
    assert "30 rows may have more similar rows than the 5 nearest; raise --nearest" in done.stderr
    assert "more pairs than rows: raise --similarity" in done.stderr
