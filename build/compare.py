"""Every engine that this machine can make of a checkpoint, side by side: size, speed, agreement, F1."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from aisle.build import tensorrt
from aisle.build.build import make
from aisle.build.engine import PRECISIONS, EngineSpec, load_engine
from aisle.build.gate import GATES, accuracy, call, speed
from aisle.build.material import Material, Table
from aisle.console import say
from aisle.errors import InputError
from aisle.report import Page
from aisle.train.checkpoint import checkpoint_fingerprint
from aisle.train.evaluate import pad

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


def compare(checkpoint: Path, report: Path, data: Table | None = None) -> dict[str, Any]:
    """Build all targets × precisions, each beside the others in a temporary folder, and write report.html and .json.

    Raises:
        InputError: the checkpoint cannot be compiled, or the report cannot be written.
    """
    material = Material(checkpoint, None, data)
    rows = [_pytorch(material, checkpoint)]
    for target in targets():
        for precision in PRECISIONS[target]:
            spec = EngineSpec(
                target, precision, material.encoder.max_tokens, len(material.labels), checkpoint_fingerprint(checkpoint)
            )
            with tempfile.TemporaryDirectory(prefix="aisle-compare-") as folder:
                row = make(material, spec, Path(folder), GATES[precision], tensorrt.Options())
                timed = {}
                if row["checked_on"] == target:
                    timed = speed(partial(call, load_engine(Path(folder))), material.held_out.tokens)
            passed = "passed" if GATES[precision].passes(row) else "FAILED"
            rows.append({"engine": target, "precision": precision, **row, **timed, "gate": passed})
    for row in rows:
        row["megabytes"] = row.pop("bytes") / 1e6
        row["speedup"] = row["texts_per_second"] / rows[0]["texts_per_second"] if "texts_per_second" in row else None
    result = {
        "checkpoint": checkpoint.name,
        "held_out_texts": len(material.held_out.tokens),
        "gates": {name: asdict(gate) for name, gate in GATES.items()},
        "threads": torch.get_num_threads(),
        "gpu": tensorrt.gpu_name(),
        "rows": rows,
    }
    _page(result).write(report, result)
    return result


def targets() -> list[str]:
    """Return the targets whose compiler is installed; TensorRT itself also needs a GPU to compile."""
    found = ["openvino"]
    for target in tensorrt.MODULES:
        try:
            tensorrt.load_module(target)
        except InputError as error:
            say(f"left out: {error}")
            continue
        if target == "tensorrt" and not tensorrt.gpu_name():
            say("left out: TensorRT compiles only where there is a GPU")
            continue
        found.append(target)
    return found


def _pytorch(material: Material, checkpoint: Path) -> dict[str, Any]:
    """Measure the checkpoint itself: fp32, every batch padded to its longest text."""

    def run(texts: Sequence[Sequence[int]]) -> None:
        input_ids, attention_mask = pad(texts)
        with torch.inference_mode():
            material.model(input_ids=input_ids, attention_mask=attention_mask)

    return {
        "engine": "PyTorch",
        "precision": "fp32",
        **accuracy(material.held_out.expected, material.held_out),
        **speed(run, material.held_out.tokens),
        "bytes": (checkpoint / "model.safetensors").stat().st_size,
        "checked_on": "PyTorch",
    }


def _page(result: dict[str, Any]) -> Page:
    rows = result["rows"]
    page = Page(
        f"Engines of {result['checkpoint']}",
        f"Held against PyTorch fp32 on {result['held_out_texts']} held-out texts. PyTorch pads each batch to its "
        f"longest text, the engines do not pad; texts/s is with batches of 64, × the ratio to PyTorch. "
        f"An engine that this machine cannot run was only compiled, and its graph checked in OpenVINO. "
        f"{result['threads']} threads; {result['gpu'] or 'no GPU'}.",
    )
    page.table(list(COLUMNS.values()), [[row.get(key) for key in COLUMNS] for row in rows])
    timed = [row for row in rows if "texts_per_second" in row]
    names = [f"{row['engine']} {row['precision']}" for row in timed]
    figure = Figure(figsize=(11, 0.5 * len(timed) + 1), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, key in zip(axes, ("texts_per_second", "latency_ms"), strict=True):
        bars = axis.barh(names, [row[key] for row in timed])
        axis.bar_label(bars, fmt="%.4g", padding=3)
        axis.set_xlabel(COLUMNS[key])
        axis.margins(x=0.15)
    axes[0].invert_yaxis()
    page.plot(figure, "speed of each engine")
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for row, name in zip(timed, names, strict=True):
        axis.scatter(row["texts_per_second"], row["agreement"] * 100, label=name)
    axis.set_xlabel(COLUMNS["texts_per_second"])
    axis.set_ylabel("top-1 agreement, %")
    axis.legend()
    page.plot(figure, "agreement against throughput")
    for row in rows:
        if row["precision"] == "int8":
            _int8(page, row)
    return page


def _int8(page: Page, row: dict[str, Any]) -> None:
    page.heading(f"INT8 for {row['engine']}")
    page.text("Divergence (nats a text) that each calibration causes on validation texts; the least is taken:")
    page.table(["calibration", "divergence"], list(row["calibration"].items()))
    kept = row["layers_in_fp16"]
    page.text(f"Layers left in fp16: {', '.join(kept)}." if kept else "All layers of the encoder are in INT8.")
    if "sensitivity" in row:
        page.table(["layer", "divergence when it alone is quantized"], list(row["sensitivity"].items()))
