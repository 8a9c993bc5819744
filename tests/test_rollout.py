"""Changing the model of a server that is under load."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from aisle.build.build import build
from aisle.build.repository import MANIFEST, MODELS, check_version
from aisle.cli import run
from aisle.client import Classifier, Prediction
from aisle.deploy.server import release
from aisle.deploy.server import rollout as rollout_module
from aisle.deploy.server.release import Release, Status, Watch, servers
from aisle.deploy.server.rollout import Trial, deploy, rollback, total
from aisle.deploy.server.served_repository import ENSEMBLE, ServedRepository
from aisle.errors import InputError, ServerError
from aisle.train.core.decisions import Category, Decisions, levels_of
from aisle.train.core.settings import DecisionTargets

from .conftest import aisle, rename_labels, seal, unseal, wait_for
from .desk import DeskClient, desk_client
from .test_desk_models import retrained
from .test_triton import serving

TEXTS = [f"{kind} {i}号" for i in range(4) for kind in ("红富士苹果", "手机壳 防摔", "猫粮 成猫", "usb cable")]

PAUSE = 0.02  # seconds; leaves some of the CPU to a desk's jobs


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
    """A model with inverted probabilities and renamed labels."""
    folder = tmp_path_factory.mktemp("other") / "checkpoint"
    shutil.copytree(checkpoint, folder)
    weights = load_file(folder / "model.safetensors")
    for name in ("classifier.weight", "classifier.bias"):
        weights[name] = -weights[name]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    labels = json.loads((folder / "labels.json").read_text("utf-8"))
    labels = [*labels[1:], labels[0]]
    rename_labels(folder, labels)
    levels = tuple(tuple(Category(name, None, 1, 1, 0.0) for name in level) for level in levels_of(labels))
    Decisions(DecisionTargets(), 1, None, 0.0, levels).save(folder)  # it leaves every text to a review
    return folder


@pytest.fixture(scope="module")
def live(repository: Path, other_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server with version 1, whose repository also holds version 2."""
    copy = tmp_path_factory.mktemp("live") / "repository"
    shutil.copytree(repository, copy, symlinks=True)
    process, url = serving(copy)
    threading.Thread(target=process.communicate, daemon=True).start()  # otherwise its log would fill the pipe
    try:
        # As the desk builds it, so that its rollouts find it built.
        assert build(other_checkpoint, copy, "openvino", "int8")["version"] == 2
        with Classifier(url, timeout=60) as classifier:
            yield Live(copy, url, classifier, classifier.classify(TEXTS))
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    assert process.returncode == 0
    assert servers(copy) == []


@contextmanager
def load(url: str, texts: Sequence[str] = TEXTS, pause: float = 0.0) -> Iterator[Load]:
    """Let three callers send one text after the other, with a pause in seconds between two."""
    seen, done = Load(), threading.Event()

    def ask(first: int) -> None:
        with Classifier(url, timeout=60, retries=0) as classifier:
            for number in itertools.count(first):
                if done.wait(pause):
                    return
                try:
                    text, decisions = number % len(texts), number // 3 % 2 == 0
                    seen.answers.append((text, classifier.classify([texts[text]], decisions=decisions)[0]))
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


def test_deploy_and_rollback_lose_no_request(live: Live) -> None:
    with load(live.url) as seen:
        trial = ["--shadow", "1", "--agreement", "0", "--canary", "0.5", "--canary-seconds", "1"]
        deployed = change("deploy", live.repository, *trial)
        shifted = len(seen.answers)
        other = live.classifier.classify(TEXTS)
        wait_for(lambda: len(seen.answers) >= shifted + 12)
        back = change("rollback", live.repository)
        returned = len(seen.answers)
        wait_for(lambda: len(seen.answers) >= returned + 12)
    assert seen.errors == []
    assert (deployed["version"], deployed["previous"], deployed["servers"], deployed["changed"]) == (2, 1, 1, True)
    assert deployed["shadow"]["compared"] > 0
    assert deployed["shadow"]["agreement"] < 0.5
    assert (deployed["canary"]["requests"] > 0, deployed["canary"]["failures"]) == (True, 0)
    assert (back["version"], back["previous"]) == (1, 2)
    expected = {1: live.expected, 2: other}
    assert {answer.version for answer in other} == {2}
    assert [answer.category for answer in other] != [answer.category for answer in live.expected]
    for text, answer in seen.answers:  # each answered by the version that it names
        assert_same(answer, expected[answer.version][text])
    decided = {(answer.version, answer.decision) for _, answer in seen.answers if answer.decision}
    assert decided >= {(1, "accept"), (2, "review")}
    assert (2, "accept") not in decided
    # Each of the three callers may still wait for an answer of the other version.
    versions = [answer.version for _, answer in seen.answers]
    assert versions[shifted : shifted + 12].count(1) <= 3
    assert versions[returned:].count(2) <= 3
    assert versions[-5:] == [1] * 5


