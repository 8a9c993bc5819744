"""Build an engine from a checkpoint, verify it, and add it to a model repository as its next version."""

from __future__ import annotations

import bisect
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import torch

from aisle.build import compile_tensorrt, cuda_version, fp8, quantize
from aisle.build.adopt import checkpoint_of
from aisle.build.cuda_device import check_precision, find_device, gpu_problem
from aisle.build.cuda_runner import CudaRunner
from aisle.build.cuda_runtime import gpu_name
from aisle.build.encoder import Shape
from aisle.build.engine import (
    PRECISIONS,
    Engine,
    EngineSpec,
    PackedRunner,
    best_target,
    check_target,
    load_engine,
    openvino_runner,
)
from aisle.build.export import DTYPES, export
from aisle.build.gate import GATES, Gate, GateError, accuracy, check_finite, predict
from aisle.build.graph import PackedEncoder
from aisle.build.inputs import BuildInputs, DataSource, TextSource
from aisle.build.lineage import read_lineage
from aisle.build.openvino_graph import to_openvino
from aisle.build.recipe import recipe
from aisle.build.repository import check_version, new_version, read_report, versions
from aisle.build.varlen import VarlenEncoder, copy_weights, shape_of
from aisle.console import say
from aisle.errors import InputError
from aisle.files import write_json
from aisle.preprocess import fast, fields
from aisle.preprocess.pack import WIDEST
from aisle.preprocess.tables.table import fingerprint
from aisle.preprocess.windows import write_count
from aisle.train.core import decisions, heads, multi_label, sample
from aisle.train.core.checkpoint import Checkpoint


def build(
    source: Path,
    repository: Path,
    target: str | None = None,
    precision: str | None = None,
    *,
    data: DataSource | None = None,
    held_out: TextSource | None = None,
    max_tokens: int | None = None,
    windows: int = 1,
    gate: Gate | None = None,
    options: compile_tensorrt.CompilerOptions | None = None,
) -> dict[str, Any]:
    """Compile a checkpoint into the next version of a model repository.

    The default target depends on this machine: fp16 on a GPU, INT8 on a CPU.

    If the latest version has the same recipe, gate included, nothing is built.

    Args:
        source: a folder that `aisle train` made, or another fine-tuned classifier of transformers: a folder, or the
            name of one on the Hugging Face hub.
        data: labelled texts to calibrate and check with, instead of the checkpoint's own sample.
        held_out: texts to check with, instead of those of the sample or `data`.
        max_tokens: texts are truncated to this number of tokens; by default the checkpoint's own limit.
        windows: the most windows of a text, of a classifier that Aisle did not train.
        gate: thresholds for the engine, instead of those of its precision in `GATES`.

    Raises:
        InputError: the checkpoint cannot be compiled, or the repository cannot be written.
        GateError: the engine does not agree with the checkpoint; nothing is written.
    """
    start = time.perf_counter()
    target = target or best_target()
    precision = precision or PRECISIONS.get(target, ("",))[0]
    check_target(target, precision)
    if target in compile_tensorrt.MODULES:
        compile_tensorrt.load_module(target)  # a missing compiler is reported before the work
    gate, options = gate or GATES[precision], options or compile_tensorrt.CompilerOptions()
    with checkpoint_of(source, max_tokens, windows) as checkpoint:
        loaded = Checkpoint(checkpoint, max_tokens)
        spec = spec_of(loaded, target, precision)
        if target in compile_tensorrt.MODULES and spec.max_tokens > WIDEST:
            raise InputError(
                f"{target} takes texts of up to {WIDEST} tokens, not {spec.max_tokens}; lower --max-tokens, or use "
                "--target cuda"
            )
        texts, columns = _tables(checkpoint, data, held_out)
        fitted = checkpoint / (multi_label.FILE if loaded.multi_label else decisions.FILE)
        made_with = recipe(spec, gate, [*texts, fitted], columns, options)
        if (number := _built_before(repository, made_with)) is not None:
            say(f"version {number} is this same engine; nothing to do")
            return _result(number, spec, reused=True)
        inputs = BuildInputs(checkpoint, max_tokens, data, held_out)
        with new_version(repository) as (number, folders):
            _check_disk_space(checkpoint, repository)
            row = build_engine(inputs, spec, folders["encoder"], gate, options)
            if not gate.passes(row):
                raise _gate_error(row, gate, f"the {precision} engine does not agree with {source}")
            result = {
                **_result(number, spec, reused=False),
                **row,
                "gate": {**_thresholds(gate), "loosened": gate.is_looser_than(GATES[precision])},
                "seconds": round(time.perf_counter() - start, 1),
            }
            made_from = read_lineage(checkpoint)
            write_json(folders["encoder"] / "report.json", {**result, "recipe": made_with, **made_from})
            _write_text_files(inputs, checkpoint, folders)
    return result


