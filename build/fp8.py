"""FP8 quantization: linear layers in float8_e4m3fn, with one static scale for each tensor.

The scheme is that of Micikevicius et al. 2022, "FP8 Formats for Deep Learning" (arXiv:2209.05433).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from aisle.build.graph import PackedEncoder
from aisle.build.quantize import Ranges, divergence, linears, logits, run
from aisle.build.varlen import Fp8Linear, VarlenEncoder
from aisle.console import track
from aisle.preprocess.pack import Packed
from aisle.train.core.multi_label import is_multi_label

# Served texts may slightly exceed the calibrated range. A larger scale costs a float format no precision.
HEADROOM = 1.25


def largest_inputs(graph: PackedEncoder, batches: Sequence[Packed]) -> Ranges:
    """Return the largest |input| of each linear layer on real texts, by the layer's name."""
    found: Ranges = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found[name] = max(found.get(name, 0.0), inputs[0].abs().max().item())

        return hook

    hooks = [layer.register_forward_pre_hook(watch(name)) for name, layer in linears(graph).items()]
    for _ in track(run(graph, batches), "calibrating", len(batches)):
        pass
    for hook in hooks:
        hook.remove()
    return found


def quantize(module: VarlenEncoder | PackedEncoder, largest: Ranges, skip: Sequence[str] = ()) -> None:
    """Convert the encoder's linear layers to fp8, except those in `skip`. Both module types have the same layers."""
    for name, layer in linears(module).items():
        if name not in skip:
            module.set_submodule(name, Fp8Linear.of(layer, HEADROOM * largest[name]))
    module.eval()


def sensitivity(
    model: Any, largest: Ranges, batches: Sequence[Packed], places: Sequence[slice] = ()
) -> list[tuple[str, float]]:
    """Rank the layers by the divergence when only this layer is in fp8, largest first.

    The divergence is that of `quantize.sensitivity`, in nats per text.
    """
    graph = PackedEncoder(model).eval()
    expected = logits(graph, batches)
    losses = []
    for name, layer in track(list(linears(graph).items()), "ranking layers"):
        graph.set_submodule(name, Fp8Linear.of(layer, HEADROOM * largest[name]))
        losses.append((name, divergence(expected, logits(graph, batches), is_multi_label(model.config), places)))
        graph.set_submodule(name, layer)
    return sorted(losses, key=lambda each: -each[1])
