import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from aisle.build import build as build_module
from aisle.build import compile_tensorrt, gate, recipe
from aisle.build.build import build
from aisle.build.compare import compare
from aisle.build.cuda_runtime import gpu_name
from aisle.build.engine import EngineSpec, Logits, load_engine
from aisle.build.export import DTYPES, export
from aisle.build.gate import Gate, GateError, accuracy
from aisle.build.graph import PackedEncoder
from aisle.build.inputs import DataSource, TextSource
from aisle.build.quantize import linears, quantized
from aisle.build.repository import MODELS, latest_version, new_version, version_fingerprint, versions
from aisle.errors import InputError
from aisle.preprocess.encode import TextTokenizer
from aisle.train.core.checkpoint import Checkpoint
from aisle.train.core.predict import logits_of
from tests.conftest import aisle
from tests.test_graph import random_bert

TEXTS = ["红富士苹果", "手机壳 磨砂防摔 适用苹果手机", "wireless earbuds", "洗发水 500ml"] * 10


def logits(folder: Path, tokens: list[list[int]]) -> Logits:
    return load_engine(folder)(np.concatenate(tokens), np.array([len(ids) for ids in tokens]))


@pytest.mark.parametrize(
    ("precision", "error"),
    [
        ("fp32", 1e-4),
        pytest.param("bf16", 0.05, marks=pytest.mark.long),
        pytest.param("int8", 0.1, marks=pytest.mark.long),
    ],
)
def test_every_precision_agrees_with_pytorch(checkpoint: Path, tmp_path: Path, precision: str, error: float) -> None:
    # The small model is undecided about many texts: a few of 800 may change.
    result = build(checkpoint, tmp_path / "repository", "openvino", precision, gate=Gate(0.99, 0.01))
    assert result["agreement"] >= (1.0 if precision == "fp32" else 0.99)
    tokens = Checkpoint(checkpoint).tokenizer.tokens(TEXTS)
    expected = logits_of(Checkpoint(checkpoint).model, tokens, "expected")
    actual = logits(tmp_path / "repository" / "encoder" / "1", tokens)
    assert np.abs(actual - expected).max() < error * np.abs(expected).max()


def test_a_version_is_complete_and_described(repository: Path, checkpoint: Path) -> None:
    folder = repository / "encoder" / str(latest_version(repository))
    engine = {"engine.json", "model.bin", "model.xml"}
    assert {p.name for p in folder.iterdir()} == {*engine, "decisions.json", "labels.json", "report.json"}
    spec = EngineSpec.load(folder)
    assert (spec.target, spec.precision, spec.max_tokens) == ("openvino", "fp32", 128)
    report = json.loads((folder / "report.json").read_text())
    assert report["gate"] == {"least_agreement": 0.999, "largest_f1_loss": 0.001, "loosened": False}
    labels = folder / "labels.json"
    assert labels.read_bytes() == (checkpoint / "labels.json").read_bytes()
    assert (folder / "decisions.json").read_bytes() == (checkpoint / "decisions.json").read_bytes()
    assert report["decision_agreement"] >= 0.999
    served = TextTokenizer(repository / "tokenizer" / folder.name / "tokenizer.json")
    assert served.tokens(TEXTS) == Checkpoint(checkpoint).tokenizer.tokens(TEXTS)


@pytest.mark.long
def test_only_a_different_engine_is_built_again(checkpoint: Path, repository: Path, tmp_path: Path) -> None:
    copy = tmp_path / "repository"
    shutil.copytree(repository, copy, symlinks=True)
    assert build(checkpoint, copy, "openvino", "fp32")["reused"]
    result = build(checkpoint, copy, "openvino", "fp32", max_tokens=64)
    assert (result["version"], result["reused"]) == (2, False)
    shutil.copytree(checkpoint, tmp_path / "checkpoint")
    decisions = Checkpoint(checkpoint).decisions
    assert decisions
    replace(decisions, least_probability=0.123).save(tmp_path / "checkpoint")
    result = build(tmp_path / "checkpoint", copy, "openvino", "fp32")
    assert (result["version"], result["reused"]) == (3, False)
    assert version_fingerprint(copy, 3) != version_fingerprint(copy, 1)
    assert versions(copy) == [1, 2, 3]
    assert TextTokenizer(copy / "tokenizer" / "2" / "tokenizer.json").max_tokens == 64
    assert EngineSpec.load(copy / "encoder" / "2").max_tokens == 64


