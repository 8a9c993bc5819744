"""The runner of plans, with a fake CUDA runtime and a fake TensorRT: which calls it makes, and in which order."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from aisle.build import compile_tensorrt, cuda_runtime, engine, plan_runner
from aisle.build.cuda_runtime import CudaError, is_fatal
from aisle.build.plan_runner import PlanRunner
from aisle.build.repository import max_batch_size
from aisle.errors import InputError
from aisle.preprocess.pack import Packed, pack

WIDTH, LABELS, DEVICE = 32, 3, 1
ILLEGAL_ADDRESS = 700


class Runtime:
    """The used part of the CUDA runtime: device memory is host memory, a graph is a list of steps."""

    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)  # noqa: N815
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)  # noqa: N815

    def __init__(self) -> None:
        self.memory: dict[int, Any] = {}
        self.graph: list[Callable[[], None]] | None = None
        self.devices: dict[int, int] = {}  # by thread
        self.fails: dict[str, int] = {}

    def answer(self, name: str, *values: Any) -> tuple[Any, ...]:
        return (self.fails.pop(name, 0), *values)

    def do(self, step: Callable[[], None]) -> None:
        if self.devices.get(threading.get_ident(), 0) != DEVICE:
            raise AssertionError("work was queued on another GPU than the engine's")
        if self.graph is None:
            step()
        else:
            self.graph.append(step)

    def cudaSetDevice(self, device: int) -> tuple[Any, ...]:  # noqa: N802
        self.devices[threading.get_ident()] = device
        return self.answer("set")

    def cudaStreamCreate(self) -> tuple[Any, ...]:  # noqa: N802
        return self.answer("stream", 7)

    def cudaStreamSynchronize(self, stream: int) -> tuple[Any, ...]:  # noqa: N802
        return self.answer("synchronize")

    def cudaMalloc(self, size: int) -> tuple[Any, ...]:  # noqa: N802
        block = (ctypes.c_byte * size)()
        self.memory[ctypes.addressof(block)] = block
        return self.answer("malloc", ctypes.addressof(block))

    cudaMallocHost = cudaMalloc  # noqa: N815

    def cudaMemcpyAsync(self, to: int, source: int, size: int, kind: int, stream: int) -> tuple[Any, ...]:  # noqa: N802
        def copy() -> None:
            ctypes.memmove(to, source, size)

        self.do(copy)
        return self.answer("copy")

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> tuple[Any, ...]:  # noqa: N802
        if self.graph is not None:
            return (901,)  # the stream is being captured already
        self.graph = []
        return self.answer("begin")

    def cudaStreamEndCapture(self, stream: int) -> tuple[Any, ...]:  # noqa: N802
        graph, self.graph = self.graph, None
        return self.answer("end", graph)

    def cudaGraphInstantiate(self, graph: Any, flags: int) -> tuple[Any, ...]:  # noqa: N802
        return self.answer("instantiate", graph)

    def cudaGraphLaunch(self, graph: Any, stream: int) -> tuple[Any, ...]:  # noqa: N802
        if self.graph is not None:
            return (901,)
        for step in graph:
            step()
        return self.answer("launch")

    def cudaGetErrorString(self, code: int) -> tuple[Any, ...]:  # noqa: N802
        return 0, f"error {code}".encode()


class Context:
    """A network whose logits are the sum of the text's token ids, times 1, 2, 3 …"""

    def __init__(self, runtime: Runtime, config: Any) -> None:
        self.runtime, self.config = runtime, config
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.refuses = ""

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        return self.refuses != "profile"

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return self.refuses != "shape"

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return self.refuses != "address"

    def execute_async_v3(self, stream: int) -> bool:
        shapes, addresses = dict(self.shapes), dict(self.addresses)
        self.runtime.do(lambda: self.compute(shapes, addresses))
        return self.refuses != "run"

    def compute(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        def read(name: str) -> Any:
            count = int(np.prod(shapes[name]))
            return np.ctypeslib.as_array((ctypes.c_int64 * count).from_address(addresses[name]))

        ids, segments, first = read("input_ids"), read("segment_ids"), read("cls_index")
        sums = [ids[segments == segments[place]].sum() if segments[place] else 0 for place in first]
        logits = np.outer(sums, np.arange(1, LABELS + 1)).astype(np.float32)
        ctypes.memmove(addresses["outputs"], logits.tobytes(), logits.nbytes)


class TensorRT:
    """The used part of TensorRT."""

    __version__ = "11.4.0"
    DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER="eager")

    class ILogger:
        Severity = SimpleNamespace(ERROR=1, INFO=3)

    def __init__(self, runtime: Runtime) -> None:
        self.runtime, self.contexts = runtime, list[Context]()
        self.engine_host_code_allowed = False
        self.wants_host_code = False

    def Runtime(self, logger: Any) -> TensorRT:  # noqa: N802
        return self

    def deserialize_cuda_engine(self, plan: bytes) -> TensorRT | None:
        return None if self.wants_host_code and not self.engine_host_code_allowed else self

    def create_runtime_config(self) -> Any:
        return SimpleNamespace(dynamic_shapes_kernel_specialization_strategy="lazy")

    def create_execution_context(self, config: Any = None) -> Context:
        self.contexts.append(Context(self.runtime, config))
        return self.contexts[-1]


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch) -> TensorRT:
    runtime = Runtime()
    played = TensorRT(runtime)
    monkeypatch.setattr(plan_runner, "load_bindings", lambda: runtime)
    monkeypatch.setattr(plan_runner, "load_module", lambda target: played)
    monkeypatch.setattr(plan_runner, "gpu_name", lambda device_id: "NVIDIA A100 (8.0)")
    monkeypatch.setattr(plan_runner, "compute_capability", lambda device_id: (8, 0))
    return played


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    (tmp_path / "model.plan").write_bytes(b"plan")
    return tmp_path / "model.plan"


