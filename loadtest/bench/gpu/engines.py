"""The engine parts of `aisle bench gpu`: peaks, Hugging Face with padding, packed rows, flat tokens."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aisle.build import fp8
from aisle.build.build import build
from aisle.build.cuda_device import MIN_CAPABILITY_FP8
from aisle.build.cuda_runner import CudaRunner
from aisle.build.cuda_version import DTYPES, load_runner
from aisle.build.engine import EngineSpec
from aisle.build.gate import GATES, Gate
from aisle.build.graph import PackedEncoder
from aisle.build.repository import latest_version
from aisle.build.varlen import VarlenEncoder, copy_weights, shape_of
from aisle.loadtest.bench.fixtures import random_checkpoint, read_texts
from aisle.loadtest.bench.gpu.measure import (
    Batch,
    batches_of,
    device,
    latencies_of,
    operations,
    seconds_of,
    synchronize,
    throughput,
)
from aisle.preprocess.pack import Packed, pack
from aisle.train.core.checkpoint import Checkpoint
from aisle.train.core.predict import pad

Row = dict[str, Any]
OPEN_GATE = Gate(0.0, 1.0)  # always passes: with random weights, predictions are near ties


class Bench:
    """The settings, texts and checkpoints that all parts share."""

    def __init__(self, settings: Row) -> None:
        self.settings, self.work, self.dry = settings, Path(settings["work"]), bool(settings["dry_run"])
        self.min_seconds = 0.05 if self.dry else 1.0  # for each measurement
        self.sizes = (4, 8) if self.dry else (64, 256, 1024)

    @property
    def checkpoint(self) -> Path:
        return self.work / ("tiny-10" if self.dry else "base-10")

    @property
    def trained(self) -> Path | None:
        return Path(self.settings["checkpoint"]) if self.settings["checkpoint"] else None

    def repository(self, checkpoint: str, precision: str) -> Path:
        return self.work / f"repository-{checkpoint}-{precision}"

    def model(self, dtype: torch.dtype = torch.float32) -> Any:
        return Checkpoint(self.checkpoint).model.to(dtype).eval()

    def batches(self, size: int) -> list[Batch]:
        saved = json.loads((self.work / "tokens.json").read_text())
        return batches_of(saved["lengths"], saved["tokens"], size)

    def texts(self) -> list[str]:
        texts: list[str] = json.loads((self.work / "texts.json").read_text("utf-8"))
        return texts

    def row(self, system: str, precision: str, batch: Batch, seconds: float, **more: Any) -> Row:
        """Return a row with throughput. The share of the peak is computed later, from `teraflops`."""
        config = json.loads((self.checkpoint / "config.json").read_text())
        work = operations(type("Config", (), config), batch[1])
        rate = len(batch[1]) / seconds
        tokens = len(batch[0])
        row = {"system": system, "precision": precision, "batch": len(batch[1]), "texts_per_second": rate}
        return {**row, "teraflops": work / seconds / 1e12, "tokens": tokens, "ms": 1e3 * seconds, **more}


def fixtures(bench: Bench) -> Iterator[Row]:
    """Write the inputs of all other parts: texts, their tokens and a checkpoint with random weights."""
    start = time.perf_counter()
    data = bench.settings["data"]
    texts = read_texts(Path(data) if data else None, bench.settings["text_column"], 256 if bench.dry else 20_000)
    size = "tiny" if bench.dry else "base"
    random_checkpoint(bench.checkpoint, texts, size)
    tokens = Checkpoint(bench.checkpoint).tokenizer.tokens(texts[:8192])
    lengths = [len(each) for each in tokens]
    (bench.work / "texts.json").write_text(json.dumps(texts, ensure_ascii=False), "utf-8")
    (bench.work / "tokens.json").write_text(json.dumps({"lengths": lengths, "tokens": [i for e in tokens for i in e]}))
    yield {
        "system": f"BERT {size} with random weights",
        "texts": len(texts),
        "mean_tokens": float(np.mean(lengths)),
        "median_tokens": float(np.median(lengths)),
        "seconds": time.perf_counter() - start,
    }


def peaks(bench: Bench) -> Iterator[Row]:
    """Measure the peak rate of dense matrix products, on random data."""
    size, where = (64 if bench.dry else 8192), device()
    a, b = (torch.randn(size, size, device=where) for _ in range(2))
    for precision, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        left, right = a.to(dtype), b.to(dtype)
        seconds = seconds_of(lambda left=left, right=right: left @ right, bench.min_seconds)  # type: ignore[misc]
        yield {"system": "dense product", "precision": precision, "peak": 2 * size**3 / seconds / 1e12}
    if where.type == "cuda" and torch.cuda.get_device_capability() < MIN_CAPABILITY_FP8:
        return
    one = torch.ones((), device=where)
    left, right = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()

    def product() -> Any:
        if where.type == "cpu":
            return left.float() @ right.float()
        return torch._scaled_mm(left, right, one, one, out_dtype=torch.float16, use_fast_accum=True)

    seconds = seconds_of(product, bench.min_seconds)
    yield {"system": "dense product", "precision": "fp8", "peak": 2 * size**3 / seconds / 1e12}


def padded(bench: Bench) -> Iterator[Row]:
    """Measure the Hugging Face model. Every batch is padded to its longest text."""
    yield from _padded(bench, bench.model(torch.float16).to(device()), "Hugging Face, SDPA, padded")


def padded_compiled(bench: Bench) -> Iterator[Row]:
    """Measure the same model with torch.compile, for any shape."""
    model = bench.model(torch.float16).to(device())
    yield from _padded(bench, compiled(model), "Hugging Face, SDPA, padded, compiled")


def _padded(bench: Bench, model: Any, name: str) -> Iterator[Row]:
    for size in bench.sizes:
        batch = bench.batches(size)[0]
        inputs = [each.to(device()) for each in pad([t.tolist() for t in np.split(batch[0], np.cumsum(batch[1])[:-1])])]

        def run(inputs: list[torch.Tensor] = inputs) -> Any:
            with torch.no_grad():
                return model(input_ids=inputs[0], attention_mask=inputs[1])

        yield bench.row(name, "fp16", batch, seconds_of(run, bench.min_seconds), computed=inputs[0].numel())


def packed(bench: Bench) -> Iterator[Row]:
    """Measure packed rows, the layout for CPUs, in a CUDA graph, with and without torch.compile."""
    graph = PackedEncoder(bench.model(), torch.float16).eval().to(device())
    for name, module in (("packed rows", graph), ("packed rows, compiled", compiled(graph))):
        for size in bench.sizes:
            batch = bench.batches(size)[0]
            rows = pack(*batch, 128, narrow=False)
            inputs = [torch.from_numpy(each).to(device()) for each in Packed(*rows)]

            def run(module: Callable[..., Any] = module, inputs: list[torch.Tensor] = inputs) -> Any:
                with torch.no_grad():
                    return module(*inputs)

            replay = _cuda_graph(run)
            computed = inputs[0].numel()
            yield bench.row(
                f"{name}, CUDA graph", "fp16", batch, seconds_of(replay, bench.min_seconds), computed=computed
            )


def compiled(module: Any) -> Any:
    """Compile a module for any shape. On a CPU it is only traced, because generating code would take minutes."""
    return torch.compile(module, dynamic=True, backend="inductor" if torch.cuda.is_available() else "eager")


def _cuda_graph(run: Callable[[], Any]) -> Callable[[], Any]:
    """Return a function that replays `run` as a CUDA graph; on a CPU, `run` itself."""
    if not torch.cuda.is_available():
        return run
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run()
    return graph.replay


def flat(precision: str) -> Callable[[Bench], Iterator[Row]]:
    """Return the part that measures flat tokens in a precision."""

    def part(bench: Bench) -> Iterator[Row]:
        largest = _largest_inputs(bench) if precision == "fp8" else {}
        variants: list[tuple[str, dict[str, bool]]] = [("flat tokens", {})]
        if precision == "fp16":
            variants += [
                ("flat tokens, separate exact GELU", {"fuse_gelu": False}),
                ("flat tokens, no CUDA graph", {"graphs": False}),
                ("flat tokens, not compiled", {"compiled": False}),
            ]
        for name, options in variants:
            yield from _flat(bench, name, precision, largest, **options)

    return part


def _flat(
    bench: Bench,
    name: str,
    precision: str,
    largest: dict[str, float],
    *,
    fuse_gelu: bool = True,
    graphs: bool = True,
    compiled: bool = True,
) -> Iterator[Row]:
    model = bench.model()
    module = VarlenEncoder(shape_of(model), 128, DTYPES[precision], fuse_gelu=fuse_gelu)
    copy_weights(module, model)
    if precision == "fp8":
        fp8.quantize(module, largest)
    every = {size: bench.batches(size) for size in bench.sizes}
    single = bench.batches(1)
    shapes = [(len(b[0]), len(b[1])) for batches in [*every.values(), single] for b in batches]
    most = -(-max(tokens for tokens, _ in shapes) // 2048) * 2048 + 2048
    runner = CudaRunner(module, 128, device(), graphs=graphs, compiled=compiled, max_batch_tokens=most, sizes=shapes)
    yield {"system": name, "precision": precision, "compiled": runner.compiled, **_startup_costs(runner)}
    for batches in every.values():
        batch = batches[0]
        replay = runner.replayer(*batch)
        row = bench.row(name, precision, batch, seconds_of(replay, bench.min_seconds))
        answers = throughput(lambda each: runner(*each), batches, bench.min_seconds, runner.concurrency)
        yield {**row, "texts_per_second_host": answers, "computed": runner(*batch)[1]}
    yield {
        "system": f"{name}, one text at a time",
        "precision": precision,
        "batch": 1,
        **latencies_of(lambda each: runner(*each), single, bench.min_seconds),
    }


def _startup_costs(runner: CudaRunner) -> Row:
    row: Row = {f"{name}_seconds": seconds for name, seconds in runner.seconds.items()}
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        row["memory_mib"] = (total - free) >> 20
    return row


def _largest_inputs(bench: Bench) -> dict[str, float]:
    """Return the largest inputs of the linear layers on a few texts. Speed does not depend on them."""
    tokens, lengths = bench.batches(8)[0]
    return fp8.largest_inputs(PackedEncoder(bench.model()).eval(), [pack(tokens, lengths, 128)])


def versions(bench: Bench) -> Iterator[Row]:
    """Build versions of the trained checkpoint and of random weights with `aisle build`, and check its gates."""
    sources = (("random", bench.checkpoint, ("fp16", "fp8")), ("trained", bench.trained, ("fp16", "fp8", "bf16")))
    for name, checkpoint, precisions in sources:
        if checkpoint is None:
            continue
        for precision in precisions:
            start = time.perf_counter()
            try:
                result = build(checkpoint, bench.repository(name, precision), "cuda", precision, gate=OPEN_GATE)
            except Exception as error:  # the other precisions are measured anyway
                yield {"system": f"aisle build, {name} weights", "precision": precision, "error": str(error)[:500]}
                continue
            yield {
                "system": f"aisle build, {name} weights",
                "precision": precision,
                "agreement": result.get("agreement"),
                "f1_loss": result.get("f1_loss"),
                "largest_logit_error": result.get("largest_logit_error"),
                "layers_in_fp16": result.get("layers_in_fp16"),
                "gate_passed": "agreement" in result and GATES[precision].passes(result),
                "seconds": time.perf_counter() - start,
            }


def load(precision: str) -> Callable[[Bench], Iterator[Row]]:
    """Return the part that loads a built version in a new process, as the server does."""

    def part(bench: Bench) -> Iterator[Row]:
        repository = bench.repository("random", precision)
        folder = repository / "encoder" / str(latest_version(repository))
        spec = EngineSpec.load(folder)
        start = time.perf_counter()
        runner = load_runner(folder, spec.precision, spec.max_tokens)
        seconds = time.perf_counter() - start
        yield {
            "system": "load and warm up all buckets",
            "precision": precision,
            "seconds": seconds,
            "buckets": len(runner.layout.buckets),
            "compiled": runner.compiled,
            **_startup_costs(runner),
        }
        for size in bench.sizes[:2]:
            batches = bench.batches(size)
            rate = throughput(lambda each: runner(*each), batches, bench.min_seconds, runner.concurrency)
            yield bench.row("built version", precision, batches[0], size / rate)
        latencies = latencies_of(lambda each: runner(*each), bench.batches(1), bench.min_seconds)
        yield {"system": "built version, one text at a time", "precision": precision, "batch": 1, **latencies}

    return part
