"""INT8 by the book: symmetric, weights by channel, and the ranges that real activations have."""

import numpy as np
import torch

from aisle.build.graph import PackedBert
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
    # Each factor is off by half a step at most.
    steps = x.abs().sum(1, keepdim=True) * quantized.scale / 2 + layer.weight.abs().sum(1) * quantized.input_scale / 2
    assert ((quantized(x) - exact).abs() <= steps + 32 * quantized.scale * quantized.input_scale / 4).all()


def test_ranges_cover_what_was_seen() -> None:
    graph = PackedBert(random_bert(0)).eval()
    ranges = calibrate(graph, batches(4))
    assert set(ranges) == set(METHODS)
    seen = {}
    for name, layer in linears(graph).items():
        layer.register_forward_pre_hook(lambda _, inputs, name=name: seen.setdefault(name, []).append(inputs[0]))
    logits(graph, batches(4))
    for name, inputs in seen.items():
        largest = max(float(each.abs().max()) for each in inputs)
        assert ranges["minmax"][name] == np.float32(largest)
        assert 0 < ranges["percentile"][name] <= largest * 1.001
        assert 0 < ranges["entropy"][name] <= largest * 1.001


def test_quantizing_costs_little_and_skipping_costs_less() -> None:
    model, data = random_bert(0), batches(4)
    expected = logits(PackedBert(model).eval(), data)
    ranges = calibrate(PackedBert(model).eval(), data)["minmax"]
    whole = divergence(expected, logits(quantized(PackedBert(model), ranges), data))
    ranking = sensitivity(model, ranges, data)
    spared = quantized(PackedBert(model), ranges, skip=[name for name, _ in ranking[:6]])
    assert 0 < divergence(expected, logits(spared, data)) < whole < 0.05
    assert sum(isinstance(each, Int8Linear) for each in spared.modules()) == len(ranking) - 6
    assert [loss for _, loss in ranking] == sorted((loss for _, loss in ranking), reverse=True)
