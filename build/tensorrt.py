"""TensorRT and TensorRT-RTX through one code path: their Python APIs agree. ONNX to plan, and a plan on a GPU."""

from __future__ import annotations

import ctypes
import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from aisle.errors import InputError
from aisle.preprocess.pack import Packed

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
NAMES = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}
MAX_TEXTS = 64  # of a batch: max_batch_size of the encoder's configuration
# Rows that a batch is filled up to, so that few shapes occur and each has its CUDA graph.
ROWS = (1, 2, 3, 4, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64)
LATENCY, THROUGHPUT = 0, 1  # the optimization profiles: one text, a full batch


@dataclass(frozen=True)
class Options:
    """How a plan is compiled."""

    workspace_mb: int = 4096
    version_compatible: bool = False  # the plan also runs on later TensorRT versions
    hardware_compatible: bool = False  # the plan also runs on other GPUs, from Ampere on
    timing_cache: Path | None = None  # kernel timings, read and written, so that the next build is faster


def load_module(target: str) -> Any:
    """Import tensorrt or tensorrt_rtx.

    Raises:
        InputError: it is not installed.
    """
    try:
        return importlib.import_module(MODULES[target])
    except ImportError:
        raise InputError(f"{NAMES[target]} is not installed: pip install 'aisle[{target}]'") from None


def compile_plan(onnx: Path, folder: Path, target: str, max_tokens: int, options: Options) -> None:
    """Compile an ONNX graph into `folder`: model.plan, build.log and, where a GPU is at hand, layers.json.

    Types are those of the graph: networks are strongly typed.

    Raises:
        InputError: the graph cannot be parsed or compiled; the message is the compiler's own.
    """
    trt = load_module(target)
    with (folder / "build.log").open("w") as log:
        logger = _logger(trt, log)
        builder = trt.Builder(logger)
        strongly_typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # gone where it is a given
        network = builder.create_network(0 if strongly_typed is None else 1 << int(strongly_typed))
        parser = trt.OnnxParser(network, logger)
        if not parser.parse_from_file(str(onnx)) or not network.num_outputs:
            reason = parser.get_error(0).desc() if parser.num_errors else "it holds no network"
            raise InputError(f"{NAMES[target]} cannot parse {onnx.name}: {reason}")
        config = builder.create_builder_config()
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mb << 20)
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # for layers.json
        if options.version_compatible:
            config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        if options.hardware_compatible:
            config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
        for shapes in (_one_text(max_tokens), _full_batch(max_tokens)):
            profile = builder.create_optimization_profile()
            for name, limits in zip(Packed._fields, shapes, strict=True):
                profile.set_shape(name, *limits)
            config.add_optimization_profile(profile)
        # TensorRT-RTX times nothing while it compiles.
        cached = options.timing_cache if target == "tensorrt" else None
        if cached:  # a file of another version is replaced, not used
            cache = config.create_timing_cache(cached.read_bytes() if cached.exists() else b"")
            config.set_timing_cache(cache, False)

        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise InputError(f"{NAMES[target]} cannot compile {onnx.name}: {logger.last_error}")
        (folder / "model.plan").write_bytes(plan)
        if cached:
            cached.write_bytes(config.get_timing_cache().serialize())
        engine = trt.Runtime(logger).deserialize_cuda_engine(plan) if gpu_name() else None
        if engine is not None:
            layers = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
            (folder / "layers.json").write_text(layers)


def version_of(target: str) -> str:
    """Return the installed version, as "TensorRT 11.0.0"."""
    return f"{NAMES[target]} {load_module(target).__version__}"


def gpu_name(device_id: int = 0) -> str:
    """Return a GPU's name and compute capability, or "" where there is none."""
    try:
        from cuda.bindings import runtime as cuda
    except ImportError:
        return ""
    error, properties = cuda.cudaGetDeviceProperties(device_id)
    if int(error):
        return ""
    return f"{properties.name.decode()} ({properties.major}.{properties.minor})"


