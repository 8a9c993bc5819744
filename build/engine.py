"""The engine: token ids of many texts in, logits out. The build measures the same code that Triton serves."""

from __future__ import annotations

import importlib.util
import json
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from aisle.build import compile_tensorrt
from aisle.build.cuda_runtime import driver_problem, gpu_name
from aisle.build.plan_runner import PlanRunner
from aisle.build.repository import max_batch_size
from aisle.console import say
from aisle.errors import InputError
from aisle.preprocess.pack import Packed, pack
from aisle.preprocess.windows import averaged, counts_of

Ints = npt.NDArray[np.integer[Any]]
Logits = npt.NDArray[np.float32]
Outputs = npt.NDArray[np.float32]  # [texts, labels + embedding]: the logits and, after them, the embedding of each text
Run = Callable[[Packed], Outputs]
# The precisions of each target, the default first.
PRECISIONS = {
    "openvino": ("int8", "bf16", "fp32"),
    "cuda": ("fp16", "bf16", "fp8"),
    "tensorrt": ("fp16", "int8", "bf16", "fp32"),
    "tensorrt-rtx": ("fp16", "int8", "bf16", "fp32"),
}


@dataclass(frozen=True)
class EngineSpec:
    """engine.json: which engine a version folder of `encoder` holds, and how to run it."""

    target: str
    precision: str
    max_tokens: int
    labels: int  # logits: categories and, after them, the values of further heads
    checkpoint: str  # fingerprint of the checkpoint it was built from
    graph: str = ""  # SHA-256 of the ONNX graph
    vocabulary: int = 0  # number of token ids with an embedding
    embedding: int = 0  # size of the texts' embeddings; 0 in versions that have none
    windows: int = 1  # the most windows of a text, each of at most `max_tokens` tokens
    runtime: str = ""  # the only runtime that can run it, such as "TensorRT 11.0.0"; "": any version
    device: str = ""  # the only GPU model that can run it, such as "NVIDIA H100 (9.0)"; "": any

    def save(self, folder: Path) -> None:
        (folder / "engine.json").write_text(json.dumps(asdict(self), indent=2) + "\n")

    @staticmethod
    def load(folder: Path) -> EngineSpec:
        """Read engine.json.

        Raises:
            InputError: the file is missing or damaged.
        """
        try:
            return EngineSpec(**json.loads((folder / "engine.json").read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"{folder} holds no engine: {error}") from None


class Runner(Protocol):
    """Computes a batch. The batch limits depend on the target."""

    @property
    def max_texts(self) -> int:
        """The largest number of texts in a batch."""

    @property
    def max_batch_tokens(self) -> int:
        """The number of tokens from which a larger batch is no faster."""

    @property
    def concurrency(self) -> int:
        """How many threads may call at once: while one batch is computed, the host lays out the next."""

    def __call__(self, tokens: Ints, lengths: Ints) -> tuple[Outputs, int]:
        """Return the outputs, and the number of tokens computed, padding included."""


class PackedRunner:
    """Runs a graph over packed rows: packs the texts of a batch into rows."""

    concurrency = 1

    def __init__(self, run: Run, spec: EngineSpec) -> None:
        self._run, self._max_tokens = run, spec.max_tokens
        # A TensorRT plan has CUDA graphs only for full-width rows; OpenVINO runs any width equally well.
        self._narrow = spec.target == "openvino"
        self.max_texts = max_batch_size()
        # Larger batches are hardly faster on a CPU and make the next request wait longer.
        self.max_batch_tokens = 2048 if self._narrow else self.max_texts * spec.max_tokens

    def __call__(self, tokens: Ints, lengths: Ints) -> tuple[Outputs, int]:
        packed = pack(tokens, lengths, self._max_tokens, narrow=self._narrow)
        return self._run(packed), packed.input_ids.size


class Engine:
    """Computes the logits and the embeddings of texts given as token ids."""

    def __init__(self, runner: Runner, spec: EngineSpec) -> None:
        self._runner = runner
        self.spec = spec
        self.max_texts, self.max_batch_tokens = runner.max_texts, runner.max_batch_tokens
        self.concurrency = runner.concurrency

    def __call__(self, tokens: Ints, lengths: Ints) -> Logits:
        """Return logits [texts, labels] of texts laid end to end in `tokens`, `lengths` [texts] tokens each."""
        return self.outputs(tokens, lengths)[:, : self.spec.labels]

    def outputs(self, tokens: Ints, lengths: Ints, work: defaultdict[str, float] | None = None) -> Outputs:
        """Return the logits and embeddings of texts laid end to end; of a text with several windows, their mean.

        Args:
            work: counters to add to: `tokens_useful`, `tokens_computed`, `engine_seconds` and `engine_batches`.
        """
        start = time.perf_counter()
        if self.spec.windows > 1 and lengths.max() > self.spec.max_tokens:
            outputs, computed = self._run_windows(tokens, lengths)
        else:
            outputs, computed = self._run(tokens, lengths)
        if work is not None:
            work["tokens_useful"] += len(tokens)
            work["tokens_computed"] += computed
            work["engine_seconds"] += time.perf_counter() - start
            work["engine_batches"] += 1
        return outputs

    def _run_windows(self, tokens: Ints, lengths: Ints) -> tuple[Outputs, int]:
        """Run the windows of texts, in as many batches as they need, and average their outputs."""
        most = self.spec.max_tokens
        counts = counts_of(lengths, most)
        own = np.minimum(np.repeat(lengths, counts), most)
        ends = np.concatenate(([0], np.cumsum(own)))
        at_once = max(1, min(self.max_texts, self.max_batch_tokens // most))
        ran = [
            self._run(tokens[ends[start] : ends[min(start + at_once, len(own))]], own[start : start + at_once])
            for start in range(0, len(own), at_once)
        ]
        return averaged(np.concatenate([outputs for outputs, _ in ran]), counts), sum(computed for _, computed in ran)

    def _run(self, tokens: Ints, lengths: Ints) -> tuple[Outputs, int]:
        """Return the outputs of texts without windows, and the number of tokens computed."""
        outputs, computed = self._runner(tokens, lengths)
        if len(lengths) > 1 and not np.isfinite(outputs).all():
            outputs = self._rerun_singly(tokens, lengths, outputs)
        return outputs, computed

    def _rerun_singly(self, tokens: Ints, lengths: Ints, outputs: Outputs) -> Outputs:
        """Run texts whose outputs are not finite again, one by one: one NaN spoils all texts of its row."""
        outputs, ends = outputs.copy(), np.cumsum(lengths)
        for text in np.flatnonzero(~np.isfinite(outputs).all(axis=1)):
            own = tokens[ends[text] - lengths[text] : ends[text]]
            outputs[text] = self._runner(own, lengths[text : text + 1])[0][0]
        return outputs


def check_target(target: str, precision: str) -> None:
    """Make sure that the target and its precision exist.

    Raises:
        InputError: they do not; the message lists the choices.
    """
    if target not in PRECISIONS:
        raise InputError(f"no target {target!r}; choose from {', '.join(PRECISIONS)}")
    if precision not in PRECISIONS[target]:
        raise InputError(f"{target} does not run {precision!r}; choose from {', '.join(PRECISIONS[target])}")


def best_target() -> str:
    """Return the fastest target of this machine: on a GPU TensorRT, or `cuda` without it; on a CPU OpenVINO."""
    if problem := driver_problem():
        say(f"the GPU is not used: {problem}")
    if gpu_name():
        try:
            compile_tensorrt.load_module("tensorrt")
            return "tensorrt"
        except InputError:
            pass
    if importlib.util.find_spec("torch"):
        from aisle.build.cuda_device import gpu_problem

        if not gpu_problem():
            return "cuda"
    return "openvino"


def load_engine(folder: Path, device_id: str = "0") -> Engine:
    """Load the engine of a version folder. `device_id` is Triton's number of the GPU; targets for CPUs ignore it.

    Raises:
        InputError: the folder holds no engine, or this machine cannot run it.
    """
    spec = EngineSpec.load(folder)
    check_target(spec.target, spec.precision)
    try:
        return Engine(_runner(folder, spec, int(device_id)), spec)
    except InputError:
        raise
    except Exception as error:  # each runtime raises its own exceptions
        raise InputError(f"{folder}: the engine cannot be loaded: {str(error).splitlines()[0]}") from None


def _runner(folder: Path, spec: EngineSpec, device_id: int) -> Runner:
    if spec.target == "openvino":
        return PackedRunner(openvino_runner(folder / "model.xml", spec), spec)
    if spec.target == "cuda":
        from aisle.build.cuda_version import load_runner

        return load_runner(folder, spec.precision, spec.max_tokens, device_id)
    return PackedRunner(_plan_runner(folder, spec, device_id), spec)


def openvino_runner(model: Path, spec: EngineSpec) -> Run:
    """Compile a graph in OpenVINO's format or in ONNX for this CPU."""
    import openvino

    # int8: the type of the operations around the int8 products. fp16: such a graph is only checked here, in fp32.
    precision = {"fp32": "f32", "fp16": "f32", "bf16": "bf16", "int8": "bf16"}[spec.precision]
    compiled: Any = openvino.Core().compile_model(
        model, "CPU", {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    )
    request = compiled.create_infer_request()

    def run(packed: Packed) -> npt.NDArray[np.float32]:
        request.infer(list(packed), share_inputs=True)
        outputs: Outputs = request.get_output_tensor(0).data.copy()
        return outputs

    return run


def _plan_runner(folder: Path, spec: EngineSpec, device_id: int) -> Run:
    """Return a runner for the plan. It checks the versions first, as TensorRT's own error does not say the fix."""
    here = compile_tensorrt.version_of(spec.target)
    if spec.runtime and spec.runtime != here:
        raise InputError(
            f"{folder}: the plan was built with {spec.runtime}, but this machine has {here}; build it here"
        )
    gpu = gpu_name(device_id)
    if gpu and spec.device and spec.device != gpu:
        raise InputError(f"{folder}: the plan was built for {spec.device}, but this machine has {gpu}; build it here")
    return PlanRunner(
        folder / "model.plan",
        spec.target,
        spec.max_tokens,
        spec.labels + spec.embedding,
        device_id,
        version_compatible=not spec.runtime,
    )
