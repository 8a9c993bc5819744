"""Flat tokens compute what Hugging Face's padded BERT computes, with any filling of a bucket."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from aisle.build import cuda_device, cuda_runtime, cuda_version, fp8
from aisle.build.build import _keep_layers_in_fp16, build
from aisle.build.cuda_layout import Bucket, Layout, buckets
from aisle.build.cuda_runner import CudaRunner
from aisle.build.engine import EngineSpec, Logits, load_engine
from aisle.build.gate import Gate
from aisle.build.graph import PackedEncoder
from aisle.build.quantize import linears
from aisle.build.varlen import Fp8Linear, VarlenEncoder, copy_weights, shape_of
from aisle.errors import InputError
from aisle.preprocess.pack import Ints, pack
from aisle.train.core.checkpoint import Checkpoint
from aisle.train.core.predict import logits_of, pad
from tests.test_graph import random_bert

CPU = torch.device("cpu")


def varlen(model: Any, limit: int = 128, dtype: torch.dtype = torch.float32, **settings: bool) -> VarlenEncoder:
    return copy_weights(VarlenEncoder(shape_of(model), limit, dtype, **settings), model)


def texts_of(rng: np.random.Generator, lengths: Ints) -> tuple[Ints, Ints]:
    return rng.integers(0, 500, lengths.sum()), lengths


def expected_of(model: Any, tokens: Ints, lengths: Ints) -> Logits:
    input_ids, attention_mask = pad([text.tolist() for text in np.split(tokens, np.cumsum(lengths)[:-1])])
    with torch.inference_mode():
        logits: Logits = model(input_ids=input_ids, attention_mask=attention_mask).logits.numpy()
    return logits


@pytest.mark.parametrize("texts", [1, 2, 7, 64, 300])
@pytest.mark.parametrize("settings", [{}, {"num_attention_heads": 2, "num_hidden_layers": 1}, {"type_vocab_size": 1}])
@pytest.mark.parametrize("limit", [64, 128])
def test_flat_is_exact(texts: int, settings: dict[str, int], limit: int) -> None:
    model = random_bert(texts, **settings)
    rng = np.random.default_rng(texts)
    lengths = rng.integers(1, limit + 1, texts)
    lengths[0] = [1, limit][texts % 2]
    tokens, _ = texts_of(rng, lengths)
    runner = CudaRunner(varlen(model, limit), limit, CPU, max_batch_tokens=2048)
    actual, computed = runner(tokens, lengths)
    assert np.abs(actual - expected_of(model, tokens, lengths)).max() < 1e-4
    assert len(tokens) <= computed


def test_a_batch_does_not_affect_the_next() -> None:
    model = random_bert(0)
    runner = CudaRunner(varlen(model), 128, CPU, max_batch_tokens=1024)
    rng = np.random.default_rng(0)
    for count in (12, 1, 30, 2):
        tokens, lengths = texts_of(rng, rng.integers(1, 60, count))
        actual, _ = runner(tokens, lengths)
        assert np.abs(actual - expected_of(model, tokens, lengths)).max() < 1e-4


@pytest.mark.parametrize(("tokens", "texts"), [(1, 1), (64, 1), (65, 65), (130, 3), (1000, 400), (4097, 90)])
def test_a_bucket_is_filled_to_the_last_token(tokens: int, texts: int) -> None:
    layout = Layout(8192, 1024, 128)
    rng = np.random.default_rng(0)
    cuts = np.sort(rng.choice(np.arange(1, tokens), texts - 1, replace=False)) if texts > 1 else np.array([], int)
    lengths = np.diff(np.concatenate([[0], cuts, [tokens]]))
    bucket = layout.bucket(tokens, texts)
    assert bucket is not None
    host = np.full(layout.size, -7, np.int32)
    layout.fill(host, np.arange(tokens), lengths, bucket)
    input_ids, position_ids, offsets = layout.views(host, bucket)
    assert (input_ids[:tokens] == np.arange(tokens)).all()
    assert (input_ids[tokens:] == 0).all()
    assert (np.diff(offsets)[:texts] == lengths).all()
    rest = np.diff(offsets)[texts:]
    assert rest.min(initial=0) >= 0
    assert rest.max(initial=0) <= 128
    assert (offsets[0], offsets[-1], len(offsets)) == (0, bucket.tokens, bucket.texts + 1)
    assert (position_ids == np.arange(bucket.tokens) - np.repeat(offsets[:-1], np.diff(offsets))).all()


def test_buckets_are_sorted_and_hold_a_full_batch() -> None:
    sizes = buckets(16384, 1024)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == Bucket(16384, 1040)
    assert all(each.texts % 16 == 0 for each in sizes)
    assert Layout(16384, 1024, 512).bucket(16384, 1024) == sizes[-1]


def test_a_batch_beyond_the_largest_bucket_is_split() -> None:
    model = random_bert(1)
    runner = CudaRunner(varlen(model), 128, CPU, max_batch_tokens=512)
    tokens, lengths = texts_of(np.random.default_rng(1), np.array([100, 128, 90, 3, 128, 128, 60, 1]))
    actual, _ = runner(tokens, lengths)
    assert np.abs(actual - expected_of(model, tokens, lengths)).max() < 1e-4


@pytest.mark.parametrize(("dtype", "error"), [(torch.float16, 0.01), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("fuse_gelu", [False, True])
def test_16_bits_are_close(dtype: torch.dtype, error: float, fuse_gelu: bool) -> None:
    model = random_bert(0)
    tokens, lengths = texts_of(np.random.default_rng(0), np.array([5, 60, 128, 1]))
    expected = expected_of(model, tokens, lengths)
    actual, _ = CudaRunner(varlen(model, dtype=dtype, fuse_gelu=fuse_gelu), 128, CPU, max_batch_tokens=512)(
        tokens, lengths
    )
    assert actual.dtype == np.float32
    assert 0 < np.abs(actual - expected).max() < error * np.abs(expected).max()


def test_fp8_is_close_and_a_saved_engine_loads_unchanged(tmp_path: Path) -> None:
    model = random_bert(0)
    tokens, lengths = texts_of(np.random.default_rng(0), np.array([5, 60, 128, 1]))
    module = varlen(model, dtype=torch.float16)
    fp8.quantize(module, fp8.largest_inputs(PackedEncoder(model).eval(), [pack(tokens, lengths, 128)]), ["layers.1.up"])
    assert [name for name, each in module.named_modules() if isinstance(each, Fp8Linear)] == [
        name for name in linears(PackedEncoder(model)) if name != "layers.1.up"
    ]
    expected, _ = CudaRunner(varlen(model), 128, CPU, max_batch_tokens=512)(tokens, lengths)
    actual, _ = CudaRunner(module, 128, CPU, max_batch_tokens=512)(tokens, lengths)
    assert 0 < np.abs(actual - expected).max() < 0.15 * np.abs(expected).max()
    cuda_version.save(module, tmp_path)
    again, _ = CudaRunner(cuda_version.load(tmp_path, "fp8", 128), 128, CPU, max_batch_tokens=512)(tokens, lengths)
    assert (again == actual).all()


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp8"])
@pytest.mark.long
def test_a_version_is_built_here_and_runs_on_any_gpu(
    checkpoint: Path, tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The small model is undecided about many texts: a few of 800 may change.
    result = build(checkpoint, tmp_path / "repository", "cuda", precision, gate=Gate(0.98, 0.02))
    folder = tmp_path / "repository" / "encoder" / "1"
    assert {each.name for each in folder.iterdir()} >= {"engine.json", "model.safetensors", "module.json"}
    spec = EngineSpec.load(folder)
    assert (spec.target, spec.precision, spec.device) == ("cuda", precision, "")
    if cuda_device.gpu_problem():
        assert result["checked_on"] == "cpu (no GPU)"
        with pytest.raises(InputError, match="needs an NVIDIA GPU"):
            load_engine(folder)
        monkeypatch.setenv(cuda_runtime.ON_CPU, "1")
    tokens = Checkpoint(checkpoint).tokenizer.tokens(["红富士苹果", "手机壳 磨砂防摔", "wireless earbuds"] * 3)
    actual = load_engine(folder)(np.concatenate(tokens), np.array([len(ids) for ids in tokens]))
    expected = logits_of(Checkpoint(checkpoint).model, tokens, "expected")
    assert np.abs(actual - expected).max() < {"fp16": 0.02, "bf16": 0.1, "fp8": 0.2}[precision] * np.abs(expected).max()


def test_the_smallest_number_of_layers_that_passes_stays_in_fp16() -> None:
    tried: list[int] = []

    def attempt(skip: Sequence[str]) -> dict[str, Any]:
        tried.append(len(skip))
        found = {"agreement": 1.0 if {"a", "b", "c"} <= set(skip) else 0.9, "f1_loss": 0.0, "not_finite": 0}
        return {**found, "skip": list(skip)}

    ranking = [(name, 1.0) for name in "abcdefgh"]
    row = _keep_layers_in_fp16(attempt([]), attempt, ranking, Gate(0.99, 0.005))
    assert row["skip"] == ["a", "b", "c"]
    assert row["sensitivity"] == dict(ranking)
    assert len(tried) <= 6


def test_the_layer_that_fp8_damages_ranks_first() -> None:
    model = random_bert(0)
    packed = [pack(*texts_of(np.random.default_rng(0), np.array([5, 60, 128, 1])), 128)]
    largest = fp8.largest_inputs(PackedEncoder(model).eval(), packed)
    spoilt = {**largest, "layers.1.up": 1e-3 * largest["layers.1.up"]}  # nearly all of its inputs are clipped
    ranking = fp8.sensitivity(model, spoilt, packed)
    assert ranking[0][0] == "layers.1.up"
    assert {name for name, _ in ranking} == set(largest)


@pytest.mark.long
def test_a_damaged_version_is_named(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cuda_runtime.ON_CPU, "1")
    build(checkpoint, tmp_path / "repository", "cuda", "fp16", gate=Gate(0.9, 0.1))
    folder = tmp_path / "repository" / "encoder" / "1"
    weights = (folder / cuda_version.WEIGHTS).read_bytes()
    (folder / cuda_version.WEIGHTS).write_bytes(weights[:1000])
    with pytest.raises(InputError, match="holds no engine"):
        load_engine(folder)
    (folder / cuda_version.WEIGHTS).unlink()
    with pytest.raises(InputError, match=r"holds no engine|No such file"):
        load_engine(folder)


def test_models_that_flash_attention_cannot_run_are_refused() -> None:
    with pytest.raises(InputError, match="head size that is a multiple of 8"):
        shape_of(random_bert(0, hidden_size=60, num_attention_heads=5))
    model = random_bert(0)
    model.config.hidden_act = "mish"
    with pytest.raises(InputError, match="cannot compile the activation"):
        shape_of(model)


class Gpu:
    """PyTorch's answers for a fake GPU."""

    def __init__(self, patch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0), count: int = 1) -> None:
        patch.setattr(torch.version, "cuda", "13.0")
        patch.setattr(torch.cuda, "init", self.init)
        patch.setattr(torch.cuda, "device_count", lambda: count)
        patch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        patch.setattr(torch.cuda, "mem_get_info", lambda *_: (1 << 20, 8 << 30))
        name = f"NVIDIA T ({capability[0]}.{capability[1]})"
        patch.setattr(cuda_device, "gpu_name", lambda *_: name)
        self.problem = ""

    def init(self) -> None:
        if self.problem:
            raise RuntimeError(self.problem)