def spec_of(checkpoint: Checkpoint, target: str, precision: str) -> EngineSpec:
    """Return the engine that is asked for, without what the build finds out."""
    tokenizer, logits = checkpoint.tokenizer, len(checkpoint.labels) + heads.width(checkpoint.heads)
    return EngineSpec(
        target, precision, tokenizer.max_tokens, logits, checkpoint.fingerprint, windows=tokenizer.windows
    )


def _tables(checkpoint: Path, data: DataSource | None, held_out: TextSource | None) -> tuple[list[Path], list[str]]:
    """Return the files to calibrate and check with, and the names of their columns."""
    paths = [data.path if data else checkpoint / sample.FILE, *([held_out.path] if held_out else [])]
    columns = [*astuple(data)[1:]] if data else []
    return paths, [*columns, *([held_out.text_column] if held_out else [])]


def _write_text_files(inputs: BuildInputs, checkpoint: Path, folders: dict[str, Path]) -> None:
    """Write what turns texts into tokens, and logits into categories and decisions."""
    inputs.tokenizer.save(folders["tokenizer"] / "tokenizer.json")
    write_count(folders["tokenizer"], inputs.tokenizer.windows)
    if inputs.checkpoint.fields:
        write_json(folders["tokenizer"] / fields.FILE, inputs.checkpoint.fields)
    write_json(folders["tokenizer"] / fast.DECISION, inputs.tokenizer.decide_fast(inputs.texts))
    shutil.copyfile(checkpoint / "labels.json", folders["encoder"] / "labels.json")
    if inputs.checkpoint.decisions:
        inputs.checkpoint.decisions.save(folders["encoder"])
    if inputs.checkpoint.thresholds:
        inputs.checkpoint.thresholds.save(folders["encoder"])
    if inputs.checkpoint.heads:
        heads.save_heads(folders["encoder"], inputs.checkpoint.heads)


def _gate_error(row: dict[str, Any], gate: Gate, message: str) -> GateError:
    """Return the error for an engine that failed its gate."""
    if count := row["not_finite"]:
        message += f": it gives no finite logits for {count} of {row['held_out_texts']} texts"
    elif failed := gate.failed_attributes(row):
        message += ": it gives " + ", ".join(f"the same {name} to {share:.2%}" for name, share in failed.items())
    return GateError(message, {**row, **_thresholds(gate)})


def _built_before(repository: Path, made_with: dict[str, Any]) -> int | None:
    """Return the latest version if it has this recipe and its files are unchanged."""
    built = versions(repository)
    if not built:
        return None
    try:
        check_version(repository, built[-1])
        same = read_report(repository, built[-1]).get("recipe") == made_with
    except InputError as error:
        say(f"{error}")
        return None
    return built[-1] if same else None