def runner(plan: Path, target: str = "tensorrt", *, version_compatible: bool = False) -> PlanRunner:
    return PlanRunner(plan, target, WIDTH, LABELS, DEVICE, version_compatible=version_compatible)


def batch(*lengths: int) -> tuple[Packed, Any]:
    """Return texts of these lengths packed, and the logits that the network gives them."""
    tokens = np.arange(1, sum(lengths) + 1)
    sums = [part.sum() for part in np.split(tokens, np.cumsum(lengths)[:-1])]
    return pack(tokens, np.array(lengths), WIDTH, narrow=False), np.outer(sums, np.arange(1, LABELS + 1))


def test_batches_of_every_size_come_back_in_order(trt: TensorRT, plan: Path) -> None:
    run = runner(plan)
    for lengths in ((5,), (32,), (3, 4), (32, 32, 1), tuple(range(1, 33)), (2,) * 64, (32,) * 64):
        packed, logits = batch(*lengths)
        assert np.array_equal(run(packed), logits)


def test_every_shape_is_captured_when_the_plan_is_loaded(trt: TensorRT, plan: Path) -> None:
    run = runner(plan)
    captured = set(run.graphs)
    assert captured == set(run.shapes())
    assert len(captured) == WIDTH // compile_tensorrt.WIDTH_STEP + len(compile_tensorrt.ROWS)
    for lengths in ((1,), (9,), (32,), (1, 1), (32,) * 64, (7,) * 50):
        run(batch(*lengths)[0])
    assert set(run.graphs) == captured


def test_shapes_lie_inside_the_profiles(trt: TensorRT, plan: Path) -> None:
    profiles = [compile_tensorrt._one_text(WIDTH), compile_tensorrt._full_batch(WIDTH)]
    for rows, width, texts in runner(plan).shapes():
        for profile, shapes in enumerate(profiles):
            least, _, most = shapes[0]
            fits = least <= (rows, width) <= most and shapes[3][0][0] <= texts <= shapes[3][2][0]
            assert fits or profile != int(texts > 1)
    assert profiles[1][0][0] == (1, WIDTH), "a batch is always filled up to full width; no narrower one is compiled for"
    assert profiles[1][3] == [(max_batch_size(),)] * 3


def test_another_thread_computes_on_the_engines_gpu(trt: TensorRT, plan: Path) -> None:
    run = runner(plan)
    packed, logits = batch(4, 5)
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(run(packed)))
    thread.start()
    thread.join()
    assert found
    assert np.array_equal(found[0], logits)


def test_a_failure_while_capturing_leaves_the_stream_usable(trt: TensorRT, plan: Path) -> None:
    run = runner(plan)
    packed, logits = batch(4, 5)
    run.graphs.clear()
    context = trt.contexts[compile_tensorrt.THROUGHPUT]
    queued, run._enqueue = run._enqueue, lambda packed: None  # type: ignore[method-assign]  # the first run, as it is
    context.refuses = "run"

    def enqueue(packed: Packed) -> None:
        if trt.runtime.graph is not None:
            queued(packed)

    run._enqueue = enqueue  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="TensorRT could not run the network"):
        run(packed)
    context.refuses, run._enqueue = "", queued  # type: ignore[method-assign]
    assert np.array_equal(run(packed), logits)