def test_gpu_problems_are_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gpu = Gpu(monkeypatch)
    assert cuda_device.gpu_problem() == ""
    assert "there is no GPU 1; this machine has 1" in cuda_device.gpu_problem(1)
    gpu.problem = "Found no NVIDIA driver on your system. Please check"
    assert "needs an NVIDIA GPU and its driver" in cuda_device.gpu_problem()
    gpu.problem = "The NVIDIA driver on your system is too old (found version 11040). Please update\nyour driver"
    assert cuda_device.gpu_problem() == (
        "the NVIDIA driver is too old for CUDA 13.0: update it, or install an older PyTorch"
    )
    with pytest.raises(InputError, match="too old for CUDA"):
        cuda_version.load_runner(tmp_path, "fp16", 128)


def test_a_gpu_with_too_little_memory_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    Gpu(monkeypatch, (7, 5))
    assert "needs compute capability 8.0 or later; this is NVIDIA T (7.5)" in cuda_device.gpu_problem()
    Gpu(monkeypatch, (8, 0))
    with pytest.raises(InputError, match=r"NVIDIA T \(8.0\) has no fp8 matrix products; build it again with"):
        cuda_version.load_runner(tmp_path, "fp8", 128)
    cuda_version.save(varlen(random_bert(0, hidden_size=256), dtype=torch.float16), tmp_path)
    with pytest.raises(InputError, match="has too little memory: 1 of 8192 MiB are free"):
        cuda_version.load_runner(tmp_path, "fp16", 128)


def test_a_weight_too_large_for_fp16_is_named(checkpoint: Path, tmp_path: Path) -> None:
    large = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, large)
    model = Checkpoint(checkpoint).model
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight[0, 0] = 1e5
    model.save_pretrained(large)
    with pytest.raises(InputError, match=r"fp16 cannot hold the weights of layers\.0\.down\.weight"):
        build(large, tmp_path / "repository", "cuda", "fp16")
