"""The engine: packs a batch of texts, runs the compiled graph. What the build measures is what Triton serves."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from aisle.build import tensorrt
from aisle.errors import InputError
from aisle.preprocess.pack import Packed, pack

Run = Callable[[Packed], npt.NDArray[np.float32]]
# The precisions each target computes in, its default first.
PRECISIONS = {
    "openvino": ("int8", "bf16", "fp32"),
    "tensorrt": ("int8", "fp16", "bf16", "fp32"),
    "tensorrt-rtx": ("int8", "fp16", "bf16", "fp32"),
}


@dataclass(frozen=True)
class EngineSpec:
    """engine.json: what lies in a version folder of `encoder`, and how it is to be run."""

    target: str
    precision: str
    max_tokens: int
    labels: int
    checkpoint: str  # fingerprint of the checkpoint it was built from
    graph: str = ""  # SHA-256 of the ONNX graph
    vocabulary: int = 0  # token ids it has embeddings for
    runtime: str = ""  # the only one that runs it, as "TensorRT 11.0.0"; empty: any version
    device: str = ""  # the only kind of GPU that runs it, as "NVIDIA H100 (9.0)"; empty: any

    def save(self, folder: Path) -> None:
        (folder / "engine.json").write_text(json.dumps(asdict(self), indent=2) + "\n")

    @staticmethod
    def load(folder: Path) -> EngineSpec:
        """Read engine.json.

        Raises:
            InputError: it is missing or damaged.
        """
        try:
            return EngineSpec(**json.loads((folder / "engine.json").read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"{folder} holds no engine: {error}") from None


class Engine:
    """Logits of texts given as token ids."""

    def __init__(self, run: Run, spec: EngineSpec) -> None:
        self._run = run
        self.spec = spec

    def __call__(
        self,
        tokens: npt.NDArray[np.integer[Any]],
        lengths: npt.NDArray[np.integer[Any]],
        work: defaultdict[str, float] | None = None,
    ) -> npt.NDArray[np.float32]:
        """Return logits [texts, labels] of texts laid end to end in `tokens`, `lengths` [texts] tokens each.

        Args:
            work: counts, if given, `tokens_useful`, `tokens_computed`, `engine_seconds` and `engine_batches`.
        """
        start = time.perf_counter()
        # A plan has a CUDA graph for every number of full rows; on a CPU any shape is as good as another.
        packed = pack(tokens, lengths, self.spec.max_tokens, narrow=self.spec.target == "openvino")
        logits = self._run(packed)
        if work is not None:
            work["tokens_useful"] += len(tokens)
            work["tokens_computed"] += packed.input_ids.size
            work["engine_seconds"] += time.perf_counter() - start
            work["engine_batches"] += 1
        return logits


def check_target(target: str, precision: str) -> None:
    """Make sure that there is such an engine.

    Raises:
        InputError: naming the targets, or the target's precisions.
    """
    if target not in PRECISIONS:
        raise InputError(f"no target {target!r}; choose from {', '.join(PRECISIONS)}")
    if precision not in PRECISIONS[target]:
        raise InputError(f"{target} does not run {precision!r}; choose from {', '.join(PRECISIONS[target])}")


def best_target() -> str:
    """Return what this machine serves fastest with: TensorRT where it and a GPU are at hand, else OpenVINO."""
    if tensorrt.gpu_name():
        try:
            tensorrt.load_module("tensorrt")
            return "tensorrt"
        except InputError:
            pass
    return "openvino"


def load_engine(folder: Path, device_id: str = "0") -> Engine:
    """Load the engine of a version folder; `device_id` is Triton's number of the GPU, where the target needs one.

    Raises:
        InputError: the folder holds no engine, or one that this machine cannot run.
    """
    spec = EngineSpec.load(folder)
    check_target(spec.target, spec.precision)
    try:
        run = (
            openvino_runner(folder / "model.xml", spec) if spec.target == "openvino" else _plan(folder, spec, device_id)
        )
        return Engine(run, spec)
    except InputError:
        raise
    except Exception as error:  # each runtime raises its own
        raise InputError(f"{folder}: the engine cannot be loaded: {str(error).splitlines()[0]}") from None


def openvino_runner(model: Path, spec: EngineSpec) -> Run:
    """Compile OpenVINO's own form of the graph, or the ONNX graph itself, for this CPU."""
    import openvino

    # Around int8 products, and where an fp16 graph is only to be checked, what is left runs in this type.
    precision = {"fp32": "f32", "fp16": "f32", "bf16": "bf16", "int8": "bf16"}[spec.precision]
    compiled: Any = openvino.Core().compile_model(
        model, "CPU", {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    )
    request = compiled.create_infer_request()

    def run(packed: Packed) -> npt.NDArray[np.float32]:
        request.infer(list(packed), share_inputs=True)
        logits: npt.NDArray[np.float32] = request.get_output_tensor(0).data.copy()
        return logits

    return run


def _plan(folder: Path, spec: EngineSpec, device_id: str) -> Run:
    """Check that the plan fits this machine before TensorRT reads it: its own refusal does not say what to do."""
    here = tensorrt.version_of(spec.target)
    if spec.runtime and spec.runtime != here:
        raise InputError(f"{folder}: the plan was built by {spec.runtime} and this is {here}; build it again here")
    gpu = tensorrt.gpu_name(int(device_id))
    if gpu and spec.device and spec.device != gpu:
        raise InputError(f"{folder}: the plan was built for {spec.device} and this is {gpu}; build it again here")
    return tensorrt.PlanRunner(folder / "model.plan", spec.target, spec.max_tokens, spec.labels, int(device_id))
