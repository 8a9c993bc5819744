"""Build: a checkpoint to a verified engine, and the engine into the next version of a model repository."""

from __future__ import annotations

import bisect
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from aisle.build import quantize, tensorrt
from aisle.build.engine import PRECISIONS, Engine, EngineSpec, best_target, check_target, load_engine, openvino_runner
from aisle.build.export import DTYPES, export
from aisle.build.gate import GATES, Gate, GateError, accuracy, predict
from aisle.build.graph import PackedBert
from aisle.build.material import Material, Table
from aisle.build.repository import new_version, versions
from aisle.console import say
from aisle.errors import InputError
from aisle.files import write_json
from aisle.preprocess.encode import Encoder
from aisle.preprocess.table import fingerprint
from aisle.train.checkpoint import checkpoint_fingerprint, read_labels


def build(
    checkpoint: Path,
    repository: Path,
    target: str | None = None,
    precision: str | None = None,
    *,
    data: Table | None = None,
    max_tokens: int | None = None,
    gate: Gate | None = None,
    options: tensorrt.Options | None = None,
) -> dict[str, Any]:
    """Compile a checkpoint into the next version of a model repository; by default for what this machine has, in INT8.

    A repository whose latest version was built from the same checkpoint in the same way stays as it is.

    Args:
        data: labelled texts to calibrate and check with, in place of the sample that the checkpoint carries.
        max_tokens: of a text; the checkpoint's own limit by default.
        gate: what is asked of the engine, in place of its precision's `GATES`.

    Raises:
        InputError: the checkpoint cannot be compiled, or the repository cannot be written.
        GateError: the engine does not agree with the checkpoint; nothing is written.
    """
    start = time.perf_counter()
    target = target or best_target()
    precision = precision or PRECISIONS.get(target, ("",))[0]
    check_target(target, precision)
    labels = read_labels(checkpoint)
    length = Encoder(checkpoint / "tokenizer.json", max_tokens).max_tokens
    spec = EngineSpec(target, precision, length, len(labels), checkpoint_fingerprint(checkpoint))
    built = versions(repository)
    if built and _request(repository / "encoder" / str(built[-1])) == spec:
        say(f"version {built[-1]} is this very engine; nothing to do")
        return _result(built[-1], spec, reused=True)

    material = Material(checkpoint, max_tokens, data)
    asked = gate or GATES[precision]
    with new_version(repository) as (number, folders):
        _check_room(checkpoint, repository)
        row = make(material, spec, folders["encoder"], asked, options or tensorrt.Options())
        if not asked.passes(row):
            raise GateError(f"the {precision} engine does not answer as {checkpoint} does", {**row, **_asked(asked)})
        result = {
            **_result(number, spec, reused=False),
            **row,
            "gate": {**_asked(asked), "loosened": asked != GATES[precision]},
            "seconds": round(time.perf_counter() - start, 1),
        }
        write_json(folders["encoder"] / "report.json", result)
        material.encoder.save(folders["tokenizer"] / "tokenizer.json")
        shutil.copyfile(checkpoint / "labels.json", folders["labeler"] / "labels.json")
    return result


def make(material: Material, spec: EngineSpec, folder: Path, gate: Gate, options: tensorrt.Options) -> dict[str, Any]:
    """Compile one engine into a folder and hold it against PyTorch on the held-out texts.

    In INT8, where all layers quantized do not pass the gate, the fewest that make it pass stay in fp16, the most
    sensitive first. Returns what was measured; the caller judges it.
    """
    if spec.precision != "int8":
        return _compiled(material, PackedBert(material.model, DTYPES[spec.precision]), spec, folder, options)
    ranges, losses = material.ranges

    def attempt(skip: Sequence[str]) -> dict[str, Any]:
        graph = quantize.quantized(PackedBert(material.model, DTYPES["int8"]), ranges, skip)
        row = _compiled(material, graph, spec, folder, options)
        return {**row, "calibration": losses, "layers_in_fp16": list(skip)}

    row = attempt([])
    if gate.passes(row):
        return row
    say(f"agreement {row['agreement']:.2%}, macro-F1 loss {row['f1_loss']:.2%}: some layers must stay in fp16")
    ranking = quantize.sensitivity(material.model, ranges, material.validation)
    names = [name for name, _ in ranking]
    # The search goes by halves; where even sparing all but one is not enough, all are spared.
    fewest = 1 + bisect.bisect_left(range(1, len(names)), True, key=lambda count: gate.passes(attempt(names[:count])))
    return {**attempt(names[:fewest]), "sensitivity": dict(ranking)}