@pytest.fixture
def desk(live: Live, other_checkpoint: Path, tmp_path: Path) -> Iterator[DeskClient]:
    """A desk with a retraining whose checkpoint is version 2."""
    with desk_client(tmp_path / "desk", live.url, repository=live.repository) as client:
        with client.desk.store.write() as db:
            row = json.dumps([retrained(other_checkpoint)]), time.time()
            db.execute(
                "INSERT INTO jobs (kind, commands, detail, person, state, result, at) "
                "VALUES ('retrain', '[]', '{}', 'li', 'done', ?, ?)",
                row,
            )
        yield client


def press(desk: DeskClient, button: str, **fields: object) -> tuple[str, str]:
    """Press a button of Models; return all that its job showed, and the page at the end."""
    assert desk.act(f"/models/{button}", None, **fields).status_code == 200
    job = desk.desk.jobs.last("deploy", "rollback")
    assert job is not None
    shown = set()

    def ended() -> bool:
        answer = desk.get(f"/jobs/{job.id}")
        shown.add(answer.text)
        return "hx-refresh" in answer.headers

    wait_for(ended, 600)
    return "".join(shown), desk.get("/models").text


@pytest.mark.long
def test_the_desk_tries_promotes_and_rolls_back(live: Live, desk: DeskClient) -> None:
    none = {"retraining": 1, "shadow": 0, "agreement": 0, "canary": 0, "canary_seconds": 0}
    with load(live.url, pause=PAUSE) as seen:
        shown, page = press(desk, "deploy", **{**none, "shadow": 1, "agreement": 90})
        assert "Shadow: version 2 gets copies of the requests. Version 1 answers all of them." in shown
        assert "live texts; 90.00% are required" in page
        assert "The new version is not live. Version 1 answers all requests." in page
        assert {answer.version for _, answer in seen.answers} == {1}

        before = len(seen.answers)
        shown, page = press(desk, "deploy", **{**none, "shadow": 1, "canary": 50, "canary_seconds": 2})
        assert "Canary: version 2 answers 50.0% of the requests." in shown
        assert max(map(int, re.findall(r"Requests that the canary answered: (\d+)", shown))) > 0
        assert "Version 2 is live. Version 1 is kept for a rollback." in page
        assert re.search(r"Version 2 went live on 1 servers at [-\d: ]+, by local\.", page)
        assert re.search(r"Agreement of both versions</th><td class=\"number\">\d+\.\d\d%", page)
        assert "rolled out the checkpoint of retraining 1" in page
        versions = [answer.version for _, answer in seen.answers[before:]]
        turn = versions.index(2)
        assert 1 in versions[turn:]  # both answer during the canary
        assert versions[-3:] == [2] * 3

        _, page = press(desk, "rollback")
        assert "Version 1 is live. Version 2 is kept for a rollback." in page
        assert ">rolled back</td>" in page
    assert seen.errors == []


@pytest.fixture
def without_unknown_token(live: Live) -> Iterator[None]:
    """Version 2 with a tokenizer that fails on unknown characters. The requests before a canary have none."""
    folder = live.repository / "tokenizer" / "2"
    whole = {name: (folder / name).read_text("utf-8") for name in ("tokenizer.json", "fast.json")}
    tokenizer = json.loads(whole["tokenizer.json"])
    tokenizer["model"]["unk_token"] = "[NONE]"
    broken = {"tokenizer.json": json.dumps(tokenizer), "fast.json": json.dumps({"exact": False})}
    for content in (broken, whole):
        for name, text in content.items():
            (folder / name).write_text(text, "utf-8")
            seal(live.repository, 2, f"tokenizer/{name}")
        if content is broken:
            yield


@pytest.mark.usefixtures("without_unknown_token")
@pytest.mark.long
def test_the_desk_says_why_a_canary_was_taken_back(live: Live, desk: DeskClient) -> None:
    with load(live.url, ["🦄 手机壳", *TEXTS], PAUSE) as seen:
        fields = {"retraining": 1, "shadow": 0, "agreement": 0, "canary": 100, "canary_seconds": 1}
        shown, page = press(desk, "deploy", **fields)
    (why,) = re.findall('role="alert">([^<]+)<', page)
    assert re.fullmatch(r"the new version failed on \d+ of its \d+ requests", why)
    assert "Canary: version 2 answers 100.0% of the requests." in shown
    assert "The new version is not live. Version 1 answers all requests." in page
    assert seen.errors == []  # the live version answered those
    assert {answer.version for text, answer in seen.answers if text == 0} == {1}
    assert (Release.load(live.repository).live, Release.load(live.repository).candidate) == (1, None)