class PlanRunner:
    """Runs a plan on a GPU: for each shape a CUDA graph, captured at its first use and replayed from then on."""

    def __init__(self, plan: Path, target: str, max_tokens: int, labels: int, device_id: int) -> None:
        """Load a plan onto a GPU.

        Raises:
            InputError: there is no such GPU, or the plan does not fit it.
        """
        trt = load_module(target)
        if not gpu_name(device_id):
            raise InputError(f"a {NAMES[target]} plan needs an NVIDIA GPU and its driver; found none")
        from cuda.bindings import runtime as cuda

        self.cuda, self.max_tokens, self.labels = cuda, max_tokens, labels
        self._check(cuda.cudaSetDevice(device_id))
        self.engine = trt.Runtime(_logger(trt, None)).deserialize_cuda_engine(plan.read_bytes())
        if self.engine is None:
            raise InputError(f"{NAMES[target]} {trt.__version__} refuses {plan}; build it again on this machine")
        self.stream = self._check(cuda.cudaStreamCreate())
        self.contexts = []
        for profile in (LATENCY, THROUGHPUT):
            context = self.engine.create_execution_context()
            context.set_optimization_profile_async(profile, self.stream)
            self.contexts.append(context)
        tokens = ROWS[-1] * max_tokens
        self.inputs = {name: self._buffer((tokens,), np.int64) for name in Packed._fields[:3]}
        self.inputs["cls_index"] = self._buffer((MAX_TEXTS,), np.int64)
        self.output = self._buffer((MAX_TEXTS, labels), np.float32)
        self.graphs: dict[tuple[int, int, int], Any] = {}

    def __call__(self, packed: Packed) -> npt.NDArray[np.float32]:
        """Return logits [texts, labels] of at most `MAX_TEXTS` texts."""
        texts = len(packed.cls_index)
        packed, shape = self._filled_up(packed)
        for name, value in packed._asdict().items():
            self.inputs[name].host[: value.size] = value.ravel()
        if shape not in self.graphs:
            self._enqueue(packed)  # once as it is: capturing allows no allocation, and a first run allocates
            self._check(self.cuda.cudaStreamSynchronize(self.stream))
            self.graphs[shape] = self._capture(packed)
        self._check(self.cuda.cudaGraphLaunch(self.graphs[shape], self.stream))
        self._check(self.cuda.cudaStreamSynchronize(self.stream))
        return self.output.host[:texts].copy()

    def _filled_up(self, packed: Packed) -> tuple[Packed, tuple[int, int, int]]:
        """Add rows and texts that nobody reads, up to the next shape that has a CUDA graph."""
        rows, width = packed.input_ids.shape
        texts = len(packed.cls_index)
        if texts == 1:
            return packed, (1, width, 1)
        wanted = next(each for each in ROWS if each >= rows)
        grow = ((0, wanted - rows), (0, self.max_tokens - width))
        rest = np.zeros(MAX_TEXTS - texts, np.int64)
        row, column = np.divmod(packed.cls_index, width)
        cls_index = np.concatenate([row * self.max_tokens + column, rest])
        input_ids, position_ids, segment_ids = (np.pad(each, grow) for each in packed[:3])
        shape = (wanted, self.max_tokens, MAX_TEXTS)
        return Packed(input_ids, position_ids, segment_ids, cls_index), shape

    def _enqueue(self, packed: Packed) -> None:
        """Queue copies to the GPU, the network and the copy back."""
        kind = self.cuda.cudaMemcpyKind
        context = self.contexts[LATENCY if len(packed.cls_index) == 1 else THROUGHPUT]
        for name, value in packed._asdict().items():
            buffer = self.inputs[name]
            copy = buffer.device, buffer.host.ctypes.data, value.nbytes, kind.cudaMemcpyHostToDevice, self.stream
            self._check(self.cuda.cudaMemcpyAsync(*copy))
            context.set_input_shape(name, value.shape)
            context.set_tensor_address(name, buffer.device)
        context.set_tensor_address("logits", self.output.device)
        if not context.execute_async_v3(int(self.stream)):
            raise RuntimeError("TensorRT could not run the network")
        size = len(packed.cls_index) * self.labels * 4
        back = self.output.host.ctypes.data, self.output.device, size, kind.cudaMemcpyDeviceToHost, self.stream
        self._check(self.cuda.cudaMemcpyAsync(*back))

    def _capture(self, packed: Packed) -> Any:
        mode = self.cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._check(self.cuda.cudaStreamBeginCapture(self.stream, mode))
        self._enqueue(packed)
        graph = self._check(self.cuda.cudaStreamEndCapture(self.stream))
        return self._check(self.cuda.cudaGraphInstantiate(graph, 0))

    def _buffer(self, shape: tuple[int, ...], dtype: Any) -> _Buffer:
        """Return page-locked memory of the host, so that copies are asynchronous, and as much on the GPU."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        address = self._check(self.cuda.cudaMallocHost(size))
        memory = (ctypes.c_byte * size).from_address(int(address))
        host: npt.NDArray[Any] = np.ctypeslib.as_array(memory).view(dtype).reshape(shape)
        host[:] = 0
        return _Buffer(host, int(self._check(self.cuda.cudaMalloc(size))))

    def _check(self, answer: tuple[Any, ...]) -> Any:
        error, *value = answer
        if int(error):
            raise RuntimeError(f"CUDA: {self.cuda.cudaGetErrorString(error)[1].decode()}")
        return value[0] if value else None


@dataclass(frozen=True)
class _Buffer:
    host: npt.NDArray[Any]
    device: int


def _one_text(max_tokens: int) -> list[list[tuple[int, ...]]]:
    """Return least, best and largest shapes of each input for one text."""
    rows: list[tuple[int, ...]] = [(1, 8), (1, min(32, max_tokens)), (1, max_tokens)]
    return [rows, rows, rows, [(1,), (1,), (1,)]]


def _full_batch(max_tokens: int) -> list[list[tuple[int, ...]]]:
    """Return least, best and largest shapes of each input for batches; real texts fill about 24 of 64 rows."""
    rows: list[tuple[int, ...]] = [(1, 8), (24, max_tokens), (ROWS[-1], max_tokens)]
    return [rows, rows, rows, [(1,), (MAX_TEXTS,), (MAX_TEXTS,)]]


def _logger(trt: Any, log: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        """Writes the log to a file, and remembers the last error for the message."""

        last_error = "no reason given"

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                type(self).last_error = message
            if log is not None and not log.closed and severity <= trt.ILogger.Severity.INFO:
                log.write(f"{severity.name}: {message}\n")

    return Logger()
