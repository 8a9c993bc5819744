import itertools
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from aisle.preprocess.clean import clean_rows
from aisle.preprocess.tables.table import Row, read_labelled
from aisle.train.synthetic.catalogue import CATALOGUE, LEAVES, NEIGHBOURS, generate, labels, write_sample


def test_taxonomy() -> None:
    assert len(set(labels())) == len(LEAVES) >= 44
    for leaf in LEAVES:
        assert len(leaf["path"]) == len(leaf["path_en"]) == 3
        for words, least, most in (
            ("nouns", 4, 7),
            ("nouns_en", 2, 4),
            ("attributes", 8, 14),
            ("attributes_en", 4, 8),
            ("units", 1, 9),
        ):
            assert least <= len(set(leaf[words])) == len(leaf[words]) <= most, (leaf["path"], words)
    assert set(CATALOGUE["brands"]) == {leaf["path"][0] for leaf in LEAVES}


def test_every_leaf_has_look_alikes() -> None:
    near = dict(zip((leaf["path"][2] for leaf in LEAVES), NEIGHBOURS, strict=True))
    for family in CATALOGUE["family"]:
        assert len(family["leaves"]) > 1
        for name in family["leaves"]:
            others = {other["path"][2] for other in near[name]}
            assert set(family["leaves"]) - {name} <= others
            assert name not in others
    assert all(near.values())


def test_a_seed_repeats_the_sample() -> None:
    assert list(generate(500, seed=3)) == list(generate(500, seed=3)) != list(generate(500, seed=4))
    assert list(itertools.islice(generate(500, seed=3), 100)) == list(generate(100, seed=3))


@pytest.mark.parametrize("name", ["sample.csv", "new/folder/sample.jsonl", "sample.parquet"])
def test_the_sample_is_read_back_as_written(tmp_path: Path, name: str) -> None:
    out = tmp_path / name
    summary = write_sample(out, 500, seed=5)
    assert summary == {
        "rows": 500,
        "categories": len(LEAVES),
        "synthetic": True,
        "seed": 5,
        "output": str(out),
    }
    rows = [(row["text"], row["category"]) for row in generate(500, seed=5)]
    assert list(read_labelled(out, "text", "category")) == rows


def test_the_sample_is_complete_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(rows: int, seed: int) -> Iterator[Row]:
        yield from itertools.islice(generate(rows, seed), 400)
        raise KeyboardInterrupt

    monkeypatch.setattr("aisle.train.synthetic.catalogue.generate", stopped)
    with pytest.raises(KeyboardInterrupt):
        write_sample(tmp_path / "sample.csv", 500, seed=0)
    assert list(tmp_path.iterdir()) == []


def test_the_sample_on_standard_output(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "aisle", "sample", "-o", "-", "--rows", "3"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, check=True)
    assert [set(json.loads(line)) for line in done.stdout.splitlines()] == [{"text", "category"}] * 3
    assert list(tmp_path.iterdir()) == []


def test_the_sample_has_the_faults_of_real_catalogues() -> None:
    rows = [(row["text"], row["category"]) for row in generate(20_000, seed=0)]
    texts = [text for text, _ in rows]
    faults = [
        "<b>",
        "&amp;",
        "&nbsp;",
        "!!!",
        "！！！",
        "【",
        "🔥",
        "Ａ",
        "   ",
        "\t",
        "2026新款",
        "包邮",
        "买一送一",
    ]
    for fault in [*faults, "适用苹果手机", "非", "配", "for ", "not "]:
        assert any(fault in text for text in texts), fault
    assert 0.05 < sum(text.isascii() for text in texts) / len(texts) < 0.2
    mixed = {f"{noun} " for leaf in LEAVES for noun in leaf["nouns_en"]}
    assert any(not text.isascii() and any(noun in text for noun in mixed) for text in texts)

    # Titles that consist only of a noun, and titles with an ambiguous noun, so that other words must decide.
    assert set(texts) & {noun for leaf in LEAVES for noun in leaf["nouns"]}
    nouns = {label: leaf["nouns"] + leaf["nouns_en"] for label, leaf in zip(labels(), LEAVES, strict=True)}
    unnamed = [text for text, label in rows if label and text and not any(n in text for n in nouns[label])]
    assert 0.02 < len(unnamed) / len(rows) < 0.15

    counts = Counter(label for _, label in rows if label)
    assert set(counts) == set(labels())
    assert 4 < max(counts.values()) / min(counts.values()) < 9


def test_cleaning_drops_the_faults_and_keeps_the_rest() -> None:
    table, report = clean_rows((row["text"], row["category"]) for row in generate(20_000, seed=0))
    assert set(report.dropped) == {"duplicate", "empty", "label missing", "conflicting labels"}
    assert min(report.dropped.values()) > 0
    assert set(table.labels) == set(labels())
    assert report.rows_kept > 0.85 * report.rows_in
