"""Lineage: what a version was made from, with nothing but the repository."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

import pytest

from aisle.build.lineage import events, inputs_of, lineage
from aisle.build.repository import version_fingerprint
from aisle.preprocess.tables.table import fingerprint
from aisle.train.core.checkpoint import Checkpoint

from .conftest import aisle


def test_a_version_tells_what_it_was_made_from(repository: Path, checkpoint: Path, sample: Path) -> None:
    done = aisle("lineage", 1, "--repository", repository, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found == lineage(repository, 1)
    assert found["fingerprint"] == version_fingerprint(repository, 1)
    assert found["engine"] == {"target": "openvino", "precision": "fp32"}
    assert found["checkpoint"]["sha256"] == Checkpoint(checkpoint).fingerprint
    assert found["checkpoint"]["settings"]["seed"] == 0
    (table,) = found["inputs"]
    assert (table["kind"], table["name"], table["columns"]) == ("table", sample.name, ["text", "category"])
    assert table["sha256"] == fingerprint(sample)
    assert 0 < table["rows_kept"] < table["rows_in"]


def test_events_of_openlineage_join_training_and_build(repository: Path, tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    done = aisle("lineage", "--repository", repository, "--openlineage", file)
    assert done.returncode == 0, done.stderr
    train, build = (json.loads(line) for line in file.read_text("utf-8").splitlines())
    assert [event["job"]["name"] for event in (train, build)] == ["train", "build"]
    assert train["outputs"] == build["inputs"]
    assert train["inputs"][0]["facets"]["version"]["datasetVersion"] in json.dumps(lineage(repository, 1))
    for event in (train, build):
        assert event["eventType"] == "COMPLETE"
        assert uuid.UUID(event["run"]["runId"])
    assert [*events(lineage(repository, 1))] == [train, build]  # the same run has the same id


def test_a_retraining_is_joined_to_the_training_of_its_checkpoint() -> None:
    """The dataset that one event makes is the one that the other reads, whatever the folders are called."""
    known = {"version": 2, "fingerprint": "f" * 64, "built": {"time": None}}
    first, second = "a" * 64, "b" * 64
    inputs = [*inputs_of({"settings": {"model": "/models/old"}, "data": {"checkpoint_sha256": first}})]
    (train, _) = events({**known, "checkpoint": {"sha256": second}, "inputs": inputs})
    table = {"kind": "table", "name": "t.csv", "sha256": "c"}
    (before, build) = events({**known, "checkpoint": {"sha256": first}, "inputs": [table]})
    assert train["inputs"] == before["outputs"] == build["inputs"]
    assert train["outputs"] != before["outputs"]


def test_the_columns_and_labels_of_a_training_are_told() -> None:
    data = {"file": "t.csv", "sha256": "s", "columns": ["text", "category"], "also": ["brand"]}
    (table,) = inputs_of({"data": {**data, "labelling": {"min_rows": 3}}})
    assert (table["columns"], table["labelling"]) == (["text", "category", "brand"], {"min_rows": 3})


@pytest.mark.parametrize(
    ("training", "inputs"),
    [
        ({}, []),
        ({"settings": {"model": "hfl/chinese-bert"}}, [("model", "hfl/chinese-bert", None)]),
        (
            {
                "settings": {"model": "/models/first"},
                "data": {"corrections": [{"file": "fix.csv", "sha256": "c"}], "checkpoint_sha256": "o"},
            },
            [("corrections", "fix.csv", "c"), ("checkpoint", "first", "o")],
        ),
        (
            {"data": {"teachers": [{"folder": "big", "checkpoint_sha256": "t"}], "examples": {"sha256": "e"}}},
            [("teacher", "big", "t"), ("examples", "of added categories", "e")],
        ),
    ],
)
def test_inputs_of_every_kind(training: dict[str, Any], inputs: list[tuple[str, str, str | None]]) -> None:
    assert [(each["kind"], each["name"], each["sha256"]) for each in inputs_of(training)] == inputs


def test_a_version_that_is_not_there_is_refused(repository: Path) -> None:
    done = aisle("lineage", 7, "--repository", repository)
    assert (done.returncode, done.stderr) == (2, f"aisle: {repository} has no version 7; it has: 1\n")
