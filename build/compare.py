"""Compare all engines that this machine can build from a checkpoint: size, speed, agreement, F1."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from aisle.build import compile_tensorrt
from aisle.build.adopt import checkpoint_of
from aisle.build.build import build_engine, spec_of
from aisle.build.cuda_device import gpu_problem
from aisle.build.cuda_runtime import gpu_name
from aisle.build.engine import PRECISIONS, load_engine
from aisle.build.gate import GATES, accuracy, run_engine, speed
from aisle.build.inputs import BuildInputs, DataSource, TextSource
from aisle.console import say
from aisle.errors import InputError
from aisle.palette import BLUE, SERIES
from aisle.plots import legend, percent_axis
from aisle.preprocess.windows import separate
from aisle.report import Page
from aisle.train.core.predict import pad

COLUMNS = {
    "engine": "engine",
    "precision": "in",
    "megabytes": "MB",
    "latency_ms": "ms, 1 text",
    "texts_per_second": "texts/s",
    "speedup": "×",
    "agreement": "agreement",
    "macro_f1": "macro-F1",
    "gate": "gate",
}


def compare(
    checkpoint: Path, report: Path, data: DataSource | None = None, held_out: TextSource | None = None
) -> dict[str, Any]:
    """Build every target and precision in temporary folders, and write report.html and .json.

    Args:
        checkpoint: a folder that `aisle train` made, or another fine-tuned BERT, as for `build`.

    Raises:
        InputError: the checkpoint cannot be compiled, or the report cannot be written.
    """
    with checkpoint_of(checkpoint) as folder:
        result = {"checkpoint": checkpoint.name, **_measure(BuildInputs(folder, None, data, held_out), folder)}
    _page(result).write(report, result)
    return result


def _measure(inputs: BuildInputs, checkpoint: Path) -> dict[str, Any]:
    """Measure the checkpoint and every engine built from it."""
    rows = [_pytorch(inputs, checkpoint)]
    for target in targets():
        for precision in PRECISIONS[target]:
            spec = spec_of(inputs.checkpoint, target, precision)
            with tempfile.TemporaryDirectory(prefix="aisle-compare-") as folder:
                row = build_engine(inputs, spec, Path(folder), GATES[precision], compile_tensorrt.CompilerOptions())
                timed = {}
                if row["checked_on"] == target:
                    timed = speed(partial(run_engine, load_engine(Path(folder))), inputs.held_out.tokens)
            passed = "passed" if GATES[precision].passes(row) else "FAILED"
            rows.append({"engine": target, "precision": precision, **row, **timed, "gate": passed})
    for row in rows:
        row["megabytes"] = row.pop("bytes") / 1e6
        row["speedup"] = row["texts_per_second"] / rows[0]["texts_per_second"] if "texts_per_second" in row else None
    return {
        "held_out_texts": len(inputs.held_out.tokens),
        "gates": {name: asdict(gate) for name, gate in GATES.items()},
        "threads": torch.get_num_threads(),
        "gpu": gpu_name(),
        "rows": rows,
    }


def targets() -> list[str]:
    """Return the targets whose compiler is installed; TensorRT itself also needs a GPU to compile."""
    found = ["openvino"]
    for target in compile_tensorrt.MODULES:
        try:
            compile_tensorrt.load_module(target)
        except InputError as error:
            say(f"left out: {error}")
            continue
        if target == "tensorrt" and not gpu_name():
            say("left out: TensorRT compiles only on a machine with a GPU")
            continue
        found.append(target)
    if reason := gpu_problem():
        say(f"left out: {reason}")
    else:
        found.append("cuda")
    return found


def _pytorch(inputs: BuildInputs, checkpoint: Path) -> dict[str, Any]:
    """Measure the checkpoint itself: fp32, every batch padded to its longest text."""

    def run(texts: Sequence[Sequence[int]]) -> None:
        input_ids, attention_mask = pad(separate(texts, inputs.tokenizer.max_tokens)[0])
        with torch.inference_mode():
            inputs.model(input_ids=input_ids, attention_mask=attention_mask)

    return {
        "engine": "PyTorch",
        "precision": "fp32",
        **accuracy(inputs.held_out.expected, inputs.held_out),
        **speed(run, inputs.held_out.tokens),
        "bytes": (checkpoint / "model.safetensors").stat().st_size,
        "checked_on": "PyTorch",
    }


def _page(result: dict[str, Any]) -> Page:
    rows = result["rows"]
    page = Page(
        f"Engines of {result['checkpoint']}",
        f"Compared with PyTorch fp32 on {result['held_out_texts']} held-out texts. PyTorch pads each batch to its "
        "longest text; the engines do not pad. texts/s is measured with batches of 64; × is the ratio to PyTorch. An "
        "engine that this machine cannot run is only compiled; OpenVINO checks its graph.",
        {"checkpoint": result["checkpoint"], "threads": result["threads"], "GPU": result["gpu"] or "none"},
    )
    page.table(list(COLUMNS.values()), [[row.get(key) for key in COLUMNS] for row in rows])
    timed = [row for row in rows if "texts_per_second" in row]
    names = [f"{row['engine']} {row['precision']}" for row in timed]
    page.plot(_speed_bars(timed, names), "Throughput and latency of each engine")
    page.plot(_agreement_by_speed(timed, names), "Agreement with the checkpoint by throughput")
    for row in rows:
        if row["precision"] == "int8":
            _add_int8_details(page, row)
    return page


def _speed_bars(timed: list[dict[str, Any]], names: list[str]) -> Figure:
    figure = Figure(figsize=(11, 0.5 * len(timed) + 1), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, key in zip(axes, ("texts_per_second", "latency_ms"), strict=True):
        bars = axis.barh(names, [row[key] for row in timed], color=BLUE)
        axis.bar_label(bars, fmt="%.4g", padding=3)
        axis.set_xlabel(COLUMNS[key])
        axis.margins(x=0.15)
        axis.set_xlim(left=0)
    axes[0].invert_yaxis()
    return figure


def _agreement_by_speed(timed: list[dict[str, Any]], names: list[str]) -> Figure:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for number, (row, name) in enumerate(zip(timed, names, strict=True)):
        color = SERIES[number % len(SERIES)]
        axis.scatter(row["texts_per_second"], row["agreement"], label=name, color=color, clip_on=False)
    axis.set(xlabel=COLUMNS["texts_per_second"], ylabel="top-1 agreement", xlim=(0, None))
    percent_axis(axis, "y", whole=False)
    legend(axis)
    return figure


def _add_int8_details(page: Page, row: dict[str, Any]) -> None:
    page.heading(f"INT8 for {row['engine']}")
    page.text(
        "Mean KL divergence from the checkpoint on validation texts, for each calibration method. The build uses the "
        "method with the smallest."
    )
    page.table(["calibration", "divergence"], list(row["calibration"].items()))
    kept = row["layers_in_fp16"]
    page.text(f"Layers in fp16: {', '.join(kept)}." if kept else "All layers of the encoder are in INT8.")
    if "sensitivity" in row:
        page.table(["layer", "divergence if only this layer is quantized"], list(row["sensitivity"].items()))
