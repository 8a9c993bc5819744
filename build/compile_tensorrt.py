"""Compile ONNX to a plan, with TensorRT or TensorRT-RTX: both have the same Python API. `plan_runner` runs plans."""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aisle.build.cuda_runtime import compute_capability, gpu_name
from aisle.build.repository import max_batch_size
from aisle.errors import InputError
from aisle.extras import install
from aisle.preprocess.pack import Packed

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
NAMES = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}
# Batches are padded to one of these numbers of rows, so that few shapes occur and each has its own CUDA graph.
ROWS = (1, 2, 3, 4, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64)
WIDTH_STEP = 8  # tokens; a request of one text is padded to a multiple of it
LATENCY, THROUGHPUT = 0, 1  # numbers of the optimization profiles: one text, full batch


@dataclass(frozen=True)
class CompilerOptions:
    """Options of the TensorRT compiler."""

    workspace_mb: int = 4096  # MiB
    version_compatible: bool = False  # the plan also runs on later TensorRT versions
    hardware_compatible: bool = False  # the plan also runs on other GPUs, from Ampere on
    timing_cache: Path | None = None  # file of kernel timings that makes the next build faster


def load_module(target: str) -> Any:
    """Import tensorrt or tensorrt_rtx.

    Raises:
        InputError: it is not installed.
    """
    try:
        return importlib.import_module(MODULES[target])
    except ImportError:
        raise InputError(f"{NAMES[target]} is not installed: {install(target)}") from None


def compile_plan(onnx: Path, folder: Path, target: str, max_tokens: int, options: CompilerOptions) -> None:
    """Compile an ONNX graph into `folder`: model.plan, build.log and, on a machine with a GPU, layers.json.

    Networks are strongly typed: every type comes from the graph.

    Raises:
        InputError: the graph cannot be parsed or compiled (the message quotes the compiler), or this machine's GPU is
            not supported.
    """
    trt = load_module(target)
    if problem := unsupported_gpu(target, compute_capability()):
        raise InputError(problem)
    with (folder / "build.log").open("w") as log:
        logger = make_logger(trt, log)
        builder = trt.Builder(logger)
        network, _parser = _parse(trt, builder, logger, onnx, target)  # the parser owns weights of the network
        config = _configure(trt, builder, options)
        for shapes in (_one_text(max_tokens), _full_batch(max_tokens)):
            profile = builder.create_optimization_profile()
            for name, limits in zip(Packed._fields, shapes, strict=True):
                profile.set_shape(name, *limits)
            if config.add_optimization_profile(profile) < 0:
                raise InputError(f"{NAMES[target]} refuses the shapes of {onnx.name}: {logger.last_error}")
        # TensorRT-RTX does not time kernels at compile time.
        cache_file = options.timing_cache if target == "tensorrt" else None
        if cache_file:
            _load_timing_cache(config, cache_file)
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise InputError(f"{NAMES[target]} cannot compile {onnx.name}: {logger.last_error}")
        (folder / "model.plan").write_bytes(plan)
        if cache_file:
            cache_file.write_bytes(config.get_timing_cache().serialize())
        if gpu_name():
            _write_layers(trt, logger, plan, folder / "layers.json")


def _parse(trt: Any, builder: Any, logger: Any, onnx: Path, target: str) -> tuple[Any, Any]:
    """Return the network of an ONNX file, and the parser.

    Raises:
        InputError: the file cannot be parsed.
    """
    # Later versions removed the flag: there, networks are always strongly typed.
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx)) or not network.num_outputs:
        reason = parser.get_error(0).desc() if parser.num_errors else "it holds no network"
        raise InputError(f"{NAMES[target]} cannot parse {onnx.name}: {reason}")
    return network, parser


def _configure(trt: Any, builder: Any, options: CompilerOptions) -> Any:
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mb << 20)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # for layers.json
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    return config


def _load_timing_cache(config: Any, path: Path) -> None:
    """Use the kernel timings in a file. Those of another TensorRT version are dropped."""
    cache = config.create_timing_cache(path.read_bytes() if path.exists() else b"")
    if not config.set_timing_cache(cache, False):
        config.set_timing_cache(config.create_timing_cache(b""), False)


def _write_layers(trt: Any, logger: Any, plan: Any, path: Path) -> None:
    """Write the plan's layers as JSON, if this GPU can load the plan."""
    engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
    if engine is not None:
        path.write_text(engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON))


def unsupported_gpu(target: str, capability: tuple[int, int] | None) -> str:
    """Return a sentence that says why TensorRT-RTX does not run on a compute capability, or "" if it does."""
    if target != "tensorrt-rtx" or capability is None:
        return ""
    names = [name for name in dir(load_module(target).ComputeCapability) if re.fullmatch(r"SM\d+", name)]
    known = sorted((int(name[2:-1]), int(name[-1])) for name in names)
    if capability in known:
        return ""
    listed = ", ".join(f"{major}.{minor}" for major, minor in known)
    return (
        f"TensorRT-RTX runs on GPUs of compute capability {listed}; this one has {capability[0]}.{capability[1]}: "
        "build with --target tensorrt or --target cuda"
    )


def version_of(target: str) -> str:
    """Return name and installed version, such as "TensorRT 11.0.0"."""
    return f"{NAMES[target]} {load_module(target).__version__}"


def _one_text(max_tokens: int) -> list[list[tuple[int, ...]]]:
    """Return the minimum, optimum and maximum shape of each input for one text."""
    rows: list[tuple[int, ...]] = [(1, WIDTH_STEP), (1, min(32, max_tokens)), (1, max_tokens)]
    return [rows, rows, rows, [(1,), (1,), (1,)]]


def _full_batch(max_tokens: int) -> list[list[tuple[int, ...]]]:
    """Return the minimum, optimum and maximum shape of each input for batches.

    Batches are padded to full width and to `max_batch_size()` texts; that many real texts fill about 24 of 64 rows.
    """
    rows: list[tuple[int, ...]] = [(ROWS[0], max_tokens), (24, max_tokens), (ROWS[-1], max_tokens)]
    return [rows, rows, rows, [(max_batch_size(),)] * 3]


def make_logger(trt: Any, log: Any) -> Any:
    """Return a logger for TensorRT that writes to the open file `log` (or None) and keeps `last_error`."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        """Writes the log to a file, and keeps the last error for the message."""

        last_error = "no reason given"

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                type(self).last_error = message
            if log is not None and not log.closed and severity <= trt.ILogger.Severity.INFO:
                log.write(f"{severity.name}: {message}\n")

    return Logger()
