import itertools
from collections import Counter
from pathlib import Path

from aisle.preprocess.clean import clean_rows
from aisle.preprocess.table import read_labelled
from aisle.train.catalogue import LEAVES, generate, labels, write_sample


def test_taxonomy() -> None:
    assert len(set(labels())) == len(LEAVES) >= 40
    for leaf in LEAVES:
        assert len(leaf["path"]) == len(leaf["path_en"]) == 3
        for words in ("nouns", "nouns_en", "attributes", "attributes_en", "units"):
            assert leaf[words]


def test_a_seed_repeats_the_sample() -> None:
    assert list(generate(500, seed=3)) == list(generate(500, seed=3)) != list(generate(500, seed=4))
    assert list(itertools.islice(generate(500, seed=3), 100)) == list(generate(100, seed=3))


def test_the_sample_has_all_the_faults_of_real_catalogues(tmp_path: Path) -> None:
    path = tmp_path / "sample.csv"
    assert write_sample(path, 20_000, seed=0)["synthetic"] is True
    rows = list(read_labelled(path, "text", "category"))
    texts = [text or "" for text, _ in rows]
    for fault in ("<b>", "&amp;", "！！！", "【", "🔥", "Ａ", "   ", "适用苹果手机"):
        assert any(fault in text for text in texts), fault
    assert 0.05 < sum(text.isascii() for text in texts) / len(texts) < 0.2

    counts = Counter(label for _, label in rows if label)
    assert set(counts) == set(labels())
    assert 3 < max(counts.values()) / min(counts.values()) < 9

    _, report = clean_rows(rows)
    assert set(report.dropped) == {"duplicate", "empty", "label missing", "conflicting labels"}
    assert report.rows_kept > 0.85 * len(rows)
