import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from aisle.build import build as building
from aisle.build.build import GateError, build
from aisle.build.engine import EngineSpec, load_engine
from aisle.build.repository import MODELS, latest_version, new_version, versions
from aisle.errors import InputError
from aisle.preprocess.encode import Encoder
from aisle.train.checkpoint import load_model
from aisle.train.evaluate import logits_of


def test_both_targets_agree_with_pytorch(checkpoint: Path, repository: Path, tmp_path: Path) -> None:
    encoder = Encoder(checkpoint / "tokenizer.json")
    texts = ["红富士苹果", "手机壳 磨砂防摔 适用苹果手机", "wireless earbuds", "洗发水 500ml"] * 10
    tokens = encoder.tokens(texts)
    expected = logits_of(load_model(checkpoint), tokens, "expected")
    build(checkpoint, tmp_path / "repository", "onnxruntime", "fp32")
    for folder in (repository / "encoder" / "1", tmp_path / "repository" / "encoder" / "1"):
        logits = load_engine(folder)(np.concatenate(tokens), np.array([len(ids) for ids in tokens]))
        np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_a_version_is_whole_and_says_what_it_is(repository: Path, checkpoint: Path) -> None:
    number = latest_version(repository)
    assert {p.name for p in (repository / "encoder" / str(number)).iterdir()} == {
        "engine.json",
        "model.bin",
        "model.py",
        "model.xml",
    }
    spec = EngineSpec.load(repository / "encoder" / str(number))
    assert (spec.target, spec.precision, spec.max_tokens) == ("openvino", "fp32", 128)
    for name, model in (("tokenizer.json", "tokenizer"), ("labels.json", "labeler")):
        assert (repository / model / str(number) / name).read_bytes() == (checkpoint / name).read_bytes()


def test_the_same_engine_is_not_built_again_another_is_the_next_version(
    checkpoint: Path, repository: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "repository"
    shutil.copytree(repository, copy, symlinks=True)
    assert build(checkpoint, copy, "openvino", "fp32")["reused"]
    result = build(checkpoint, copy, "openvino", "bf16")
    assert (result["version"], result["reused"]) == (2, False)
    assert versions(copy) == [1, 2]
    assert result["largest_logit_error"] < 0.05


def test_an_engine_that_disagrees_is_not_installed(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(building.TOLERANCE, "fp32", 0.0)
    with pytest.raises(GateError, match="logits differ"):
        build(checkpoint, tmp_path / "repository", "openvino", "fp32")
    assert versions(tmp_path / "repository") == []
    assert not list((tmp_path / "repository").rglob(".building-*"))


def test_a_failure_leaves_nothing_half_written(tmp_path: Path) -> None:
    def fail() -> None:
        with new_version(tmp_path / "repository") as (_, folders):
            (folders["encoder"] / "model.xml").write_text("half")
            raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match="No space left on device"):
        fail()
    assert {p.name for m in MODELS for p in (tmp_path / "repository" / m).iterdir()} == {
        "config.pbtxt",
        "model.py",
        "configs",
    }


def test_damaged_checkpoints_are_named(checkpoint: Path, tmp_path: Path) -> None:
    def damaged(name: str, content: bytes | None) -> Path:
        copy = tmp_path / name.replace(".", "_")
        shutil.copytree(checkpoint, copy)
        if content is None:
            (copy / name).unlink()
        else:
            (copy / name).write_bytes(content)
        return copy

    config = json.loads((checkpoint / "config.json").read_text())
    for name, content, complaint in [
        ("labels.json", None, "lacks labels.json"),
        ("model.safetensors", b"garbage", "weights cannot be loaded"),
        ("config.json", json.dumps({**config, "model_type": "roberta"}).encode(), "only BERT"),
        ("tokenizer.json", b"{}", "no fast tokenizer"),
    ]:
        with pytest.raises(InputError, match=complaint):
            build(damaged(name, content), tmp_path / "repository", "openvino", "fp32")
    shutil.rmtree(tmp_path / "labels_json")
    with pytest.raises(InputError, match=r"2 labels for \d+ logits"):
        build(damaged("labels.json", b'["a", "b"]'), tmp_path / "repository", "openvino", "fp32")
    assert not (tmp_path / "repository").exists() or versions(tmp_path / "repository") == []


def test_a_damaged_engine_is_refused(repository: Path, tmp_path: Path) -> None:
    folder = tmp_path / "1"
    shutil.copytree(repository / "encoder" / "1", folder, symlinks=True, ignore=shutil.ignore_patterns("model.py"))
    (folder / "model.xml").write_text("<net>")
    with pytest.raises(InputError, match="cannot be loaded"):
        load_engine(folder)
    (folder / "engine.json").write_text("{")
    with pytest.raises(InputError, match="holds no engine"):
        load_engine(folder)
