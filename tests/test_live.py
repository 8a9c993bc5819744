"""Changing the model of a server that is under load."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from aisle.build.build import build
from aisle.build.repository import MANIFEST, MODELS, check_version
from aisle.client import Classifier, Prediction
from aisle.deploy import release
from aisle.deploy.live import Trial, deploy, rollback, total
from aisle.deploy.release import Release, Status, servers
from aisle.deploy.view import View
from aisle.errors import InputError
from aisle.preprocess.table import fingerprint

from .conftest import aisle
from .test_triton import serving

TEXTS = [f"{kind} {i}号" for i in range(4) for kind in ("红富士苹果", "手机壳 防摔", "猫粮 成猫", "usb cable")]


@dataclass
class Live:
    repository: Path
    url: str
    classifier: Classifier
    expected: list[Prediction]  # of TEXTS


@dataclass
class Load:
    answers: list[tuple[int, Prediction]] = field(default_factory=list)  # number of the text, in order of arrival
    errors: list[Exception] = field(default_factory=list)


@pytest.fixture(scope="module")
def other_checkpoint(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that finds most probable what the first finds least, and calls it by another name."""
    folder = tmp_path_factory.mktemp("other") / "checkpoint"
    shutil.copytree(checkpoint, folder)
    weights = load_file(folder / "model.safetensors")
    for name in ("classifier.weight", "classifier.bias"):
        weights[name] = -weights[name]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    labels = json.loads((folder / "labels.json").read_text("utf-8"))
    (folder / "labels.json").write_text(json.dumps([*labels[1:], labels[0]], ensure_ascii=False), "utf-8")
    return folder


