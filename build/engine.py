"""The engine: packs a batch of texts, runs the compiled graph. What the build measures is what Triton serves."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from aisle.errors import InputError
from aisle.preprocess.pack import Packed, pack

Run = Callable[[Packed], npt.NDArray[np.float32]]
# The precisions each target computes in, its default first.
PRECISIONS = {"openvino": ("bf16", "fp32"), "onnxruntime": ("fp32",)}


@dataclass(frozen=True)
class EngineSpec:
    """engine.json: what lies in a version folder of `encoder`, and how it is to be run."""

    target: str
    precision: str
    max_tokens: int
    labels: int
    checkpoint: str  # fingerprint of the checkpoint it was built from

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
        self, tokens: npt.NDArray[np.integer[Any]], lengths: npt.NDArray[np.integer[Any]]
    ) -> npt.NDArray[np.float32]:
        """Return logits [texts, labels] of texts laid end to end in `tokens`, `lengths` [texts] tokens each."""
        return self._run(pack(tokens, lengths, self.spec.max_tokens))


def check_target(target: str, precision: str) -> None:
    """Make sure that there is such an engine.

    Raises:
        InputError: naming the targets, or the target's precisions.
    """
    if target not in PRECISIONS:
        raise InputError(f"no target {target!r}; choose from {', '.join(PRECISIONS)}")
    if precision not in PRECISIONS[target]:
        raise InputError(f"{target} does not run {precision!r}; choose from {', '.join(PRECISIONS[target])}")


def load_engine(folder: Path, kind: str = "CPU", device_id: str = "0") -> Engine:
    """Load the engine of a version folder onto a device; `kind` and `device_id` are as Triton names an instance's.

    Raises:
        InputError: the folder holds no engine, or the device cannot run it.
    """
    spec = EngineSpec.load(folder)
    check_target(spec.target, spec.precision)
    load = {"openvino": _openvino, "onnxruntime": _onnxruntime}[spec.target]
    try:
        return Engine(load(folder, spec, kind, device_id), spec)
    except Exception as error:  # each runtime raises its own
        raise InputError(f"{folder}: the engine cannot be loaded: {str(error).splitlines()[0]}") from None


def _openvino(folder: Path, spec: EngineSpec, kind: str, device_id: str) -> Run:
    import openvino

    precision = {"fp32": "f32", "bf16": "bf16"}[spec.precision]
    compiled: Any = openvino.Core().compile_model(
        folder / "model.xml", "CPU", {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    )
    request = compiled.create_infer_request()

    def run(packed: Packed) -> npt.NDArray[np.float32]:
        request.infer(list(packed), share_inputs=True)
        logits: npt.NDArray[np.float32] = request.get_output_tensor(0).data.copy()
        return logits

    return run


def _onnxruntime(folder: Path, spec: EngineSpec, kind: str, device_id: str) -> Run:
    import onnxruntime

    gpu = kind.endswith("GPU")
    provider: Any = ("CUDAExecutionProvider", {"device_id": device_id}) if gpu else "CPUExecutionProvider"
    if gpu and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise RuntimeError("this onnxruntime has no CUDA; install onnxruntime-gpu")
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=[provider])

    def run(packed: Packed) -> npt.NDArray[np.float32]:
        logits: npt.NDArray[np.float32] = session.run(None, packed._asdict())[0]
        return logits

    return run
