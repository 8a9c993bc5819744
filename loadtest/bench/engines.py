"""Compare engines in one run: precisions, layouts of the encoder, PyTorch, and the ceiling of these cores."""

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
from aisle.build.graph import PackedEncoder
from aisle.console import say, track
from aisle.loadtest.bench.layouts import FlatEncoder, Texts, flat, padded
from aisle.preprocess.pack import Packed, pack
from aisle.train.core.predict import pad

BATCHES = (16, 64)  # texts
ROUNDS = 3
PYTORCH = "PyTorch fp32, padded to the longest"
SERVED = "packed rows, int8"  # what `build` compiles
COLUMNS = {
    "system": "engine",
    "batch": "texts per batch",
    "texts_per_second": "texts/s",
    "ratio": "× PyTorch",
}
Tokens = Sequence[Sequence[int]]
System = Callable[[Texts], Any]
Product = Callable[[int], float]  # maps a number of rows to the seconds of their product with the weights


def measure(model: Any, tokens: Tokens, max_tokens: int, rounds: int = ROUNDS) -> dict[str, Any]:
    """Run all engines in turn, round after round, on the same texts in order of arrival.

    The time of a batch is its median over the rounds. The throughput of an engine is the number of texts divided by the
    sum of these times. PyTorch is slow, so each round gives it a different share of the batches.

    Returns rows of engine, batch, texts per second and ratio to PyTorch at the smallest batch. `share_of_ceiling` is
    the time of the bare int8 matrix products divided by the INT8 engine's time, at the largest batch.
    """
    batches = {size: [_concatenated(tokens[i : i + size]) for i in range(0, len(tokens), size)] for size in BATCHES}
    systems = _systems(model, max_tokens)
    seconds, bare = _time_all(model.config, systems, batches, rounds)
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
        "int8_to_pytorch": max(speed[SERVED, size] for size in BATCHES) / speed[PYTORCH, BATCHES[0]],
        "int8_to_bf16": speed[SERVED, BATCHES[-1]] / speed["packed rows, bf16", BATCHES[-1]],
        "ceiling_texts_per_second": ceiling,
        "ceiling_gops": ceiling * work / 1e9,
        "share_of_ceiling": speed[SERVED, BATCHES[-1]] / ceiling,
    }


def _time_all(
    config: Any, systems: dict[str, System], batches: dict[int, list[Texts]], rounds: int
) -> tuple[dict[tuple[str, int, int], list[float]], list[float]]:
    """Return the seconds of each round, by engine, batch size and batch; and those of the bare matrix products."""
    seconds: dict[tuple[str, int, int], list[float]] = {}
    bare: list[float] = []
    products = int8_products(config)
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
        bare.append(bare_seconds(config, products, [lengths for _, lengths in batches[BATCHES[-1]]]))
    return seconds, bare


def shapes(config: Any, lengths: npt.NDArray[np.integer[Any]]) -> list[tuple[int, int, int, int]]:
    """Return the matrix products of a batch with weights, each as (count, rows, inner size, columns).

    There is no padding. The last layer computes query, key and value for all tokens, and the rest for one per text.
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
    """Return the number of operations of these products, two for each multiplication."""
    return sum(2 * count * rows * inner * columns for count, rows, inner, columns in shapes(config, lengths))


def bare_seconds(
    config: Any, products: dict[tuple[int, int], list[Product]], batches: Sequence[npt.NDArray[np.integer[Any]]]
) -> float:
    """Return the seconds of the bare int8 matrix products of all batches, each given as the lengths of its texts.

    For each weight shape, the implementation that is faster over all batches counts.
    """
    work = [each for lengths in batches for each in shapes(config, lengths)]
    return sum(
        min(
            sum(count * product(rows) for count, rows, *size in work if tuple(size) == weights)
            for product in candidates
        )
        for weights, candidates in products.items()
    )


def int8_products(config: Any) -> dict[tuple[int, int], list[Product]]:
    """Return, for each shape of the encoder's int8 weights, the product by OpenVINO and the product by PyTorch.

    Both use oneDNN kernels. Only the product is timed, without quantizing, softmax, LayerNorm and attention. Because it
    is repeated, its weights stay in the CPU cache, unlike those of an engine, which is therefore slower.
    """
    hidden, up = config.hidden_size, config.intermediate_size
    return {
        (inner, columns): [_openvino_product(inner, columns), _torch_product(inner, columns)]
        for inner, columns in ((hidden, 3 * hidden), (hidden, hidden), (hidden, up), (up, hidden))
    }


REPEATS = 5  # runs of a product for each measurement


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
        # Compiled for each number of rows: OpenVINO reports the mean over all runs of a compiled model.
        compiled: Any = openvino.Core().compile_model(model, "CPU", settings)
        request = compiled.create_infer_request()

        def mean_after(runs: int) -> float:
            for _ in range(runs):
                request.infer([data], share_inputs=True)
            nodes = [node for node in request.get_profiling_info() if node.node_type.startswith("FullyConnected")]
            if not all("i8" in node.exec_type.lower() for node in nodes):
                return math.inf  # this CPU has no int8 kernel in OpenVINO: only the product by PyTorch counts
            return float(sum(node.real_time.total_seconds() for node in nodes))

        warm_up = mean_after(1)
        if warm_up == math.inf:
            return math.inf
        return (mean_after(REPEATS) * (REPEATS + 1) - warm_up) / REPEATS

    return seconds


def _systems(model: Any, max_tokens: int) -> dict[str, System]:
    def over_packed(run: Callable[[Packed], Any]) -> System:
        return lambda texts: run(pack(*texts, max_tokens))

    # Speed does not depend on the activation ranges, so there is no calibration.
    ranges = dict.fromkeys(quantize.linears(PackedEncoder(model)), 8.0)
    systems: dict[str, System] = {PYTORCH: lambda texts: _pytorch(model, texts)}
    with tempfile.TemporaryDirectory(prefix="aisle-bench-") as folder:
        onnx = Path(folder, "model.onnx")

        def engine(graph: PackedEncoder, precision: str) -> Callable[[Packed], npt.NDArray[np.float32]]:
            say(f"compiling {type(graph).__name__}, {precision}")
            export(graph, max_tokens, onnx)
            return openvino_runner(onnx, EngineSpec("openvino", precision, max_tokens, model.config.num_labels, ""))

        for precision in ("fp32", "bf16"):
            systems[f"packed rows, {precision}"] = over_packed(
                engine(PackedEncoder(model, DTYPES[precision]), precision)
            )
        rows = engine(quantize.quantized(PackedEncoder(model, DTYPES["int8"]), ranges), "int8")
        windows = engine(quantize.quantized(FlatEncoder(model, DTYPES["int8"]), ranges), "int8")
    return systems | {
        SERVED: over_packed(rows),
        "flat windowed, int8": lambda texts: windows(flat(texts, max_tokens)),
        "padded to the longest, int8": lambda texts: rows(padded(texts)),
        f"padded to {max_tokens}, int8": lambda texts: rows(padded(texts, max_tokens)),
    }


def _concatenated(texts: Tokens) -> Texts:
    return np.concatenate([np.asarray(text) for text in texts]), np.array([len(text) for text in texts])


def _pytorch(model: Any, texts: Texts) -> None:
    tokens, lengths = texts
    input_ids, attention_mask = pad([each.tolist() for each in np.split(tokens, np.cumsum(lengths)[:-1])])
    with torch.inference_mode():
        model(input_ids=input_ids, attention_mask=attention_mask)
