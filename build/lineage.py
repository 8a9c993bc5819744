"""Lineage: what a version was made from. The version's report has it, so that the checkpoint is not needed."""

from __future__ import annotations

import datetime
import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aisle
from aisle.build.repository import MANIFEST, MODELS, read_report, version_fingerprint

NAMES = uuid.UUID("6f1b6c1e-4a0f-5a7e-9d3f-2a1c8e5b7d40")  # the namespace of the ids of runs
# https://openlineage.io/spec/2-0-2/OpenLineage.json and the facet of a dataset's version
EVENT = "https://openlineage.io/spec/2-0-2/OpenLineage.json#/$defs/RunEvent"
FACET = "https://openlineage.io/spec/facets/1-0-1/DatasetVersionDatasetFacet.json#/$defs/DatasetVersionDatasetFacet"
PRODUCER = f"urn:aisle-classifier:{aisle.__version__}"


def read_lineage(checkpoint: Path) -> dict[str, Any]:
    """Return what the report of a build keeps: the time, and what the checkpoint's training.json tells."""
    path, built = checkpoint / "training.json", datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    try:
        found = json.loads(path.read_text("utf-8"))
        written = datetime.datetime.fromtimestamp(path.stat().st_mtime, datetime.UTC)
    except (OSError, ValueError):
        return {"time": built}
    told = {name: value for name, value in found.items() if name not in ("epochs", "temperature")}
    return {"time": built, "training": {"time": written.isoformat(timespec="seconds"), **told}}


def lineage(repository: Path, version: int) -> dict[str, Any]:
    """Return what a version was made from, as far as its report tells.

    Raises:
        InputError: the version is damaged.
    """
    report = read_report(repository, version)
    manifest = json.loads((repository / MODELS[-1] / str(version) / MANIFEST).read_text("utf-8"))
    training = report.get("training", {})
    return {
        "version": version,
        "fingerprint": version_fingerprint(repository, version),
        "built": {"time": report.get("time"), "aisle": manifest["aisle"]},
        "engine": {name: report[name] for name in ("target", "precision")},
        "gate": {name: report.get(name) for name in ("agreement", "macro_f1", "f1_loss", "held_out_texts")},
        "checkpoint": {"sha256": report["checkpoint"], **training_of(training)},
        "inputs": [*inputs_of(training)],
    }


def training_of(training: dict[str, Any]) -> dict[str, Any]:
    """Return what is known of the training itself."""
    names = ("time", "recipe", "settings", "code_sha256", "versions", "categories", "pruning")
    return {name: training[name] for name in names if training.get(name)}


def inputs_of(training: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield what a training read: tables and checkpoints, each with its `kind`, `name` and `sha256`."""
    data, settings = training.get("data", {}), training.get("settings", {})
    if "file" in data:
        cleaning = data.get("cleaning", {})
        rows = {name: cleaning[name] for name in ("rows_in", "rows_kept") if name in cleaning}
        columns = [*data["columns"], *data.get("also", ())]
        labels = {name: data[name] for name in ("labelling",) if name in data}
        yield {"kind": "table", "name": data["file"], "sha256": data["sha256"], "columns": columns, **labels, **rows}
    for kind in ("corrections", "extra"):
        for each in data.get(kind, ()):
            yield {"kind": kind, "name": each["file"], "sha256": each["sha256"]}
    for each in data.get("teachers", ()):
        yield {"kind": "teacher", "name": each["folder"], "sha256": each["checkpoint_sha256"]}
    if examples := data.get("examples"):
        yield {"kind": "examples", "name": "of added categories", "sha256": examples["sha256"]}
    if "checkpoint_sha256" in data:
        name = Path(settings.get("model", "checkpoint")).name
        yield {"kind": "checkpoint", "name": name, "sha256": data["checkpoint_sha256"]}
    elif settings.get("model", "scratch") != "scratch":
        yield {"kind": "model", "name": settings["model"], "sha256": None}


def events(found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a lineage as events of OpenLineage: the training, if it is known, and the build.

    Args:
        found: what `lineage` returns.
    """
    checkpoint = found["checkpoint"]
    built = found["built"]["time"]
    made = _dataset("checkpoint", checkpoint["sha256"][:16], checkpoint["sha256"])
    if found["inputs"]:
        read = [_read(each) for each in found["inputs"]]
        yield _event("train", checkpoint["sha256"], checkpoint.get("time") or built, read, made)
    version = _dataset("version", f"{found['version']} {found['fingerprint'][:16]}", found["fingerprint"])
    yield _event("build", found["fingerprint"], built, [made], version)


def _read(each: dict[str, Any]) -> dict[str, Any]:
    """Return an input as a dataset; of a checkpoint, the one that the event of its training made."""
    if each["kind"] in ("checkpoint", "teacher"):
        return _dataset("checkpoint", each["sha256"][:16], each["sha256"])
    return _dataset(each["kind"], each["name"], each["sha256"])


def _dataset(kind: str, name: str, sha256: str | None) -> dict[str, Any]:
    facet = {"version": {"_producer": PRODUCER, "_schemaURL": FACET, "datasetVersion": sha256}}
    return {"namespace": f"aisle.{kind}", "name": name, "facets": facet if sha256 else {}}


def _event(
    job: str, key: str, time: str | None, inputs: list[dict[str, Any]], output: dict[str, Any]
) -> dict[str, Any]:
    return {
        "eventType": "COMPLETE",
        "eventTime": time or "1970-01-01T00:00:00+00:00",  # of a version that an older release built
        "producer": PRODUCER,
        "schemaURL": EVENT,
        "run": {"runId": str(uuid.uuid5(NAMES, f"{job} {key}"))},
        "job": {"namespace": "aisle", "name": job},
        "inputs": inputs,
        "outputs": [output],
    }