@pytest.mark.long
def test_an_engine_that_disagrees_is_not_installed(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of_wrong_signs(logits: Any, held_out: Any) -> dict[str, Any]:
        return accuracy(-logits, held_out)

    monkeypatch.setattr(build_module, "accuracy", of_wrong_signs)
    done = aisle("build", checkpoint, "--repository", tmp_path / "repository", "--precision", "fp32")
    assert done.returncode == 3
    assert "99.90%" in done.stderr
    assert "does not agree with" in done.stderr
    assert versions(tmp_path / "repository") == []
    assert not list((tmp_path / "repository").rglob(".building-*"))


@pytest.mark.long
def test_a_loosened_gate_is_reported(checkpoint: Path, tmp_path: Path) -> None:
    result = build(checkpoint, tmp_path / "repository", "openvino", "fp32", gate=Gate(0.5, 0.5))
    assert result["gate"] == {"least_agreement": 0.5, "largest_f1_loss": 0.5, "loosened": True}
    done = aisle("deploy", "--repository", tmp_path / "repository")
    assert "version 1: its gate was loosened: 50.00% agreement required" in done.stderr
    strict = build(checkpoint, tmp_path / "repository", "openvino", "fp32", gate=Gate(0.9999, 0.0005))
    assert (strict["version"], strict["gate"]["loosened"]) == (2, False)  # a stricter gate than the default


def test_an_engine_with_another_recipe_is_not_reused(
    checkpoint: Path, repository: Path, sample: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another gate, other texts, compiler options or code, or later damage: each leads to a new build."""
    made: list[Gate] = []

    def engine(*arguments: Any) -> dict[str, Any]:
        _, spec, folder, gate, _ = arguments
        spec.save(folder)
        made.append(gate)
        return {"agreement": 0.9, "f1_loss": 0.0, "macro_f1": 0.9, "not_finite": 0, "held_out_texts": 100}

    monkeypatch.setattr(build_module, "build_engine", engine)
    copy = tmp_path / "repository"
    how: dict[str, Any] = {"gate": Gate(0.5, 0.5)}
    assert build(checkpoint, copy, "openvino", "fp32", **how)["version"] == 1
    assert build(checkpoint, copy, "openvino", "fp32", **how)["reused"]
    with pytest.raises(GateError):
        build(checkpoint, copy, "openvino", "fp32")  # the strict gate, which 0.9 misses
    changes: list[dict[str, Any]] = [
        {"gate": Gate(0.6, 0.5)},
        {"data": DataSource(sample, "text", "category")},
        {"held_out": TextSource(sample, "text")},
        {"options": compile_tensorrt.CompilerOptions(version_compatible=True)},
    ]
    for number, change in enumerate(changes, start=2):
        result = build(checkpoint, copy, "openvino", "fp32", **{**how, **change})
        assert (result["version"], result["reused"]) == (number, False)
        assert build(checkpoint, copy, "openvino", "fp32", **{**how, **change})["reused"]
    options = compile_tensorrt.CompilerOptions(
        version_compatible=True, timing_cache=tmp_path / "cache"
    )  # which changes only the duration
    assert build(checkpoint, copy, "openvino", "fp32", **how, options=options)["reused"]
    monkeypatch.setattr(recipe, "_code", lambda: "another")
    assert not build(checkpoint, copy, "openvino", "fp32", **how, options=options)["reused"]
    (copy / "encoder" / "6" / "labels.json").write_text("[]")
    assert not build(checkpoint, copy, "openvino", "fp32", **how, options=options)["reused"]
    assert len(made) == 8


def test_weights_that_do_not_fit_the_type_are_named(checkpoint: Path, tmp_path: Path) -> None:
    """It is the embedding of a word that no held-out text contains, so the gate would not see it."""
    spoilt = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, spoilt)
    model = Checkpoint(checkpoint).model
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[4] = 1e5
    model.save_pretrained(spoilt)
    for precision in ("int8", "fp16"):
        with pytest.raises(InputError, match=rf"{precision} cannot hold the weights of word\.weight: give .* bf16"):
            build(spoilt, tmp_path / "repository", "tensorrt-rtx" if precision == "fp16" else "openvino", precision)
    assert versions(tmp_path / "repository") == []


@pytest.mark.long
def test_a_layer_that_int8_damages_stays_in_fp16(checkpoint: Path, tmp_path: Path) -> None:
    """One channel of an attention's output, on which the label is made to depend, is 10,000 times larger."""
    spoilt = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, spoilt)
    model = Checkpoint(checkpoint).model
    attention = model.bert.encoder.layer[0].attention
    with torch.no_grad():
        attention.self.value.weight[3] *= 1e4
        attention.self.value.bias[3] *= 1e4
        attention.output.dense.weight *= 64
        attention.output.dense.weight[:, 3] /= 1e4
    model.save_pretrained(spoilt)
    result = build(spoilt, tmp_path / "repository", "openvino", "int8")
    assert result["layers_in_fp16"] == ["layers.0.project"]
    assert max(result["sensitivity"], key=result["sensitivity"].__getitem__) == "layers.0.project"
    assert result["agreement"] >= 0.99


@pytest.mark.parametrize("layers", [1, 2, 7, 16])
def test_the_fewest_layers_stay_in_fp16(layers: int) -> None:
    """The last attempt is the result, because its engine lies in the folder."""
    gate = Gate(0.99, 0.005)
    failed = {"agreement": 0.9, "f1_loss": 0.0, "not_finite": 0}
    for enough in range(1, layers + 2):
        tried: list[int] = []

        def attempt(skip: Sequence[str], enough: int = enough, tried: list[int] = tried) -> dict[str, Any]:
            tried.append(len(skip))
            return {**failed, "agreement": 1.0 if len(skip) >= enough else 0.9, "layers_in_fp16": list(skip)}

        ranking = [(str(place), 1 / place) for place in range(1, layers + 1)]
        row = build_module._keep_layers_in_fp16(failed, attempt, ranking, gate)
        assert len(row["layers_in_fp16"]) == tried[-1] == min(enough, layers)
        assert tried[0] == 1  # mostly enough


@pytest.mark.long
def test_tensorrt_compiles_the_demo_model(checkpoint: Path, tmp_path: Path) -> None:
    for version, precision in enumerate(("fp16", "int8"), start=1):
        result = build(checkpoint, tmp_path / "repository", "tensorrt-rtx", precision)
        folder = tmp_path / "repository" / "encoder" / str(version)
        assert (folder / "model.plan").stat().st_size > 1_000_000
        assert "Opset version" in (folder / "build.log").read_text()
        assert result["checked_on"] == "openvino (no GPU)" or gpu_name()
        spec = EngineSpec.load(folder)
        assert spec.runtime == compile_tensorrt.version_of("tensorrt-rtx")
        assert len(spec.graph) == 64


@pytest.mark.long
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_tensorrt_compiles_bert_base(tmp_path: Path, precision: str) -> None:
    size = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
    model = random_bert(0, **size, vocab_size=21128, max_position_embeddings=512)
    graph = PackedEncoder(model, DTYPES[precision])
    if precision == "int8":
        graph = quantized(graph, dict.fromkeys(linears(graph), 4.0))
    export(graph, 128, tmp_path / "model.onnx")
    compile_tensorrt.compile_plan(
        tmp_path / "model.onnx", tmp_path, "tensorrt-rtx", 128, compile_tensorrt.CompilerOptions()
    )
    parameters = sum(each.numel() for each in model.parameters())
    width = {"fp16": 2, "int8": 1}[precision]
    assert parameters * width * 0.9 < (tmp_path / "model.plan").stat().st_size


@pytest.mark.skipif(bool(gpu_name()), reason="refusals of a machine without a GPU")
@pytest.mark.long
def test_a_plan_for_another_machine_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    build(checkpoint, tmp_path / "repository", "tensorrt-rtx", "fp16")
    folder = tmp_path / "repository" / "encoder" / "1"
    with pytest.raises(InputError, match="needs an NVIDIA GPU"):
        load_engine(folder)
    spec = json.loads((folder / "engine.json").read_text())
    (folder / "engine.json").write_text(json.dumps({**spec, "runtime": "TensorRT-RTX 0.9"}))
    with pytest.raises(InputError, match=r"built with TensorRT-RTX 0\.9, but this machine has TensorRT-RTX 1"):
        load_engine(folder)


def test_a_failed_build_leaves_no_files(tmp_path: Path) -> None:
    def fail() -> None:
        with new_version(tmp_path / "repository") as (_, folders):
            (folders["encoder"] / "model.xml").write_text("half")
            raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match="No space left on device"):
        fail()
    assert [p.name for m in MODELS for p in (tmp_path / "repository" / m).iterdir()] == []


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
    rows = (checkpoint / "sample.jsonl").read_bytes().splitlines(keepends=True)
    for name, content, complaint in [
        ("labels.json", None, "lacks labels.json"),
        ("model.safetensors", b"garbage", "weights cannot be loaded"),
        ("config.json", json.dumps({**config, "model_type": "gpt2"}).encode(), "only these can be trained and served"),
        ("config.json", json.dumps({**config, "model_type": "roberta"}).encode(), "do not belong to a roberta"),
        ("tokenizer.json", b"{}", "is not a fast tokenizer"),
        ("sample.jsonl", None, "name the training table after it"),
        ("sample.jsonl", b"{", "sample.jsonl is damaged"),
        ("decisions.json", b"{", "decisions.json is damaged"),
        ("decisions.json", json.dumps({}).encode(), "decisions.json is damaged"),
        ("sample.jsonl", b"".join(rows[:20]), "usable rows are too few"),
    ]:
        with pytest.raises(InputError, match=complaint):
            build(damaged(name, content), tmp_path / "repository", "openvino", "fp32")
        shutil.rmtree(tmp_path / name.replace(".", "_"))
    with pytest.raises(InputError, match=r"2 labels for \d+ logits"):
        build(damaged("labels.json", b'["a", "b"]'), tmp_path / "repository", "openvino", "fp32")
    assert not (tmp_path / "repository").exists() or versions(tmp_path / "repository") == []


