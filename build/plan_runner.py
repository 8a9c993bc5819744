"""Run a TensorRT plan on a GPU, with one CUDA graph for each shape, captured when the plan is loaded."""

from __future__ import annotations

import contextlib
import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from aisle.build.compile_tensorrt import (
    LATENCY,
    NAMES,
    ROWS,
    THROUGHPUT,
    WIDTH_STEP,
    load_module,
    make_logger,
    unsupported_gpu,
)
from aisle.build.cuda_runtime import check, compute_capability, driver_problem, gpu_name, load_bindings
from aisle.build.repository import max_batch_size
from aisle.errors import InputError
from aisle.preprocess.pack import Packed

Shape = tuple[int, int, int]  # rows, width, texts


class PlanRunner:
    """Runs a plan. Any thread may call it, but only one at a time."""

    def __init__(
        self,
        plan: Path,
        target: str,
        max_tokens: int,
        outputs: int,
        device_id: int,
        *,
        version_compatible: bool = False,
    ) -> None:
        """Load a plan onto a GPU and warm up every shape.

        Args:
            outputs: values for each text: logits and embedding.
            version_compatible: the plan contains its own runtime, which TensorRT must be allowed to run.

        Raises:
            InputError: there is no such GPU, its driver is too old, or the plan does not fit it.
            CudaError, RuntimeError: the GPU or TensorRT failed.
        """
        trt = load_module(target)
        if not gpu_name(device_id):
            no_gpu = f"a {NAMES[target]} plan needs an NVIDIA GPU and its driver; found none"
            raise InputError(driver_problem() or no_gpu)
        if problem := unsupported_gpu(target, compute_capability(device_id)):
            raise InputError(problem)
        self.cuda: Any = load_bindings()
        self.max_tokens, self.outputs, self.device_id = max_tokens, outputs, device_id
        self.max_texts = max_batch_size()
        self._check(self.cuda.cudaSetDevice(device_id))
        self.logger = make_logger(trt, None)
        self.engine = self._deserialize(trt, plan, target, version_compatible)
        self.stream = self._check(self.cuda.cudaStreamCreate())
        self.contexts = [self._context(trt, target, profile) for profile in (LATENCY, THROUGHPUT)]
        self.inputs = {name: self._buffer((ROWS[-1] * max_tokens,), np.int64) for name in Packed._fields[:3]}
        self.inputs["cls_index"] = self._buffer((self.max_texts,), np.int64)
        self.output = self._buffer((self.max_texts, outputs), np.float32)
        self.graphs: dict[Shape, Any] = {}
        for shape in self.shapes():
            self(_warm_up_batch(*shape))

    def shapes(self) -> list[Shape]:
        """Return all shapes that occur: one text at each width, and a batch at each number of rows."""
        one = [(1, width, 1) for width in range(WIDTH_STEP, self.max_tokens + 1, WIDTH_STEP)]
        return one + [(rows, self.max_tokens, self.max_texts) for rows in ROWS]

    def __call__(self, packed: Packed) -> npt.NDArray[np.float32]:
        """Return the outputs [texts, outputs] of at most `max_texts` texts."""
        # CUDA keeps the current device per thread, and the loading thread is not the one that computes.
        self._check(self.cuda.cudaSetDevice(self.device_id))
        texts = len(packed.cls_index)
        packed, shape = self._pad_to_shape(packed)
        for name, value in packed._asdict().items():
            self.inputs[name].host[: value.size] = value.ravel()
        if shape not in self.graphs:
            self._enqueue(packed)  # the first run allocates memory, which is not allowed during a capture
            self._check(self.cuda.cudaStreamSynchronize(self.stream))
            self.graphs[shape] = self._capture(packed)
        self._check(self.cuda.cudaGraphLaunch(self.graphs[shape], self.stream))
        self._check(self.cuda.cudaStreamSynchronize(self.stream))
        return self.output.host[:texts].copy()

    def _deserialize(self, trt: Any, plan: Path, target: str, version_compatible: bool) -> Any:
        self.runtime = trt.Runtime(self.logger)
        if version_compatible:  # safe: the manifest contains the plan's digest
            self.runtime.engine_host_code_allowed = True
        engine = self.runtime.deserialize_cuda_engine(plan.read_bytes())
        if engine is None:
            reason = self.logger.last_error
            raise InputError(f"{NAMES[target]} {trt.__version__} refuses {plan}: {reason}; build it again here")
        return engine

    def _context(self, trt: Any, target: str, profile: int) -> Any:
        """Return an execution context with a fixed optimization profile."""
        if target == "tensorrt-rtx":
            # By default TensorRT-RTX starts with fallback kernels, and a CUDA graph would keep them forever.
            config = self.engine.create_runtime_config()
            config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
            context = self.engine.create_execution_context(config)
        else:
            context = self.engine.create_execution_context()
        if context is None:
            raise RuntimeError(f"TensorRT could not make an execution context: {self.logger.last_error}")
        self._require(context.set_optimization_profile_async(profile, int(self.stream)), f"select profile {profile}")
        self._check(self.cuda.cudaStreamSynchronize(self.stream))
        return context

    def _pad_to_shape(self, packed: Packed) -> tuple[Packed, Shape]:
        """Pad rows and texts up to the next shape that has a CUDA graph."""
        rows, width = packed.input_ids.shape
        texts = len(packed.cls_index)
        if texts == 1:
            return packed, (1, width, 1)
        padded_rows = next(each for each in ROWS if each >= rows)
        padding = ((0, padded_rows - rows), (0, self.max_tokens - width))
        filler = np.zeros(self.max_texts - texts, np.int64)
        row, column = np.divmod(packed.cls_index, width)
        cls_index = np.concatenate([row * self.max_tokens + column, filler])
        input_ids, position_ids, segment_ids = (np.pad(each, padding) for each in packed[:3])
        shape = (padded_rows, self.max_tokens, self.max_texts)
        return Packed(input_ids, position_ids, segment_ids, cls_index), shape

    def _enqueue(self, packed: Packed) -> None:
        """Queue the copies to the GPU, the network and the copy back."""
        kind = self.cuda.cudaMemcpyKind
        context = self.contexts[LATENCY if len(packed.cls_index) == 1 else THROUGHPUT]
        for name, value in packed._asdict().items():
            buffer = self.inputs[name]
            copy = buffer.device, buffer.host.ctypes.data, value.nbytes, kind.cudaMemcpyHostToDevice, self.stream
            self._check(self.cuda.cudaMemcpyAsync(*copy))
            self._require(context.set_input_shape(name, value.shape), f"take {name} of shape {value.shape}")
            self._require(context.set_tensor_address(name, buffer.device), f"take the address of {name}")
        self._require(context.set_tensor_address("outputs", self.output.device), "take the address of outputs")
        self._require(context.execute_async_v3(int(self.stream)), "run the network")
        size = len(packed.cls_index) * self.outputs * 4
        back = self.output.host.ctypes.data, self.output.device, size, kind.cudaMemcpyDeviceToHost, self.stream
        self._check(self.cuda.cudaMemcpyAsync(*back))

    def _capture(self, packed: Packed) -> Any:
        mode = self.cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._check(self.cuda.cudaStreamBeginCapture(self.stream, mode))
        try:
            self._enqueue(packed)
        except BaseException:
            # A capture left open makes every later call on this stream fail.
            with contextlib.suppress(Exception):
                self.cuda.cudaStreamEndCapture(self.stream)
            raise
        graph = self._check(self.cuda.cudaStreamEndCapture(self.stream))
        return self._check(self.cuda.cudaGraphInstantiate(graph, 0))

    def _buffer(self, shape: tuple[int, ...], dtype: Any) -> _Buffer:
        """Return page-locked host memory, which allows asynchronous copies, and GPU memory of the same size."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        address = self._check(self.cuda.cudaMallocHost(size))
        memory = (ctypes.c_byte * size).from_address(int(address))
        host: npt.NDArray[Any] = np.ctypeslib.as_array(memory).view(dtype).reshape(shape)
        host[:] = 0
        return _Buffer(host, int(self._check(self.cuda.cudaMalloc(size))))

    def _check(self, result: tuple[Any, ...]) -> Any:
        return check(self.cuda, result)

    def _require(self, accepted: bool, action: str) -> None:
        """Raise if TensorRT returned False: that is how it reports failure."""
        if not accepted:
            raise RuntimeError(f"TensorRT could not {action}: {self.logger.last_error}")


@dataclass(frozen=True)
class _Buffer:
    host: npt.NDArray[Any]
    device: int


def _warm_up_batch(rows: int, width: int, texts: int) -> Packed:
    """Return a batch of a shape to warm up with: one text of [PAD] tokens in each row."""
    zeros = np.zeros((rows, width), np.int64)
    position_ids = np.broadcast_to(np.arange(width), (rows, width)).copy()
    segment_ids = np.broadcast_to(np.arange(1, rows + 1)[:, None], (rows, width)).copy()
    return Packed(zeros, position_ids, segment_ids, np.arange(texts) % rows * width)