def build_engine(
    inputs: BuildInputs, spec: EngineSpec, folder: Path, gate: Gate, options: compile_tensorrt.CompilerOptions
) -> dict[str, Any]:
    """Compile one engine into a folder and compare it with PyTorch on the held-out texts.

    If the fully quantized INT8 or FP8 model fails the gate, its most sensitive layers stay in fp16: the smallest number
    that passes. Returns the measurements; the caller applies the gate.
    """
    _ = inputs.held_out  # fail first if the checkpoint's own logits are not finite
    if spec.target == "cuda":
        return _build_cuda_engine(inputs, spec, folder, gate)
    if spec.precision != "int8":
        return _build_from_onnx(inputs, PackedEncoder(inputs.model, DTYPES[spec.precision]), spec, folder, options)
    ranges, losses = inputs.ranges

    def attempt(skip: Sequence[str]) -> dict[str, Any]:
        graph = quantize.quantized(PackedEncoder(inputs.model, DTYPES["int8"]), ranges, skip)
        row = _build_from_onnx(inputs, graph, spec, folder, options)
        return {**row, "calibration": losses, "layers_in_fp16": list(skip)}

    row = attempt([])
    if gate.passes(row):
        return row
    return _keep_layers_in_fp16(
        row, attempt, quantize.sensitivity(inputs.model, ranges, inputs.validation, inputs.places), gate
    )