@pytest.mark.long
def test_calibration_with_other_texts(checkpoint: Path, sample: Path, tmp_path: Path) -> None:
    few, other = tmp_path / "few.csv", tmp_path / "other.csv"
    few.write_text("".join(sample.read_text("utf-8").splitlines(keepends=True)[:25]), "utf-8")
    other.write_text("text,category\n苹果,no such category\n", "utf-8")
    for path, complaint in ((few, "too few to calibrate"), (other, "unknown to the checkpoint")):
        with pytest.raises(InputError, match=complaint):
            build(checkpoint, tmp_path / "repository", "openvino", "int8", data=DataSource(path, "text", "category"))
    table = DataSource(sample, "text", "category")
    assert build(checkpoint, tmp_path / "repository", "openvino", "int8", data=table)["held_out_texts"] > 500


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--target", "tpu"], "choose from openvino, cuda, tensorrt, tensorrt-rtx"),
        (["--precision", "int4"], "choose from int8, bf16, fp32"),
        (["--max-tokens", "100"], "multiple of 64"),
        (["--max-tokens", "256"], "has positions for only 128 tokens"),
    ],
)
def test_bad_options_are_one_line(checkpoint: Path, tmp_path: Path, arguments: list[str], complaint: str) -> None:
    done = aisle("build", checkpoint, "--repository", tmp_path / "repository", "--target", "openvino", *arguments)
    assert done.returncode == 2
    assert complaint in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_full_disk_is_reported_before_the_build(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(InputError, match="0 MiB free"):
        build(checkpoint, tmp_path / "repository", "openvino", "fp32")
    assert versions(tmp_path / "repository") == []


def test_a_damaged_engine_is_refused(repository: Path, tmp_path: Path) -> None:
    folder = tmp_path / "1"
    shutil.copytree(repository / "encoder" / "1", folder)
    (folder / "model.xml").write_text("<net>")
    with pytest.raises(InputError, match="cannot be loaded"):
        load_engine(folder)
    (folder / "engine.json").write_text("{")
    with pytest.raises(InputError, match="holds no engine"):
        load_engine(folder)


@pytest.mark.parametrize("content", [b"\xff" * 1000, b"", b"\x0a\x00"])
def test_a_corrupt_graph_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(InputError, match=r"cannot parse model\.onnx"):
        compile_tensorrt.compile_plan(
            tmp_path / "model.onnx", tmp_path, "tensorrt-rtx", 128, compile_tensorrt.CompilerOptions()
        )


@pytest.mark.long
def test_compare_shows_every_engine(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "TIMED_SECONDS", 0.1)
    result = compare(checkpoint, tmp_path / "report.html")
    rows = {(row["engine"], row["precision"]): row for row in result["rows"]}
    assert {("PyTorch", "fp32"), ("openvino", "int8"), ("openvino", "bf16"), ("tensorrt-rtx", "fp16")} <= rows.keys()
    assert all(row["agreement"] > 0.99 for row in rows.values())
    assert rows["openvino", "fp32"]["gate"] == "passed"
    assert rows["openvino", "int8"]["megabytes"] < rows["openvino", "bf16"]["megabytes"]
    assert json.loads((tmp_path / "report.json").read_text()) == result
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 2
    assert "INT8 for openvino" in page
