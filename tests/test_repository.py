"""Served from a model repository: only complete versions that passed their gate, run by the package's code."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from aisle.build.repository import (
    MANIFEST,
    MODELS,
    TEMPLATE,
    check_version,
    leftovers,
    max_batch_size,
    new_version,
    version_fingerprint,
    versions,
)
from aisle.client import Classifier
from aisle.deploy.server.release import Release
from aisle.deploy.server.served_repository import ENSEMBLE, ServedRepository
from aisle.errors import InputError

from .conftest import seal


@pytest.fixture
def copy(repository: Path, tmp_path: Path) -> Path:
    """A repository with one version, to be damaged."""
    folder = tmp_path / "repository"
    shutil.copytree(repository, folder)
    return folder


def test_every_step_takes_requests_of_the_same_size() -> None:
    configs = [*TEMPLATE.glob("*/config.pbtxt"), *TEMPLATE.glob("*/configs/*.pbtxt")]
    limits = {path: re.findall(r"^max_batch_size: (\d+)$", path.read_text("utf-8"), re.M) for path in configs}
    assert len(limits) >= len(MODELS)
    assert all(found == [str(max_batch_size())] for found in limits.values()), limits


def test_a_repository_of_an_earlier_aisle_runs_the_packages_code(copy: Path, tmp_path: Path) -> None:
    """Aisle 0.1 copied code and configuration into the repository and linked versions to them."""
    manifest = copy / "product_classifier" / "1" / MANIFEST
    manifest.write_text(json.dumps(json.loads(manifest.read_text())["files"]))
    for model in ("tokenizer", "encoder"):
        (copy / model / "model.py").write_text("raise RuntimeError('code of long ago')")
        (copy / model / "config.pbtxt").write_text("name: 'configuration of long ago'")
        (copy / model / "1" / "model.py").symlink_to("../model.py")
    view = ServedRepository(copy, tmp_path / "view", "")
    view.add_version(1)
    view.write_ensemble(ENSEMBLE, 1)
    for code in (tmp_path / "view").glob("*/1/model.py"):
        assert code.read_text() == (TEMPLATE / code.parts[-3] / "model.py").read_text()
    assert not any("long ago" in path.read_text("utf-8") for path in (tmp_path / "view").glob("*/config.pbtxt"))
    assert {"encoder/model.py", "encoder/config.pbtxt"} <= set(leftovers(copy))  # which `aisle serve` reports


def test_only_files_of_the_manifest_are_served(copy: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "model.py").write_text("")
    (copy / "encoder" / "1" / "model.py").symlink_to(foreign / "model.py")
    (copy / "encoder" / "1" / "site").symlink_to(foreign)
    view = ServedRepository(copy, tmp_path / "view", "")
    view.add_version(1)
    step = tmp_path / "view" / "encoder" / "1"
    assert (step / "model.py").resolve() == (TEMPLATE / "encoder" / "model.py").resolve()
    assert not (step / "site").exists()
    (copy / "tokenizer" / "1" / "more").mkdir()
    (copy / "tokenizer" / "1" / "more" / "extra.json").write_text("{}")
    with pytest.raises(InputError, match=r"damaged: tokenizer/more/extra\.json"):
        check_version(copy, 1)


def test_a_version_tells_which_model_it_is(copy: Path, classifier: Classifier, tmp_path: Path) -> None:
    """Two repositories can each have a version 1; a rebuild of one model changes only the report."""
    before = version_fingerprint(copy, 1)
    assert classifier.fingerprints() == {1: before}
    (copy / "encoder" / "1" / "report.json").write_text("{}")
    seal(copy, 1, "encoder/report.json")
    assert version_fingerprint(copy, 1) == before
    (copy / "encoder" / "1" / "labels.json").write_text("[]")
    seal(copy, 1, "encoder/labels.json")
    assert version_fingerprint(copy, 1) != before


def test_a_router_tells_which_models_it_divides_requests_between(copy: Path, tmp_path: Path) -> None:
    for model in MODELS:
        shutil.copytree(copy / model / "1", copy / model / "2")
    view = ServedRepository(copy, tmp_path / "view", "")
    view.add_version(1)
    view.add_version(2)
    view.write_router(ENSEMBLE, Release(1, candidate=2, share=0.5), tmp_path / "trial")
    config = (tmp_path / "view" / "product_classifier" / "config.pbtxt").read_text("utf-8")
    for version in (1, 2):
        told = version_fingerprint(copy, version)
        assert f'parameters {{ key: "fingerprint_{version}" value {{ string_value: "{told}" }} }}' in config


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"agreement": 0.4}, "did not pass its gate"),
        ({"agreement": None}, "did not pass its gate"),
        ({"f1_loss": float("nan")}, "did not pass its gate"),
        ({"gate": {}}, "its report cannot be read"),
    ],
)
def test_a_version_that_failed_its_gate_is_not_served(copy: Path, change: dict[str, object], complaint: str) -> None:
    path = copy / "encoder" / "1" / "report.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    seal(copy, 1, "encoder/report.json")
    with pytest.raises(InputError, match=complaint):
        check_version(copy, 1)


@pytest.mark.parametrize("content", ["{}", "[]", "{", '{"layout": 2, "files": {}}', '{"layout": 2}'])
def test_an_incomplete_manifest_is_refused(copy: Path, content: str) -> None:
    for path in (path for model in MODELS for path in (copy / model / "1").iterdir()):
        path.unlink()
    (copy / "product_classifier" / "1" / MANIFEST).write_text(content)
    with pytest.raises(InputError, match="version 1 is damaged"):
        check_version(copy, 1)


def test_a_version_of_a_later_aisle_is_refused_by_name(copy: Path) -> None:
    path = copy / "product_classifier" / "1" / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), "layout": 99, "aisle": "9.9"}))
    with pytest.raises(InputError, match=re.escape("built by Aisle 9.9, but this is Aisle")):
        check_version(copy, 1)


def test_folders_that_are_not_versions_are_ignored(copy: Path) -> None:
    for model in MODELS:
        for name in ("1.old", "02", "3²", "7-backup"):
            shutil.copytree(copy / model / "1", copy / model / name)
        (copy / model / "4").mkdir()  # an incomplete version
    assert versions(copy) == [1]
    with new_version(copy) as (number, _):
        assert number == 5
    assert versions(copy) == [1, 5]


def test_an_unknown_configuration_is_refused(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no model has a configuration 'gqu'; there is .*gpu"):
        ServedRepository(copy, tmp_path / "view", "gqu")
    own = copy / "encoder" / "configs" / "own.pbtxt"
    own.parent.mkdir(exist_ok=True)
    own.write_text((TEMPLATE / "encoder" / "config.pbtxt").read_text("utf-8").replace('"64"', '"7"'), "utf-8")
    view = ServedRepository(copy, tmp_path / "own", "own")
    assert '"7"' in (view.folder / "encoder" / "config.pbtxt").read_text("utf-8")