def _keep_layers_in_fp16(
    row: dict[str, Any],
    attempt: Callable[[Sequence[str]], dict[str, Any]],
    ranking: Sequence[tuple[str, float]],
    gate: Gate,
) -> dict[str, Any]:
    """Keep the smallest number of layers in fp16 that passes the gate, the most sensitive first.

    Mostly few layers are enough, so 1, 2, 4, … layers are tried, and then the numbers between the last two. If all
    layers but one are not enough, all stay in fp16.
    """
    mean = "micro" if "micro_f1" in row else "macro"
    say(f"agreement {row['agreement']:.2%}, {mean}-F1 loss {row['f1_loss']:.2%}: some layers must stay in fp16")
    names = [name for name, _ in ranking]
    attempts: list[tuple[int, dict[str, Any]]] = []

    def is_enough(count: int) -> bool:
        attempts.append((count, attempt(names[:count])))
        return gate.passes(attempts[-1][1])

    bound = 1
    while bound < len(names) and not is_enough(bound):
        bound *= 2
    between = range(bound // 2 + 1, min(bound, len(names)))
    fewest = between.start + bisect.bisect_left(between, True, key=is_enough)
    last, row = attempts[-1] if attempts else (0, row)  # the folder holds the engine of the last attempt
    return {**(row if last == fewest else attempt(names[:fewest])), "sensitivity": dict(ranking)}


def _build_cuda_engine(inputs: BuildInputs, spec: EngineSpec, folder: Path, gate: Gate) -> dict[str, Any]:
    """Write, load and check an engine over flat tokens. Without a GPU, the same module is checked on the CPU."""
    shape = replace(shape_of(inputs.model), embeds=True)
    spec = replace(spec, vocabulary=shape.vocabulary, embedding=shape.hidden)
    spec.save(folder)
    on_gpu = not gpu_problem()
    if on_gpu:
        check_precision(spec.precision, find_device())
    else:
        say(f"{gpu_problem()}: the same module is checked on the CPU")

    def attempt(skip: Sequence[str] = ()) -> dict[str, Any]:
        module = _cuda_module(inputs, spec, shape, skip)
        cuda_version.save(module, folder)
        if on_gpu:
            engine = load_engine(folder)
            cuda_version.save_cache(folder / cuda_version.CACHE)
        else:
            engine = Engine(CudaRunner(module, spec.max_tokens, torch.device("cpu")), spec)
        row = accuracy(predict(engine, inputs.held_out.tokens), inputs.held_out)
        return {
            **row,
            **({"layers_in_fp16": list(skip)} if spec.precision == "fp8" else {}),
            "held_out_texts": len(inputs.held_out.tokens),
            "checked_on": spec.target if on_gpu else "cpu (no GPU)",
            "bytes": (folder / cuda_version.WEIGHTS).stat().st_size,
        }

    row = attempt()
    if spec.precision != "fp8" or gate.passes(row):
        return row
    ranking = fp8.sensitivity(inputs.model, inputs.largest_inputs, inputs.validation, inputs.places)
    return _keep_layers_in_fp16(row, attempt, ranking, gate)


def _cuda_module(inputs: BuildInputs, spec: EngineSpec, shape: Shape, skip: Sequence[str]) -> VarlenEncoder:
    """Return the module with the checkpoint's weights, in the requested precision; layers in `skip` stay in fp16."""
    module = VarlenEncoder(shape, spec.max_tokens, cuda_version.DTYPES[spec.precision])
    copy_weights(module, inputs.model)
    check_finite(module, spec.precision)
    if spec.precision == "fp8":
        fp8.quantize(module, inputs.largest_inputs, skip)
    return module


def _build_from_onnx(
    inputs: BuildInputs, graph: PackedEncoder, spec: EngineSpec, folder: Path, options: compile_tensorrt.CompilerOptions
) -> dict[str, Any]:
    """Export, compile, load and check one graph; `folder` then holds the engine's files and engine.json."""
    onnx = folder / "model.onnx"
    check_finite(graph, spec.precision)
    say(f"exporting the {spec.precision} graph to ONNX")
    export(graph, spec.max_tokens, onnx)
    shape = graph.shape
    spec = replace(spec, graph=fingerprint(onnx), vocabulary=shape.vocabulary, embedding=shape.hidden)
    say(f"compiling it with {spec.target}")
    checked_on = spec.target
    if spec.target == "openvino":
        _save_for_openvino(onnx)
        spec.save(folder)
        engine = load_engine(folder)
    else:
        compile_tensorrt.compile_plan(onnx, folder, spec.target, spec.max_tokens, options)
        spec = replace(
            spec,
            runtime="" if options.version_compatible else compile_tensorrt.version_of(spec.target),
            device="" if options.hardware_compatible or spec.target == "tensorrt-rtx" else gpu_name(),
        )
        spec.save(folder)
        if gpu_name():
            engine = load_engine(folder)
        else:
            say("this machine has no GPU: the same graph is checked in OpenVINO instead")
            checked_on, engine = "openvino (no GPU)", Engine(PackedRunner(openvino_runner(onnx, spec), spec), spec)
    row = accuracy(predict(engine, inputs.held_out.tokens), inputs.held_out)
    onnx.unlink(missing_ok=True)
    size = sum(path.stat().st_size for path in folder.iterdir() if path.suffix in (".bin", ".xml", ".plan"))
    return {**row, "held_out_texts": len(inputs.held_out.tokens), "checked_on": checked_on, "bytes": size}


def _save_for_openvino(onnx: Path) -> None:
    """Convert the graph to OpenVINO's format; the weights keep their precision."""
    import openvino

    try:
        graph = to_openvino(onnx)
    except RuntimeError as error:
        raise InputError(f"OpenVINO cannot read {onnx.name}: {str(error).splitlines()[-1]}") from None
    openvino.save_model(graph, onnx.with_suffix(".xml"), compress_to_fp16=False)


def _check_disk_space(checkpoint: Path, repository: Path) -> None:
    """Make sure that ONNX graph and engine fit on the disk: each is about as large as the weights.

    Raises:
        InputError: they do not fit.
    """
    needed = 3 * (checkpoint / "model.safetensors").stat().st_size
    free = shutil.disk_usage(repository).free
    if free < needed:
        raise InputError(f"{repository}: {free >> 20} MiB free, about {needed >> 20} needed; make room")


def _thresholds(gate: Gate) -> dict[str, float]:
    return {"least_agreement": gate.agreement, "largest_f1_loss": gate.f1_loss}


def _result(version: int, spec: EngineSpec, reused: bool) -> dict[str, Any]:
    return {
        "version": version,
        "target": spec.target,
        "precision": spec.precision,
        "checkpoint": spec.checkpoint,
        "reused": reused,
    }
