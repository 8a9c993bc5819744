import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from aisle.build import gate, tensorrt
from aisle.build.build import build
from aisle.build.compare import compare
from aisle.build.engine import EngineSpec, load_engine
from aisle.build.export import DTYPES, export
from aisle.build.gate import Gate
from aisle.build.graph import PackedBert
from aisle.build.material import Table
from aisle.build.quantize import linears, quantized
from aisle.build.repository import MODELS, latest_version, new_version, versions
from aisle.errors import InputError
from aisle.preprocess.encode import Encoder
from aisle.train.checkpoint import load_model
from aisle.train.evaluate import logits_of
from tests.conftest import aisle
from tests.test_graph import random_bert

TEXTS = ["红富士苹果", "手机壳 磨砂防摔 适用苹果手机", "wireless earbuds", "洗发水 500ml"] * 10


def logits(folder: Path, tokens: list[list[int]]) -> np.ndarray:
    return load_engine(folder)(np.concatenate(tokens), np.array([len(ids) for ids in tokens]))


@pytest.mark.parametrize(("precision", "error"), [("fp32", 1e-4), ("bf16", 0.05), ("int8", 0.1)])
def test_every_precision_agrees_with_pytorch(checkpoint: Path, tmp_path: Path, precision: str, error: float) -> None:
    # The little model is undecided about many a text: a few of 800 may turn over.
    result = build(checkpoint, tmp_path / "repository", "openvino", precision, gate=Gate(0.99, 0.01))
    assert result["agreement"] >= (1.0 if precision == "fp32" else 0.99)
    tokens = Encoder(checkpoint / "tokenizer.json").tokens(TEXTS)
    expected = logits_of(load_model(checkpoint), tokens, "expected")
    actual = logits(tmp_path / "repository" / "encoder" / "1", tokens)
    assert np.abs(actual - expected).max() < error * np.abs(expected).max()


def test_a_version_is_whole_and_says_what_it_is(repository: Path, checkpoint: Path) -> None:
    folder = repository / "encoder" / str(latest_version(repository))
    assert {p.name for p in folder.iterdir()} == {"engine.json", "model.bin", "model.py", "model.xml", "report.json"}
    spec = EngineSpec.load(folder)
    assert (spec.target, spec.precision, spec.max_tokens) == ("openvino", "fp32", 128)
    report = json.loads((folder / "report.json").read_text())
    assert report["gate"] == {"least_agreement": 0.999, "largest_f1_loss": 0.001, "loosened": False}
    labels = repository / "labeler" / folder.name / "labels.json"
    assert labels.read_bytes() == (checkpoint / "labels.json").read_bytes()
    served = Encoder(repository / "tokenizer" / folder.name / "tokenizer.json")
    assert served.tokens(TEXTS) == Encoder(checkpoint / "tokenizer.json").tokens(TEXTS)


def test_the_same_engine_is_not_built_again_another_is_the_next_version(
    checkpoint: Path, repository: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "repository"
    shutil.copytree(repository, copy, symlinks=True)
    assert build(checkpoint, copy, "openvino", "fp32")["reused"]
    result = build(checkpoint, copy, "openvino", "fp32", max_tokens=64)
    assert (result["version"], result["reused"]) == (2, False)
    assert versions(copy) == [1, 2]
    assert Encoder(copy / "tokenizer" / "2" / "tokenizer.json").max_tokens == 64
    assert EngineSpec.load(copy / "encoder" / "2").max_tokens == 64


def test_an_engine_that_disagrees_is_not_installed(checkpoint: Path, tmp_path: Path) -> None:
    done = aisle(
        *("build", checkpoint, "--repository", tmp_path / "repository", "--precision", "fp32", "--gate", "1.01", "0")
    )
    assert done.returncode == 3
    assert "101.00%" in done.stderr
    assert "does not answer as" in done.stderr
    assert versions(tmp_path / "repository") == []
    assert not list((tmp_path / "repository").rglob(".building-*"))


def test_a_loosened_gate_is_told(checkpoint: Path, tmp_path: Path) -> None:
    result = build(checkpoint, tmp_path / "repository", "openvino", "fp32", gate=Gate(0.5, 0.5))
    assert result["gate"] == {"least_agreement": 0.5, "largest_f1_loss": 0.5, "loosened": True}


def test_the_layer_that_int8_spoils_stays_in_fp16(checkpoint: Path, tmp_path: Path) -> None:
    """One channel of an attention's output is made 10,000 times larger, and smaller again by what reads it."""
    spoilt = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, spoilt)
    model = load_model(checkpoint)
    attention = model.bert.encoder.layer[1].attention
    with torch.no_grad():
        attention.self.value.weight[3] *= 1e4
        attention.self.value.bias[3] *= 1e4
        attention.output.dense.weight[:, 3] /= 1e4
    model.save_pretrained(spoilt)
    result = build(spoilt, tmp_path / "repository", "openvino", "int8")
    assert result["layers_in_fp16"] == ["layers.1.project"]
    assert max(result["sensitivity"], key=result["sensitivity"].__getitem__) == "layers.1.project"
    assert result["agreement"] >= 0.99