def test_a_version_that_disagrees_is_refused(live: Live) -> None:
    with load(live.url) as seen:
        done = aisle("deploy", "--repository", live.repository, "--version", "2", "--shadow", "2")
    assert done.returncode == 1
    assert "live texts; 90.00% are required; the most frequent change" in done.stderr
    assert seen.errors == []
    assert {answer.version for _, answer in seen.answers} == {1}
    assert (Release.load(live.repository).live, Release.load(live.repository).candidate) == (1, None)


@pytest.mark.long
def test_a_version_that_cannot_be_loaded_is_refused(live: Live) -> None:
    engine = live.repository / "encoder" / "2" / "model.bin"
    whole = engine.read_bytes()
    engine.write_bytes(whole[: len(whole) // 2])
    with load(live.url) as seen:
        done = aisle("deploy", "--repository", live.repository)
        assert done.returncode == 2
        assert "version 2 is damaged: encoder/model.bin changed since the build" in done.stderr
        # The same with a manifest that matches: now Triton itself must find the error.
        seal(live.repository, 2, "encoder/model.bin")
        done = aisle("deploy", "--repository", live.repository)
        assert done.returncode == 1
        assert "cannot serve it: load failed for model 'encoder'" in done.stderr
    engine.write_bytes(whole)
    seal(live.repository, 2, "encoder/model.bin")
    assert seen.errors == []
    assert {answer.version for _, answer in seen.answers} == {1}
    assert change("deploy", live.repository, "--version", "1")["changed"] is False
    for answer, expected in zip(live.classifier.classify(TEXTS), live.expected, strict=True):
        assert_same(answer, expected)


def test_without_a_server_the_next_start_serves_the_version(
    repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "repository"
    shutil.copytree(repository, copy, symlinks=True)
    with pytest.raises(InputError, match="no version to return to"):
        rollback(copy)
    with pytest.raises(InputError, match="has no version 7; it has 1"):
        deploy(copy, 7, Trial())
    for model in MODELS:
        shutil.copytree(copy / model / "1", copy / model / "2", symlinks=True)
    (copy / "encoder" / "2" / "decisions.json").unlink()
    unseal(copy, 2, "encoder/decisions.json")
    assert deploy(copy, 2, Trial())["servers"] == 0
    assert "version 2 has no decisions, unlike version 1" in capsys.readouterr().err
    assert (Release.load(copy).live, Release.load(copy).previous) == (2, 1)
    assert rollback(copy)["version"] == 1
    replace(Release.load(copy), candidate=2, share=0.5).save(copy)  # as a rollout that was killed leaves it
    assert deploy(copy, 1, Trial())["changed"] is False
    assert (Release.load(copy).live, Release.load(copy).candidate, Release.load(copy).share) == (1, None, 0)
    with (copy / ".deploying").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="is running"):
            rollback(copy)
        assert run(["deploy", "no/checkpoint", "--repository", str(copy)]) == 2  # before the build
        assert "is running" in capsys.readouterr().err
    for content in ("{", "[1]", '{"live": "1"}', '{"live": 1, "share": "all"}', '{"live": 1, "candidate": [2]}'):
        (copy / "release.json").write_text(content)
        with pytest.raises(InputError, match=r"release\.json is damaged"):
            Release.load(copy)


def test_metrics_of_several_servers_are_summed(tmp_path: Path) -> None:
    for port, agreed in ((1, 3), (2, 5)):
        traffic = {"shadow_compared": 6, "shadow_agreed": agreed, "changes": {"a → b": 6 - agreed}}
        Status(f"0.0.0.0:{port}", revision=1, traffic=traffic).write(tmp_path)
    assert total(servers(tmp_path)) == {"shadow_compared": 12, "shadow_agreed": 8, "changes": {"a → b": 4}}
    with Status("0.0.0.0:2").beating(tmp_path):
        pass
    assert [path.name.endswith("-1.json") for path in (tmp_path / ".servers").iterdir()] == [True]


@pytest.fixture
def wrong_clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers whose files look fifty years old or from the future."""
    write = release._write

    def skewed(path: Path, value: dict[str, Any]) -> None:
        write(path, value)
        os.utime(path, (0, 0) if path.name.endswith("-1.json") else (2**32, 2**32))

    monkeypatch.setattr(release, "_write", skewed)
    monkeypatch.setattr(release, "HEARTBEAT_SECONDS", 0.02)
    monkeypatch.setattr(release, "LOST_SECONDS", 1.0)


@pytest.mark.usefixtures("wrong_clocks")
def test_running_servers_are_found_without_a_common_clock(tmp_path: Path) -> None:
    old, new, ended = (Status(f"0.0.0.0:{port}") for port in (1, 2, 3))
    ended.write(tmp_path)
    with old.beating(tmp_path), new.beating(tmp_path):
        assert [each.server for each in Watch(tmp_path).settle()] == []  # the first two are not serving yet
        old.write(tmp_path)
        new.write(tmp_path)
        watch = Watch(tmp_path)
        assert [each.server for each in watch.settle()] == [old.server, new.server]
        assert [each.server for each in watch.running()] == [old.server, new.server]
        assert [each.server for each in servers(tmp_path)] == [old.server, new.server]  # it is not waited for again
        new.revision = 7  # started, but not complete: a heartbeat does not report it
        before = new.beats
        while new.beats < before + 3:
            time.sleep(0.01)
        assert [each.revision for each in servers(tmp_path)] == [0, 0]
    assert watch.settle() == []


@pytest.mark.usefixtures("wrong_clocks")
def test_a_server_whose_clock_is_wrong_is_waited_for(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "repository"
    shutil.copytree(repository, copy)
    for model in MODELS:
        shutil.copytree(copy / model / "1", copy / model / "2")
    monkeypatch.setattr(rollout_module, "FOLLOW_SECONDS", 0.5)
    status = Status("0.0.0.0:1", live=1)
    with status.beating(copy):  # and never follows
        status.write(copy)
        with pytest.raises(ServerError, match=r"0\.0\.0\.0:1 has not applied it"):
            deploy(copy, 2, Trial())
        assert Release.load(copy).live == 1


@pytest.mark.long
def test_a_trial_with_too_few_requests_fails(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout_module, "EXTRA_SECONDS", 0.1)
    before = servers(live.repository)[0].live
    for trial, what in ((Trial(canary=0.5, canary_seconds=1), "canary"), (Trial(shadow_seconds=1), "comparison")):
        with pytest.raises(ServerError, match=f"the {what} saw only 0 of the required 20 live requests"):
            deploy(live.repository, 3 - before, trial)
        assert (Release.load(live.repository).live, Release.load(live.repository).candidate) == (before, None)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["deploy", "checkpoint", "--version", "1"], "--version: cannot be given with CHECKPOINT"),
        (["deploy", "--precision", "int8"], "--precision: needs CHECKPOINT"),
        (["deploy", "--trial-requests", "3"], "needs --shadow SECONDS or --canary SHARE"),
        (["deploy", "--version", "3", "--repository", "not/there"], "not/there is not a model repository"),
        (["deploy", "--repository", "not/there"], "not/there is not a model repository"),
        (["rollback", "--repository", "not/there"], "not/there is not a model repository"),
    ],
)
def test_an_impossible_rollout_is_one_line(arguments: list[str], complaint: str) -> None:
    done = aisle(*arguments)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert complaint in done.stderr


def test_the_repository_that_triton_reads(repository: Path, tmp_path: Path) -> None:
    """Each ensemble names the same version for all steps, and a GPU configuration is used if requested."""
    view = ServedRepository(repository, tmp_path / "view", "gpu")
    view.add_version(1)
    view.write_ensemble(ENSEMBLE, 1)
    assert "KIND_GPU" in (view.folder / "encoder" / "config.pbtxt").read_text("utf-8")
    assert "KIND_GPU" not in (view.folder / "tokenizer" / "config.pbtxt").read_text("utf-8")
    ensemble = (view.folder / "product_classifier" / "config.pbtxt").read_text("utf-8")
    assert (ensemble.count("model_version: 1\n"), "model_version: -1" in ensemble) == (2, False)
    assert [path.name for path in (view.folder / "product_classifier").glob("[0-9]*")] == ["1"]
    view.remove_version(1)
    assert view.versions() == set()
    assert (repository / "encoder" / "1" / "model.bin").exists()
    bound = tmp_path / "bound"
    shutil.copytree(repository, bound, symlinks=True)
    own = bound / "product_classifier" / "configs" / "own.pbtxt"
    own.parent.mkdir()
    own.write_text(ensemble, "utf-8")
    with pytest.raises(InputError, match="each step's model_version must be -1"):
        ServedRepository(bound, tmp_path / "other", "own").write_ensemble(ENSEMBLE, 1)


def test_every_file_of_a_version_is_checked(repository: Path, tmp_path: Path) -> None:
    copy = tmp_path / "repository"
    shutil.copytree(repository, copy, symlinks=True)
    check_version(copy, 1)
    for name, content in (("encoder/1/labels.json", "[]"), ("tokenizer/1/extra.json", "{}")):
        path = copy / name
        before = path.read_bytes() if path.exists() else None
        path.write_text(content)
        with pytest.raises(InputError, match=f"damaged: {name.replace('/1/', '/')} changed since the build"):
            check_version(copy, 1)
        path.unlink() if before is None else path.write_bytes(before)
    (copy / "product_classifier" / "1" / MANIFEST).unlink()
    with pytest.raises(InputError, match="damaged"):
        check_version(copy, 1)
