"""INT8: symmetric, per-channel weights, and the ranges of real activations."""

from pathlib import Path

import numpy as np
import openvino
import pytest
import torch

from aisle.build.export import export
from aisle.build.graph import PackedEncoder
from aisle.build.openvino_graph import to_openvino
from aisle.build.quantize import METHODS, Int8Linear, calibrate, divergence, linears, logits, quantized, sensitivity
from aisle.preprocess.pack import Packed, pack
from tests.test_graph import random_bert


def batches(count: int) -> list[Packed]:
    rng = np.random.default_rng(0)
    lengths = [rng.integers(1, 65, 8) for _ in range(count)]
    return [pack(rng.integers(0, 500, each.sum()), each, 64) for each in lengths]


def test_a_quantized_layer_rounds_as_int8_does() -> None:
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(32, 16), torch.randn(4, 32)
    quantized = Int8Linear(layer, float(x.abs().max()))
    assert quantized.weight.dtype == torch.int8
    assert quantized.weight.abs().amax(0).tolist() == [127] * 16  # each output channel uses the whole range
    exact = layer(x)
    # The error of each factor is at most half a step.
    steps = x.abs().sum(1, keepdim=True) * quantized.scale / 2 + layer.weight.abs().sum(1) * quantized.input_scale / 2
    assert ((quantized(x) - exact).abs() <= steps + 32 * quantized.scale * quantized.input_scale / 4).all()


def test_ranges_cover_the_observed_activations() -> None:
    graph = PackedEncoder(random_bert(0)).eval()
    ranges = calibrate(graph, batches(4))
    assert set(ranges) == set(METHODS)
    seen: dict[str, list[torch.Tensor]] = {}
    for name, layer in linears(graph).items():
        layer.register_forward_pre_hook(lambda _, inputs, name=name: seen.setdefault(name, []).append(inputs[0]))
    logits(graph, batches(4))
    for name, inputs in seen.items():
        largest = max(float(each.abs().max()) for each in inputs)
        assert ranges["minmax"][name] == np.float32(largest)
        assert 0 < ranges["percentile"][name] <= largest * 1.001
        assert 0 < ranges["entropy"][name] <= largest * 1.001


def test_quantization_error_is_small_and_smaller_with_skipped_layers() -> None:
    model, data = random_bert(0), batches(4)
    expected = logits(PackedEncoder(model).eval(), data)
    ranges = calibrate(PackedEncoder(model).eval(), data)["minmax"]
    whole = divergence(expected, logits(quantized(PackedEncoder(model), ranges), data))
    ranking = sensitivity(model, ranges, data)
    spared = quantized(PackedEncoder(model), ranges, skip=[name for name, _ in ranking[:6]])
    assert 0 < divergence(expected, logits(spared, data)) < whole < 0.05
    assert sum(isinstance(each, Int8Linear) for each in spared.modules()) == len(ranking) - 6
    assert [loss for _, loss in ranking] == sorted((loss for _, loss in ranking), reverse=True)


@pytest.mark.long
def test_openvino_can_fuse_each_quantization_into_the_step_before(tmp_path: Path) -> None:
    """Nothing else reads what is quantized, attention is quantized before its transpose, the logits stay the same."""
    model, data = random_bert(0), batches(3)
    graph = quantized(PackedEncoder(model), calibrate(PackedEncoder(model).eval(), data)["minmax"])
    export(graph, 64, tmp_path / "model.onnx")
    arranged, plain = to_openvino(tmp_path / "model.onnx"), openvino.Core().read_model(tmp_path / "model.onnx")
    quantize = [node for node in arranged.get_ordered_ops() if node.get_type_name() == "FakeQuantize"]
    sources = [node.input_value(0) for node in quantize if node.input_value(0).get_node().get_type_name() != "Constant"]
    assert len(sources) == len(linears(PackedEncoder(model)))
    for source in sources:
        assert len(source.get_target_inputs()) == 1
    steps = [source.get_node() for source in sources]
    before = [step.input_value(0).get_node().get_type_name() for step in steps if step.get_type_name() == "Convert"]
    assert before.count("MatMul") == model.config.num_hidden_layers - 1  # [CLS] alone reads the last
    core = openvino.Core()
    both = [core.compile_model(each, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}) for each in (arranged, plain)]
    found, expected = (np.concatenate([next(iter(each(list(batch)).values())) for batch in data]) for each in both)
    difference = np.abs(found - expected).max(axis=1)
    # On some CPUs, a value between two steps of the quantization rounds to the other one.
    assert (difference < 1e-4).mean() > 0.8
    assert difference.max() < 0.1