def test_tensorrt_compiles_the_demo_model(checkpoint: Path, tmp_path: Path) -> None:
    for version, precision in enumerate(("fp16", "int8"), start=1):
        result = build(checkpoint, tmp_path / "repository", "tensorrt-rtx", precision)
        folder = tmp_path / "repository" / "encoder" / str(version)
        assert (folder / "model.plan").stat().st_size > 1_000_000
        assert "Opset version" in (folder / "build.log").read_text()
        assert result["checked_on"] == "openvino (no GPU)" or tensorrt.gpu_name()
        spec = EngineSpec.load(folder)
        assert spec.runtime == tensorrt.version_of("tensorrt-rtx")
        assert len(spec.graph) == 64


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_tensorrt_compiles_bert_base(tmp_path: Path, precision: str) -> None:
    size = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
    model = random_bert(0, **size, vocab_size=21128, max_position_embeddings=512)
    graph = PackedBert(model, DTYPES[precision])
    if precision == "int8":
        graph = quantized(graph, dict.fromkeys(linears(graph), 4.0))
    export(graph, 128, tmp_path / "model.onnx")
    tensorrt.compile_plan(tmp_path / "model.onnx", tmp_path, "tensorrt-rtx", 128, tensorrt.Options())
    parameters = sum(each.numel() for each in model.parameters())
    width = {"fp16": 2, "int8": 1}[precision]
    assert parameters * width * 0.9 < (tmp_path / "model.plan").stat().st_size


@pytest.mark.skipif(bool(tensorrt.gpu_name()), reason="refusals of a machine without a GPU")
def test_a_plan_that_does_not_fit_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    build(checkpoint, tmp_path / "repository", "tensorrt-rtx", "fp16")
    folder = tmp_path / "repository" / "encoder" / "1"
    with pytest.raises(InputError, match="needs an NVIDIA GPU"):
        load_engine(folder)
    spec = json.loads((folder / "engine.json").read_text())
    (folder / "engine.json").write_text(json.dumps({**spec, "runtime": "TensorRT-RTX 0.9"}))
    with pytest.raises(InputError, match=r"built by TensorRT-RTX 0\.9 and this is TensorRT-RTX 1.*build it again"):
        load_engine(folder)


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
    rows = (checkpoint / "sample.jsonl").read_bytes().splitlines(keepends=True)
    for name, content, complaint in [
        ("labels.json", None, "lacks labels.json"),
        ("model.safetensors", b"garbage", "weights cannot be loaded"),
        ("config.json", json.dumps({**config, "model_type": "roberta"}).encode(), "only BERT"),
        ("tokenizer.json", b"{}", "no fast tokenizer"),
        ("sample.jsonl", None, "give the training table with --data"),
        ("sample.jsonl", b"{", "sample.jsonl is damaged"),
        ("sample.jsonl", b"".join(rows[:20]), "usable rows are too few"),
    ]:
        with pytest.raises(InputError, match=complaint):
            build(damaged(name, content), tmp_path / "repository", "openvino", "fp32")
        shutil.rmtree(tmp_path / name.replace(".", "_"))
    with pytest.raises(InputError, match=r"2 labels for \d+ logits"):
        build(damaged("labels.json", b'["a", "b"]'), tmp_path / "repository", "openvino", "fp32")
    assert not (tmp_path / "repository").exists() or versions(tmp_path / "repository") == []


def test_other_texts_to_calibrate_with(checkpoint: Path, sample: Path, tmp_path: Path) -> None:
    few, other = tmp_path / "few.csv", tmp_path / "other.csv"
    few.write_text("".join(sample.read_text("utf-8").splitlines(keepends=True)[:25]), "utf-8")
    other.write_text("text,category\n苹果,no such category\n", "utf-8")
    for path, complaint in ((few, "too few to calibrate"), (other, "unknown to the checkpoint")):
        with pytest.raises(InputError, match=complaint):
            build(checkpoint, tmp_path / "repository", "openvino", "int8", data=Table(path, "text", "category"))
    table = Table(sample, "text", "category")
    assert build(checkpoint, tmp_path / "repository", "openvino", "int8", data=table)["held_out_texts"] > 500


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--target", "tpu"], "choose from openvino, tensorrt, tensorrt-rtx"),
        (["--precision", "int4"], "choose from int8, bf16, fp32"),
        (["--max-tokens", "100"], "multiple of 64"),
        (["--max-tokens", "256"], "reads 128 tokens at most"),
    ],
)
def test_bad_options_are_one_line(checkpoint: Path, tmp_path: Path, arguments: list[str], complaint: str) -> None:
    done = aisle("build", checkpoint, "--repository", tmp_path / "repository", "--target", "openvino", *arguments)
    assert done.returncode == 2
    assert complaint in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_full_disk_is_told_beforehand(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(InputError, match="0 MiB free"):
        build(checkpoint, tmp_path / "repository", "openvino", "fp32")
    assert versions(tmp_path / "repository") == []


def test_a_damaged_engine_is_refused(repository: Path, tmp_path: Path) -> None:
    folder = tmp_path / "1"
    shutil.copytree(repository / "encoder" / "1", folder, symlinks=True, ignore=shutil.ignore_patterns("model.py"))
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
        tensorrt.compile_plan(tmp_path / "model.onnx", tmp_path, "tensorrt-rtx", 128, tensorrt.Options())


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
