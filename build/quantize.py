"""INT8 quantization: static Q/DQ around the matrix products, symmetric, per-channel weights, per-tensor activations.

The scheme is that of Wu et al. 2020, "Integer Quantization for Deep Learning Inference" (arXiv:2004.09602).
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aisle.build.graph import PackedEncoder
from aisle.console import track
from aisle.preprocess.pack import Packed
from aisle.train.core.binary import binary_divergence
from aisle.train.core.multi_label import is_multi_label

METHODS = ("minmax", "percentile", "entropy")
MIN_SCALE = 2.0**-14  # the smallest normal fp16 number; a channel with a smaller scale has no influence
MAX_DIVERGENCE = 1e9  # nats; the divergence of logits that are not finite

Ranges = dict[str, float]  # the largest |input| of each linear layer, by the layer's name


class Int8Linear(nn.Module):
    """A linear layer whose weights and inputs are rounded to int8: in PyTorch by arithmetic, in ONNX as Q/DQ."""

    def __init__(self, source: nn.Linear, largest: float) -> None:
        super().__init__()
        weight = source.weight.detach().float().t()  # [in, out], the order of ONNX
        self.dtype = source.weight.dtype
        scale = (weight.abs().amax(0) / 127).clamp(min=MIN_SCALE).to(self.dtype)
        self.weight = (weight / scale.float()).round().clamp(-127, 127).to(torch.int8)
        self.scale = scale  # [out]
        self.input_scale = torch.tensor(max(largest / 127, MIN_SCALE), dtype=self.dtype)
        self.bias = source.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        return (
            dequantize(quantize(x, self.input_scale), self.input_scale) @ dequantize(self.weight, self.scale, axis=1)
            + self.bias
        )


def quantize(x: Tensor, scale: Tensor) -> Tensor:
    if torch.compiler.is_exporting():
        zero = torch.zeros((), dtype=torch.int8)
        return torch.onnx.ops.symbolic("QuantizeLinear", (x, scale, zero), dtype=torch.int8, shape=x.shape, version=20)
    return (x / scale).round().clamp(-128, 127).to(torch.int8)


def dequantize(x: Tensor, scale: Tensor, axis: int | None = None) -> Tensor:
    if torch.compiler.is_exporting():
        return torch.onnx.ops.symbolic(
            "DequantizeLinear",
            (x, scale, torch.zeros(scale.shape, dtype=torch.int8)),
            attrs={} if axis is None else {"axis": axis},
            dtype=scale.dtype,
            shape=x.shape,
            version=20,
        )
    return x.to(scale.dtype) * scale


def linears(graph: nn.Module) -> dict[str, nn.Linear]:
    """Return the layers to quantize, by name: all linear layers of the encoder."""
    return {name: each for name, each in graph.named_modules() if isinstance(each, nn.Linear) and "layers." in name}


def calibrate(graph: PackedEncoder, batches: Sequence[Packed]) -> dict[str, Ranges]:
    """Observe fp32 activations on real texts; return the ranges of each method in `METHODS`.

    All methods use one histogram per layer input: `minmax` takes its end, `percentile` its 99.99th percentile, and
    `entropy` the cut with the smallest Kullback-Leibler divergence (Migacz 2017, "8-bit Inference with TensorRT").
    onnxruntime computes the last two.
    """
    from onnxruntime.quantization.calibrate import HistogramCollector  # fp16 and fp8 do not need it

    collector = HistogramCollector("entropy", True, 512, 128, 99.99, "same")
    seen: dict[str, list[npt.NDArray[np.float32]]] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen[name] = [inputs[0].numpy()]

        return hook

    hooks = [layer.register_forward_pre_hook(watch(name)) for name, layer in linears(graph).items()]
    with contextlib.redirect_stdout(io.StringIO()):  # the collector prints
        for _ in track(run(graph, batches), "calibrating", len(batches)):
            collector.collect(seen)
        cuts = {"percentile": collector.compute_percentile(), "entropy": collector.compute_entropy()}
    for hook in hooks:
        hook.remove()
    ends = {name: float(max(-histogram[2], histogram[3])) for name, histogram in collector.histogram_dict.items()}
    return {"minmax": ends} | {
        method: {name: float(np.max(np.abs(np.asarray(cut[:2], np.float64)))) for name, cut in found.items()}
        for method, found in cuts.items()
    }


def quantized(graph: PackedEncoder, ranges: Ranges, skip: Sequence[str] = ()) -> PackedEncoder:
    """Quantize the linear layers of a graph to INT8 in place, except those in `skip`, and return the graph."""
    for name, layer in linears(graph).items():
        if name not in skip:
            graph.set_submodule(name, Int8Linear(layer, ranges[name]))
    return graph.eval()


def sensitivity(
    model: Any, ranges: Ranges, batches: Sequence[Packed], places: Sequence[slice] = ()
) -> list[tuple[str, float]]:
    """Rank the layers by the divergence when only this layer is quantized, largest first.

    It is the Kullback-Leibler divergence of the category probabilities from fp32, in nats per text; see `divergence`.
    """
    graph = PackedEncoder(model).eval()
    expected = logits(graph, batches)
    losses = []
    for name, layer in track(list(linears(graph).items()), "ranking layers"):
        graph.set_submodule(name, Int8Linear(layer, ranges[name]))
        losses.append((name, divergence(expected, logits(graph, batches), is_multi_label(model.config), places)))
        graph.set_submodule(name, layer)
    return sorted(losses, key=lambda each: -each[1])


def divergence(expected: Tensor, actual: Tensor, multi_label: bool = False, places: Sequence[slice] = ()) -> float:
    """Return the mean Kullback-Leibler divergence between the probabilities of logits [texts, labels], in nats.

    These are softmaxes; of a multi-label model, sigmoids. Logits that are not finite give `MAX_DIVERGENCE`.

    Args:
        places: the logits of the categories and of each further head, whose divergences are added; by default one part.
    """
    if multi_label:
        found = binary_divergence(expected, actual).mean().item()
    else:
        pairs = [(actual[:, place], expected[:, place]) for place in places or [slice(None)]]
        logs = [(F.log_softmax(ours, 1), F.log_softmax(wanted, 1)) for ours, wanted in pairs]
        found = sum(F.kl_div(*each, reduction="batchmean", log_target=True).item() for each in logs)
    return found if math.isfinite(found) else MAX_DIVERGENCE


def logits(graph: nn.Module, batches: Sequence[Packed]) -> Tensor:
    return torch.cat(list(run(graph, batches)))


def run(graph: nn.Module, batches: Iterable[Packed]) -> Iterable[Tensor]:
    with torch.inference_mode():
        for batch in batches:
            yield graph(*map(torch.from_numpy, batch))