def _compiled(
    material: Material, graph: PackedBert, spec: EngineSpec, folder: Path, options: tensorrt.Options
) -> dict[str, Any]:
    """Export, compile, load and check one graph; the engine's files and engine.json are left in `folder`."""
    onnx = folder / "model.onnx"
    say(f"exporting the {spec.precision} graph to ONNX")
    export(graph, spec.max_tokens, onnx)
    spec = replace(spec, graph=fingerprint(onnx), vocabulary=material.model.config.vocab_size)
    say(f"compiling it with {spec.target}")
    checked_on = spec.target
    if spec.target == "openvino":
        _to_openvino(onnx)
        spec.save(folder)
        engine = load_engine(folder)
    else:
        tensorrt.compile_plan(onnx, folder, spec.target, spec.max_tokens, options)
        spec = replace(
            spec,
            runtime="" if options.version_compatible else tensorrt.version_of(spec.target),
            device="" if options.hardware_compatible or spec.target == "tensorrt-rtx" else tensorrt.gpu_name(),
        )
        spec.save(folder)
        if tensorrt.gpu_name():
            engine = load_engine(folder)
        else:
            say("no GPU here: the same graph is checked in OpenVINO instead")
            checked_on, engine = "openvino (no GPU)", Engine(openvino_runner(onnx, spec), spec)
    row = accuracy(predict(engine, material.held_out.tokens), material.held_out)
    onnx.unlink(missing_ok=True)
    size = sum(path.stat().st_size for path in folder.iterdir() if path.suffix in (".bin", ".xml", ".plan"))
    return {**row, "held_out_texts": len(material.held_out.tokens), "checked_on": checked_on, "bytes": size}


def _to_openvino(onnx: Path) -> None:
    """Write OpenVINO's own form of the graph, weights in the precision that they have."""
    import openvino

    try:
        graph = openvino.Core().read_model(onnx)
    except RuntimeError as error:
        raise InputError(f"OpenVINO cannot read {onnx.name}: {str(error).splitlines()[-1]}") from None
    openvino.save_model(graph, onnx.with_suffix(".xml"), compress_to_fp16=False)


def _check_room(checkpoint: Path, repository: Path) -> None:
    """Make sure before the work that ONNX and engine will fit on the disk: each about as large as the weights."""
    needed = 3 * (checkpoint / "model.safetensors").stat().st_size
    free = shutil.disk_usage(repository).free
    if free < needed:
        raise InputError(f"{repository}: {free >> 20} MiB free, about {needed >> 20} needed; make room")


def _request(folder: Path) -> EngineSpec | None:
    """Return what an engine was asked to be, without what building it found out."""
    try:
        return replace(EngineSpec.load(folder), graph="", vocabulary=0, runtime="", device="")
    except InputError:
        return None


def _asked(gate: Gate) -> dict[str, float]:
    return {"least_agreement": gate.agreement, "largest_f1_loss": gate.f1_loss}


def _result(version: int, spec: EngineSpec, reused: bool) -> dict[str, Any]:
    return {
        "version": version,
        "target": spec.target,
        "precision": spec.precision,
        "checkpoint": spec.checkpoint,
        "reused": reused,
    }
