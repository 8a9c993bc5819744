"""Rearrange the INT8 graph so that OpenVINO's CPU kernels quantize inside the step before, not in a step of their own.

OpenVINO reads ONNX's QuantizeLinear as FakeQuantize, and fuses it into the step before if nothing else reads that
step's output. But a LayerNorm's output is also read by the residual sum, and an attention's output is transposed
first. There, quantizing takes two more steps, a copy to fp32 and the rounding: on a CPU with AMX a tenth of the
engine's time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

# What OpenVINO reads after a quantization: the conversion to int8, and its DequantizeLinear.
DEQUANTIZE = ("Convert", "Subtract", "Multiply")


def to_openvino(onnx: Path) -> Any:
    """Read an ONNX file as an `openvino.Model`, rearranged where it is quantized; the logits stay the same.

    Raises:
        RuntimeError: OpenVINO cannot read the file.
    """
    import openvino

    graph = openvino.Core().read_model(onnx)
    for node in graph.get_ordered_ops():
        if node.get_type_name() == "FakeQuantize" and node.input_value(0).get_node().get_type_name() != "Constant":
            _fuse(node)
    graph.validate_nodes_and_infer_types()
    return graph


def _fuse(quantize: Any) -> None:
    """Give a FakeQuantize a step before it into which it can be fused."""
    source = quantize.input_value(0)
    reshape = _without_converts(source)
    transpose = reshape.input_value(0).get_node() if reshape.get_type_name() == "Reshape" else None
    if transpose is not None and transpose.get_type_name() == "Transpose":
        _quantize_before(quantize, transpose, reshape)
    elif _is_shared(source):
        _read_alone(quantize)


def _without_converts(output: Any) -> Any:
    """Return the node that computes an output, before its conversions between types."""
    node = output.get_node()
    while node.get_type_name() == "Convert":
        node = node.input_value(0).get_node()
    return node


def _is_shared(output: Any) -> bool:
    """Return whether another step reads the same values, perhaps in another type."""
    while output.get_node().get_type_name() == "Convert" and len(output.get_target_inputs()) == 1:
        output = output.get_node().input_value(0)
    return len(output.get_target_inputs()) > 1


def _quantize_before(quantize: Any, transpose: Any, reshape: Any) -> None:
    """Quantize an attention's output before its transpose: the attention then quantizes, and fewer bytes are moved."""
    from openvino import opset13

    dequantized = quantize.output(0)
    while (reader := next(iter(dequantized.get_target_inputs())).get_node()).get_type_name() in DEQUANTIZE:
        dequantized = reader.output(0)
    readers = dequantized.get_target_inputs()
    scores, wanted = transpose.input_value(0), quantize.get_input_element_type(0)
    quantize.input(0).replace_source_output(opset13.convert(scores, wanted).output(0))
    transpose.input(0).replace_source_output(dequantized)
    for reader in readers:
        reader.replace_source_output(reshape.output(0))


def _read_alone(quantize: Any) -> None:
    """Put a maximum before a FakeQuantize, which is fused into it. FakeQuantize itself cuts off what is below."""
    from openvino import opset13

    source, lowest = quantize.input_value(0), quantize.input_value(1).get_node().data
    floor = opset13.constant(lowest.min())
    quantize.input(0).replace_source_output(opset13.maximum(source, floor).output(0))