@pytest.fixture(scope="module")
def live(repository: Path, other_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server of version 1, whose repository also holds version 2."""
    copy = tmp_path_factory.mktemp("live") / "repository"
    shutil.copytree(repository, copy, symlinks=True)
    process, url = serving(copy)
    threading.Thread(target=process.communicate, daemon=True).start()  # its log would fill the pipe
    assert build(other_checkpoint, copy, "openvino", "fp32")["version"] == 2
    with Classifier(url, timeout=60) as classifier:
        yield Live(copy, url, classifier, classifier.classify(TEXTS))
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    assert process.returncode == 0
    assert servers(copy) == []


@contextmanager
def load(url: str) -> Iterator[Load]:
    """Have three callers ask for one text after the other."""
    seen, done = Load(), threading.Event()

    def ask(first: int) -> None:
        with Classifier(url, timeout=60, retries=0) as classifier:
            for number in itertools.count(first):
                if done.is_set():
                    return
                try:
                    seen.answers.append((number % len(TEXTS), classifier.classify([TEXTS[number % len(TEXTS)]])[0]))
                except Exception as error:
                    seen.errors.append(error)

    threads = [threading.Thread(target=ask, args=(first,)) for first in range(3)]
    for thread in threads:
        thread.start()
    try:
        yield seen
    finally:
        done.set()
        for thread in threads:
            thread.join()


def change(command: str, repository: Path, *arguments: str) -> dict[str, Any]:
    done = aisle(command, "--repository", repository, "--json", *arguments)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def assert_same(answer: Prediction, expected: Prediction) -> None:
    assert (answer.category, answer.version) == (expected.category, expected.version)
    assert answer.confidence == pytest.approx(expected.confidence, abs=1e-3)


def test_a_new_version_takes_over_and_goes_back_without_losing_a_request(live: Live) -> None:
    with load(live.url) as seen:
        trial = ["--shadow", "1", "--agreement", "0", "--canary", "0.5", "--canary-seconds", "1"]
        deployed = change("deploy", live.repository, *trial)
        shifted = len(seen.answers)
        other = live.classifier.classify(TEXTS)
        time.sleep(0.5)
        back = change("rollback", live.repository)
        returned = len(seen.answers)
        time.sleep(0.5)
    assert seen.errors == []
    assert (deployed["version"], deployed["previous"], deployed["servers"], deployed["changed"]) == (2, 1, 1, True)
    assert deployed["shadow"]["compared"] > 0
    assert deployed["shadow"]["agreement"] < 0.5
    assert (deployed["canary"]["requests"] > 0, deployed["canary"]["failures"]) == (True, 0)
    assert (back["version"], back["previous"]) == (1, 2)
    expected = {1: live.expected, 2: other}
    assert {answer.version for answer in other} == {2}
    assert [answer.category for answer in other] != [answer.category for answer in live.expected]
    for text, answer in seen.answers:  # each wholly of the version that it names
        assert_same(answer, expected[answer.version][text])
    # Each of three callers may still have been waiting for the other version's answer, and tell of it late.
    versions = [answer.version for _, answer in seen.answers]
    assert versions[shifted : shifted + 12].count(1) <= 3
    assert versions[returned:].count(2) <= 3
    assert versions[-5:] == [1] * 5


def test_a_version_that_disagrees_is_refused(live: Live) -> None:
    with load(live.url) as seen:
        done = aisle("deploy", "--repository", live.repository, "--version", "2", "--shadow", "2")
    assert done.returncode == 1
    assert "live texts; 90.00% are asked; most often" in done.stderr
    assert seen.errors == []
    assert {answer.version for _, answer in seen.answers} == {1}
    assert (Release.load(live.repository).live, Release.load(live.repository).candidate) == (1, None)


def test_a_version_that_cannot_be_loaded_is_refused_and_the_old_one_goes_on(live: Live) -> None:
    engine = live.repository / "encoder" / "2" / "model.bin"
    whole = engine.read_bytes()
    engine.write_bytes(whole[: len(whole) // 2])
    with load(live.url) as seen:
        done = aisle("deploy", "--repository", live.repository)
        assert done.returncode == 2
        assert "version 2 is damaged: encoder/model.bin is not what was built" in done.stderr
        # The same with a manifest that does not give it away: now Triton itself must find out.
        manifest = live.repository / "product_classifier" / "2" / MANIFEST
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "encoder/model.bin": fingerprint(engine)}))
        done = aisle("deploy", "--repository", live.repository)
        assert done.returncode == 1
        assert "cannot serve it: load failed for model 'encoder'" in done.stderr
    engine.write_bytes(whole)
    assert seen.errors == []
    assert {answer.version for _, answer in seen.answers} == {1}
    assert change("deploy", live.repository, "--version", "1")["changed"] is False
    for answer, expected in zip(live.classifier.classify(TEXTS), live.expected, strict=True):
        assert_same(answer, expected)


def test_without_a_server_the_next_one_serves_it(repository: Path, tmp_path: Path) -> None:
    copy = tmp_path / "repository"
    shutil.copytree(repository, copy, symlinks=True)
    with pytest.raises(InputError, match="no way back"):
        rollback(copy)
    with pytest.raises(InputError, match="holds no version 7; it has 1"):
        deploy(copy, 7, Trial())
    for model in MODELS:
        shutil.copytree(copy / model / "1", copy / model / "2", symlinks=True)
    assert deploy(copy, 2, Trial())["servers"] == 0
    assert (Release.load(copy).live, Release.load(copy).previous) == (2, 1)
    assert rollback(copy)["version"] == 1
    with (copy / ".deploying").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="is under way"):
            rollback(copy)
    (copy / "release.json").write_text("{")
    with pytest.raises(InputError, match=r"release\.json is damaged"):
        Release.load(copy)


def test_what_servers_say_is_added_up_and_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for port, agreed in ((1, 3), (2, 5)):
        traffic = {"shadow_compared": 6, "shadow_agreed": agreed, "changes": {"a → b": 6 - agreed}}
        Status(f"0.0.0.0:{port}", revision=1, traffic=traffic).write(tmp_path)
    assert total(servers(tmp_path)) == {"shadow_compared": 12, "shadow_agreed": 8, "changes": {"a → b": 4}}
    for path in (tmp_path / ".servers").iterdir():
        os.utime(path, (0, 0))
    assert servers(tmp_path) == []
    monkeypatch.setattr(release, "HEARTBEAT_SECONDS", 0.01)
    with Status("0.0.0.0:2").beating(tmp_path):
        while not servers(tmp_path):  # it is seen again
            time.sleep(0.01)
    assert [path.name.endswith("-1.json") for path in (tmp_path / ".servers").iterdir()] == [True]


def test_what_triton_sees(repository: Path, tmp_path: Path) -> None:
    """Each ensemble names one version of all its steps, and a GPU's configuration is taken where it is asked for."""
    view = View(repository, tmp_path / "view", "gpu")
    view.show(1)
    view.bind(1)
    assert "KIND_GPU" in (view.folder / "encoder" / "config.pbtxt").read_text("utf-8")
    assert "KIND_GPU" not in (view.folder / "tokenizer" / "config.pbtxt").read_text("utf-8")
    ensemble = (view.folder / "product_classifier" / "config.pbtxt").read_text("utf-8")
    assert (ensemble.count("model_version: 1\n"), "model_version: -1" in ensemble) == (3, False)
    assert [path.name for path in (view.folder / "product_classifier").glob("[0-9]*")] == ["1"]
    view.hide(1)
    assert view.versions() == set()
    assert (repository / "encoder" / "1" / "model.bin").exists()
    bound = tmp_path / "bound"
    shutil.copytree(repository, bound, symlinks=True)
    (bound / "product_classifier" / "config.pbtxt").write_text(ensemble, "utf-8")
    with pytest.raises(InputError, match="each step's model_version must be -1"):
        View(bound, tmp_path / "other", "").bind(1)


def test_every_file_of_a_version_is_checked(repository: Path, tmp_path: Path) -> None:
    copy = tmp_path / "repository"
    shutil.copytree(repository, copy, symlinks=True)
    check_version(copy, 1)
    for name, content in (("labeler/1/labels.json", "[]"), ("tokenizer/1/extra.json", "{}")):
        path = copy / name
        before = path.read_bytes() if path.exists() else None
        path.write_text(content)
        with pytest.raises(InputError, match=f"damaged: {name.replace('/1/', '/')} is not what was built"):
            check_version(copy, 1)
        path.unlink() if before is None else path.write_bytes(before)
    (copy / "product_classifier" / "1" / MANIFEST).unlink()
    with pytest.raises(InputError, match="damaged"):
        check_version(copy, 1)
