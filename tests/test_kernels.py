"""The kernel for short texts computes what the reference attention computes. Triton's interpreter runs it on a CPU."""

import importlib.util
import os
import subprocess
import sys
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from aisle.build import varlen
from aisle.build.cuda_runner import CudaRunner
from aisle.build.varlen import (
    MAX_FP8,
    VarlenEncoder,
    attend,
    attend_short,
    copy_weights,
    shape_of,
    split,
    tanh_gelu,
    to_fp8,
)
from tests.test_graph import random_bert

KERNEL = """
import torch
from aisle.build import kernels
from aisle.build.varlen import MAX_FP8, attend, split

torch.manual_seed(0)
heads, scale = 3, torch.tensor(0.01)
for width in (32, 64, 128):
    for lengths in ([5, 64, 128, 1, 0, 65, 0, 0], [3], [200, 256]):
        offsets = torch.tensor([0, *lengths]).cumsum(0).int()
        qkv = torch.randn(int(offsets[-1]), 3 * heads * width).half()
        expected = attend(*split(qkv.float(), heads), offsets, 256).flatten(1)
        found = kernels.attend(qkv, offsets, heads, 256, None, MAX_FP8)
        assert found.dtype == torch.float16
        assert (found.float() - expected).abs().max() < 3e-3
        rounded = kernels.attend(qkv, offsets, heads, 256, scale, MAX_FP8)
        assert rounded.dtype == torch.float8_e4m3fn
        assert (rounded.float() * scale - expected).abs().median() < 0.03
"""


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="a PyTorch for CPUs brings no Triton compiler")
def test_the_kernel_agrees_with_the_reference() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", KERNEL], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_attention_rounds_to_fp8_as_the_next_product_would() -> None:
    torch.manual_seed(0)
    qkv, offsets, scale = (
        torch.randn(70, 3 * 64).half(),
        torch.tensor([0, 30, 30, 70], dtype=torch.int32),
        torch.ones(()),
    )
    expected = attend(*split(qkv, 2), offsets, 64).flatten(1)
    assert (attend_short(qkv, offsets, 2, 64, None) == expected).all()
    rounded = attend_short(qkv, offsets, 2, 64, scale / MAX_FP8)
    assert rounded.dtype == torch.float8_e4m3fn
    assert (rounded.float() == to_fp8(expected, scale / MAX_FP8).float()).all()


def test_without_a_compiler_flash_attention_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The runner gives up compiling, and then nothing may need a compiler."""
    model = random_bert(0)
    module = copy_weights(VarlenEncoder(shape_of(model), 128, torch.float32), model)
    runner = CudaRunner(module, 128, torch.device("cpu"), max_batch_tokens=512)
    batch = np.arange(40), np.array([10, 30])
    expected, _ = runner(*batch)
    monkeypatch.setattr(runner, "_warm", Mock(side_effect=RuntimeError("no C compiler")))
    runner._compile(module, runner.layout.largest)
    assert not runner.compiled
    monkeypatch.setattr(varlen, "attend_short", Mock(side_effect=AssertionError))
    assert np.allclose(runner(*batch)[0], expected, atol=1e-6)


def test_the_fast_form_of_gelu_is_its_tanh_approximation() -> None:
    x = torch.linspace(-12, 12, 10_001)
    assert torch.allclose(tanh_gelu(x), torch.nn.functional.gelu(x, approximate="tanh"), atol=1e-6)
    assert torch.isfinite(tanh_gelu(torch.tensor([-60000.0, 60000.0], dtype=torch.float16))).all()
