"""Engines side by side in one run: precisions, forms of the encoder, PyTorch, and the ceiling that the cores set."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
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

BATCHES = (16, 64)  # texts
ROUNDS = 3
PYTORCH = "PyTorch fp32, padded to the longest"
KEPT = "packed rows, int8"  # what `build` compiles
COLUMNS = {
    "system": "engine",
    "batch": "texts a batch",
    "texts_per_second": "texts/s",
    "ratio": "× PyTorch",
}
Tokens = Sequence[Sequence[int]]
System = Callable[[Texts], Any]
Product = Callable[[int], float]  # rows of a matrix to the seconds that its product with a layer's weights takes


def measure(model: Any, tokens: Tokens, max_tokens: int, rounds: int = ROUNDS) -> dict[str, Any]:
    """Run all engines in turn, round after round, over the same texts in order of arrival.

    A batch's time is its median over the rounds, and an engine's throughput all texts by the sum of these times. As it
    is slow, PyTorch goes over the texts once in all rounds together, every round over its share of the batches.

    Returns rows of engine, batch, texts per second and ratio to PyTorch at the smallest batch; and how near INT8 comes
    to the ceiling at the largest: the time of the bare int8 matrix products by the time of the engine.
    """
    batches = {size: [_laid(tokens[i : i + size]) for i in range(0, len(tokens), size)] for size in BATCHES}
    # By engine and batch: the seconds of each round.
    seconds: dict[tuple[str, int, int], list[float]] = {}
    bare: list[float] = []
    systems, products = _systems(model, max_tokens), int8_products(model.config)
    for run in systems.values():
        run(batches[BATCHES[0]][0])  # warm-up
    for number in track(range(rounds), "rounds of all engines"):
        for name, run in systems.items():
            for size, every in batches.items():
                share = range(number, len(every), rounds) if name == PYTORCH else range(len(every))
                for i in share:
                    start = time.perf_counter()
                    run(every[i])
                    seconds.setdefault((name, size, i), []).append(time.perf_counter() - start)
        bare.append(bare_seconds(model.config, products, [lengths for _, lengths in batches[BATCHES[-1]]]))
    rows: list[dict[str, Any]] = [
        {
            "system": name,
            "batch": size,
            "texts_per_second": len(tokens) / sum(median(seconds[name, size, i]) for i in range(len(every))),
        }
        for size, every in batches.items()
        for name in systems
    ]
    speed = {(row["system"], row["batch"]): row["texts_per_second"] for row in rows}
    for row in rows:
        row["ratio"] = row["texts_per_second"] / speed[PYTORCH, BATCHES[0]]
    ceiling = len(tokens) / median(bare)
    work = sum(operations(model.config, lengths) for _, lengths in batches[BATCHES[-1]]) / len(tokens)
    return {
        "rows": rows,
        "texts": len(tokens),
        "rounds": rounds,
        "mean_tokens": float(np.mean([len(text) for text in tokens])),
        "int8_to_pytorch": max(speed[KEPT, size] for size in BATCHES) / speed[PYTORCH, BATCHES[0]],
        "int8_to_bf16": speed[KEPT, BATCHES[-1]] / speed["packed rows, bf16", BATCHES[-1]],
        "ceiling_texts_per_second": ceiling,
        "ceiling_gops": ceiling * work / 1e9,
        "share_of_ceiling": speed[KEPT, BATCHES[-1]] / ceiling,
    }


def shapes(config: Any, lengths: npt.NDArray[np.integer[Any]]) -> list[tuple[int, int, int, int]]:
    """Return the matrix products with weights of one batch: how many, rows, inner size, columns.

    No padding counts, and of the last layer only query, key and value are computed for more than one token of a text.
    """
    hidden, up, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    every = int(lengths.sum())
    rest = [(hidden, hidden), (hidden, up), (up, hidden)]
    return [
        (layers, every, hidden, 3 * hidden),
        *((layers - 1, every, *shape) for shape in rest),
        *((1, len(lengths), *shape) for shape in rest),
    ]


def operations(config: Any, lengths: npt.NDArray[np.integer[Any]]) -> int:
    """Return the operations of these products: two a multiplication."""
    return sum(2 * count * rows * inner * columns for count, rows, inner, columns in shapes(config, lengths))


def bare_seconds(
    config: Any, products: dict[tuple[int, int], list[Product]], batches: Sequence[npt.NDArray[np.integer[Any]]]
) -> float:
    """Return the seconds of the bare int8 matrix products of all batches, each given as its texts' lengths.

    For each size of the weights the way counts that is the faster one over all batches.
    """
    work = [each for lengths in batches for each in shapes(config, lengths)]
    return sum(
        min(sum(count * product(rows) for count, rows, *size in work if tuple(size) == weights) for product in ways)
        for weights, ways in products.items()
    )


def int8_products(config: Any) -> dict[tuple[int, int], list[Product]]:
    """Return the ways to multiply by each of the encoder's int8 weights: OpenVINO's kernel, and PyTorch's.

    Both are oneDNN underneath. What is timed is the product alone: no quantizing, softmax, LayerNorm or attention. Its
    weights lie in the cache, as the same product is repeated: an engine, whose weights do not, has it harder.
    """
    hidden, up = config.hidden_size, config.intermediate_size
    return {
        (inner, columns): [_openvino_product(inner, columns), _torch_product(inner, columns)]
        for inner, columns in ((hidden, 3 * hidden), (hidden, hidden), (hidden, up), (up, hidden))
    }


REPEATS = 5  # of a product at a time


def _torch_product(inner: int, columns: int) -> Product:
    weight = torch.randint(-127, 128, (inner, columns), dtype=torch.int8)

    def seconds(rows: int) -> float:
        x = torch.randint(-127, 128, (rows, inner), dtype=torch.int8)
        times = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            torch._int_mm(x, weight)
            times.append(time.perf_counter() - start)
        return median(times)

    return seconds


def _openvino_product(inner: int, columns: int) -> Product:
    import openvino
    from openvino import opset13 as op

    x = op.parameter([-1, inner], np.float32)
    limits = [op.constant(np.float32(each)) for each in (-128 / 64, 127 / 64)]
    weights = np.random.default_rng(0).integers(-127, 128, (inner, columns), np.int8)
    scales = op.constant(np.full((1, columns), 0.01, np.float32))
    weight = op.multiply(op.convert(op.constant(weights), "f32"), scales)
    product = op.matmul(op.fake_quantize(x, *limits, *limits, 256), weight, False, False)
    model = openvino.Model([product], [x])
    settings = {"PERF_COUNT": True, "PERFORMANCE_HINT": "LATENCY"}

    def seconds(rows: int) -> float:
        data = np.random.default_rng(0).standard_normal((rows, inner), "f4")
        # Compiled anew: OpenVINO reports the mean over all runs of a compiled model, of whatever rows.
        compiled: Any = openvino.Core().compile_model(model, "CPU", settings)
        request = compiled.create_infer_request()

        def mean_after(runs: int) -> float:
            for _ in range(runs):
                request.infer([data], share_inputs=True)
            nodes = [node for node in request.get_profiling_info() if node.node_type.startswith("FullyConnected")]
            if not all("i8" in node.exec_type.lower() for node in nodes):
                return math.inf  # no int8 kernel here: PyTorch's alone counts
            return float(sum(node.real_time.total_seconds() for node in nodes))

        warm_up = mean_after(1)
        if warm_up == math.inf:
            return math.inf
        return (mean_after(REPEATS) * (REPEATS + 1) - warm_up) / REPEATS

    return seconds


def _systems(model: Any, max_tokens: int) -> dict[str, System]:
    def over_packed(run: Callable[[Packed], Any]) -> System:
        return lambda texts: run(pack(*texts, max_tokens))

    # Speed does not depend on where activations are cut, so nothing is calibrated.
    ranges = dict.fromkeys(quantize.linears(PackedBert(model)), 8.0)
    systems: dict[str, System] = {PYTORCH: lambda texts: _pytorch(model, texts)}
    with tempfile.TemporaryDirectory(prefix="aisle-bench-") as folder:
        onnx = Path(folder, "model.onnx")

        def engine(graph: PackedBert, precision: str) -> Callable[[Packed], npt.NDArray[np.float32]]:
            say(f"compiling {type(graph).__name__}, {precision}")
            export(graph, max_tokens, onnx)
            return openvino_runner(onnx, EngineSpec("openvino", precision, max_tokens, model.config.num_labels, ""))

        for precision in ("fp32", "bf16"):
            systems[f"packed rows, {precision}"] = over_packed(engine(PackedBert(model, DTYPES[precision]), precision))
        rows = engine(quantize.quantized(PackedBert(model, DTYPES["int8"]), ranges), "int8")
        windows = engine(quantize.quantized(FlatBert(model, DTYPES["int8"]), ranges), "int8")
    return systems | {
        KEPT: over_packed(rows),
        "flat windowed, int8": lambda texts: windows(flat(texts, max_tokens)),
        "padded to the longest, int8": lambda texts: rows(padded(texts)),
        f"padded to {max_tokens}, int8": lambda texts: rows(padded(texts, max_tokens)),
    }


def _laid(texts: Tokens) -> Texts:
    return np.concatenate([np.asarray(text) for text in texts]), np.array([len(text) for text in texts])


def _pytorch(model: Any, texts: Texts) -> None:
    tokens, lengths = texts
    input_ids, attention_mask = pad([each.tolist() for each in np.split(tokens, np.cumsum(lengths)[:-1])])
    with torch.inference_mode():
        model(input_ids=input_ids, attention_mask=attention_mask)