@pytest.mark.parametrize(
    ("refusal", "message"),
    [
        ("shape", r"could not take input_ids of shape \(1, 32\)"),
        ("address", "could not take the address of input_ids"),
        ("run", "could not run the network"),
    ],
)
def test_a_refusal_of_tensorrt_is_an_error(trt: TensorRT, plan: Path, refusal: str, message: str) -> None:
    run = runner(plan)
    run.graphs.clear()
    trt.contexts[compile_tensorrt.THROUGHPUT].refuses = refusal
    with pytest.raises(RuntimeError, match=message):
        run(batch(4, 5)[0])


def test_a_refused_profile_is_an_error(trt: TensorRT, plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Context, "set_optimization_profile_async", lambda *_: False)
    with pytest.raises(RuntimeError, match="could not select profile 0"):
        runner(plan)


def test_a_version_compatible_plan_may_run_its_own_code(trt: TensorRT, plan: Path) -> None:
    trt.wants_host_code = True
    with pytest.raises(InputError, match=r"TensorRT 11\.4\.0 refuses .*build it again here"):
        runner(plan)
    assert np.array_equal(runner(plan, version_compatible=True)(batch(3, 3)[0]), batch(3, 3)[1])


def test_rtx_compiles_the_kernels_of_a_shape_before_a_graph_keeps_them(trt: TensorRT, plan: Path) -> None:
    runner(plan, "tensorrt-rtx")
    assert [each.config.dynamic_shapes_kernel_specialization_strategy for each in trt.contexts] == ["eager", "eager"]


def test_a_gpu_that_rtx_does_not_run_on_is_refused_by_name(
    trt: TensorRT, plan: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(plan_runner, "compute_capability", lambda device_id: (9, 0))
    monkeypatch.setattr(compile_tensorrt, "compute_capability", lambda device_id=0: (9, 0))
    refusal = r"compute capability 7\.5, .*12\.1; this one has 9\.0: build with --target tensorrt or --target cuda"
    with pytest.raises(InputError, match=refusal):
        runner(plan, "tensorrt-rtx")
    with pytest.raises(InputError, match=refusal):
        compile_tensorrt.compile_plan(plan, tmp_path, "tensorrt-rtx", 128, compile_tensorrt.CompilerOptions())


def test_fatal_errors_are_recognized(trt: TensorRT, plan: Path) -> None:
    run = runner(plan)
    trt.runtime.fails["launch"] = ILLEGAL_ADDRESS
    with pytest.raises(CudaError, match=r"CUDA: error 700 \(700\)") as caught:
        run(batch(4, 5)[0])
    assert is_fatal(caught.value)
    trt.runtime.fails["copy"] = 2  # out of memory
    run.graphs.clear()
    with pytest.raises(CudaError) as caught:
        run(batch(4, 5)[0])
    assert not is_fatal(caught.value)
    assert not is_fatal(RuntimeError("TensorRT could not run the network"))

    torch_error = type("AcceleratorError", (RuntimeError,), {"error_code": ILLEGAL_ADDRESS})
    assert is_fatal(torch_error("CUDA error: an illegal memory access was encountered"))


def test_an_old_driver_is_reported(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    runtime = SimpleNamespace(
        cudaDriverGetVersion=lambda: (0, 12080),
        cudaRuntimeGetVersion=lambda: (0, 13010),
        cudaGetDeviceCount=lambda: (cuda_runtime.TOO_OLD, None),
        cudaGetDeviceProperties=lambda device: (cuda_runtime.TOO_OLD, None),
    )
    monkeypatch.setattr(cuda_runtime, "load_bindings", lambda: runtime)
    problem = cuda_runtime.driver_problem()
    assert problem == (
        "the NVIDIA driver supports CUDA 12.8 and cuda-bindings needs 13.1; update the driver, or: "
        "pip install 'cuda-bindings<13'"
    )
    assert engine.best_target() == "openvino"
    assert f"the GPU is not used: {problem}" in " ".join(capsys.readouterr().err.split())


def test_the_encoders_process_ends_when_the_gpu_is_lost(tmp_path: Path) -> None:
    code = """if True:
        from aisle.build.cuda_runtime import CudaError
        from aisle.deploy.serving.lost_gpu import end_if_lost
        end_if_lost(RuntimeError("the batch was odd"))
        end_if_lost(CudaError(700, "an illegal memory access was encountered"))
        print("still here")
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("this process has lost its GPU: CUDA: an illegal memory access")
    assert done.stderr.count("\n") == 1
