"""Engines side by side in one run: precisions, forms of the encoder, PyTorch, and the ceiling that the cores set."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from aisle.build import quantize
from aisle.build.engine import EngineSpec, openvino_runner
from aisle.build.export import DTYPES, export
from aisle.build.graph import PackedBert
from aisle.console import say, track
from aisle.loadtest.forms import FlatBert, Texts, flat, padded
from aisle.preprocess.pack import Packed, pack
from aisle.train.evaluate import pad

ROUNDS = 5  # the median of so many counts
BATCHES = (16, 64)  # texts
Tokens = Sequence[Sequence[int]]
System = Callable[[Texts], Any]


def measure(model: Any, tokens: Tokens, max_tokens: int, texts: int) -> dict[str, Any]:
    """Run all engines in turn, round after round, over the same texts in order of arrival.

    Args:
        tokens: token ids of real texts; the first are measured with, others calibrate.
        texts: how many are measured with, a round and batch size.

    Returns rows of system, batch and texts per second, and how near the INT8 engine comes to the ceiling.
    """
    systems = _systems(model, tokens[-64:], max_tokens)
    rows = []
    for size in BATCHES:
        batches = [_laid(tokens[i : i + size]) for i in range(0, texts, size)]
        speeds: dict[str, list[float]] = {name: [] for name in systems}
        for _ in track(range(ROUNDS), f"batches of {size}"):
            for name, run in systems.items():
                few = batches[: max(1, len(batches) // 8)] if name.startswith("PyTorch") else batches
                run(few[0])
                start = time.perf_counter()
                for batch in few:
                    run(batch)
                speeds[name].append(sum(len(lengths) for _, lengths in few) / (time.perf_counter() - start))
        rows += [
            {"system": name, "batch": size, "texts_per_second": float(np.median(each))} for name, each in speeds.items()
        ]
    ceiling = int8_ceiling(model.config, int(np.mean([len(t) for t in tokens[:texts]]) * BATCHES[-1]))
    best = float(np.median(speeds["packed rows, int8"]))
    work = float(np.mean([operations(model.config, len(t)) for t in tokens[:texts]]))
    return {
        "rows": rows,
        "mean_tokens": float(np.mean([len(t) for t in tokens[:texts]])),
        "int8_ceiling_gops": ceiling / 1e9,
        "int8_engine_gops": best * work / 1e9,
        "share_of_ceiling": best * work / ceiling,
    }


def operations(config: Any, tokens: int) -> int:
    """Return the operations of the matrix products with weights for one text: two a multiplication.

    In the last layer, only query, key and value are computed for more than one token.
    """
    hidden: int = config.hidden_size
    up: int = config.intermediate_size
    rest = hidden * hidden + 2 * hidden * up
    layers: int = config.num_hidden_layers
    return 2 * (layers * tokens * 3 * hidden**2 + ((layers - 1) * tokens + 1) * rest)


def int8_ceiling(config: Any, tokens: int) -> float:
    """Return the operations per second of the bare int8 matrix product, at the best of the encoder's shapes."""
    import openvino
    from openvino import opset13 as op

    hidden, up = config.hidden_size, config.intermediate_size
    speeds: list[float] = []
    for inner, outer in ((hidden, 3 * hidden), (hidden, hidden), (hidden, up), (up, hidden)):
        x = op.parameter([tokens, inner], np.float32)
        limit = [op.constant(np.float32(each)) for each in (-128 / 64, 127 / 64)]
        weights = np.random.default_rng(0).integers(-127, 128, (inner, outer), np.int8)
        weight = op.multiply(
            op.convert(op.constant(weights), "f32"), op.constant(np.full((1, outer), 0.01, np.float32))
        )
        product = op.matmul(op.fake_quantize(x, *limit, *limit, 256), weight, False, False)
        compiled: Any = openvino.Core().compile_model(openvino.Model([product], [x]), "CPU", {"PERF_COUNT": True})
        request, data = compiled.create_infer_request(), np.random.default_rng(0).standard_normal((tokens, inner), "f4")
        seconds = []
        for _ in range(20):
            request.infer([data], share_inputs=True)
            product_time = [p.real_time for p in request.get_profiling_info() if p.node_type.startswith("FullyConn")]
            seconds.append(sum(each.total_seconds() for each in product_time))
        speeds.append(2 * tokens * inner * outer / float(np.median(seconds)))
    return max(speeds)


def _systems(model: Any, calibration: Tokens, max_tokens: int) -> dict[str, System]:
    def over_packed(run: Callable[[Packed], Any]) -> System:
        return lambda texts: run(pack(*texts, max_tokens))

    laid = [pack(*_laid(calibration[i : i + 16]), max_tokens) for i in range(0, len(calibration), 16)]
    ranges = quantize.calibrate(PackedBert(model).eval(), laid)["minmax"]
    spec = EngineSpec("openvino", "int8", max_tokens, model.config.num_labels, "")
    systems: dict[str, System] = {"PyTorch fp32, padded": lambda texts: _pytorch(model, texts)}
    with tempfile.TemporaryDirectory(prefix="aisle-bench-") as folder:
        onnx = Path(folder, "model.onnx")

        def engine(graph: PackedBert, precision: str) -> Callable[[Packed], npt.NDArray[np.float32]]:
            say(f"compiling {type(graph).__name__}, {precision}")
            export(graph, max_tokens, onnx)
            return openvino_runner(onnx, replace(spec, precision=precision))

        for precision in ("bf16", "fp32"):
            systems[f"packed rows, {precision}"] = over_packed(engine(PackedBert(model), precision))
        rows = engine(quantize.quantized(PackedBert(model, DTYPES["int8"]), ranges), "int8")
        windows = engine(quantize.quantized(FlatBert(model, DTYPES["int8"], max_tokens), ranges), "int8")
        systems |= {
            "packed rows, int8": over_packed(rows),
            "flat windowed, int8": lambda texts: windows(flat(texts, max_tokens)),
            "padded to the longest, int8": lambda texts: rows(padded(texts)),
            f"padded to {max_tokens}, int8": lambda texts: rows(padded(texts, max_tokens)),
        }
    return systems


def _laid(texts: Tokens) -> Texts:
    return np.concatenate([np.asarray(text) for text in texts]), np.array([len(text) for text in texts])


def _pytorch(model: Any, texts: Texts) -> None:
    tokens, lengths = texts
    input_ids, attention_mask = pad([each.tolist() for each in np.split(tokens, np.cumsum(lengths)[:-1])])
    with torch.inference_mode():
        model(input_ids=input_ids, attention_mask=attention_mask)
