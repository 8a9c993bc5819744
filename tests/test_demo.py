"""The demo, in a small form: everything from the sample to the answers of a real server."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from aisle.cli import run
from aisle.loadtest import processes
from aisle.preprocess.tables.table import read_rows

from .conftest import below

TEXTS = ["蓝牙耳机 主动降噪 超长续航", "手机壳 磨砂防摔 全包边", "红富士苹果 5斤装"]


@pytest.mark.long
def test_the_demo_goes_the_whole_way_and_leaves_nothing_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    before = processes.tree(os.getpid())
    Path("texts.csv").write_text("text\n" + "\n".join(TEXTS) + '\n" "\n', "utf-8")
    results = []
    for _ in range(2):
        assert run(["demo", "texts.csv", "--rows", "1000", "--repository", "models", "--json"]) == 0
        results.append(json.loads(capsys.readouterr().out))
    first, second = results
    assert first["synthetic"]
    assert first["version"] == second["version"] == 1  # the second run uses what the first one built
    labels = {row["category"] for row in read_rows(Path("work/sample-1000.csv"))}
    *answers, refused = first["predictions"]
    assert [row["text"] for row in answers] == TEXTS
    for row, again in zip(answers, second["predictions"], strict=False):
        assert row["category"] == again["category"] in labels
        assert 0 < row["confidence"] <= 1
        assert row["milliseconds"] > 0
    assert "empty once cleaned" in refused["error"]
    assert Path("models/product_classifier/1/manifest.json").exists()
    assert not below(os.getpid(), "--model-repository=") & (processes.tree(os.getpid()) - before)
