"""Build: a checkpoint to a version of the model repository, checked against PyTorch on the way."""

from __future__ import annotations

import contextlib
import io
import shutil
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aisle.build.engine import PRECISIONS, Engine, EngineSpec, check_target, load_engine
from aisle.build.graph import PackedBert
from aisle.build.repository import new_version, versions
from aisle.console import say
from aisle.preprocess.encode import Encoder
from aisle.preprocess.pack import Packed, pack
from aisle.train.checkpoint import checkpoint_fingerprint, load_model, read_labels
from aisle.train.evaluate import logits_of

# The largest error of a logit, as a share of the largest logit: rounding, and no more than rounding.
TOLERANCE = {"fp32": 1e-4, "bf16": 0.05}


class GateError(Exception):
    """The engine does not agree with the checkpoint. Exit code 3."""


def build(checkpoint: Path, repository: Path, target: str = "openvino", precision: str | None = None) -> dict[str, Any]:
    """Compile a checkpoint into the next version of a model repository; by default in the target's fastest precision.

    A repository whose latest version was built from the same checkpoint in the same way stays as it is.

    Raises:
        InputError: the checkpoint cannot be compiled, or the repository cannot be written.
        GateError: the engine's logits differ from PyTorch's by more than rounding; nothing is written.
    """
    start = time.perf_counter()
    precision = precision or PRECISIONS.get(target, ("",))[0]
    check_target(target, precision)
    labels = read_labels(checkpoint)
    encoder = Encoder(checkpoint / "tokenizer.json")
    spec = EngineSpec(target, precision, encoder.max_tokens, len(labels), checkpoint_fingerprint(checkpoint))
    built = versions(repository)
    if built and _spec_or_none(repository / "encoder" / str(built[-1])) == spec:
        say(f"version {built[-1]} is this very engine; nothing to do")
        return _result(built[-1], spec, reused=True)

    model = load_model(checkpoint)
    with new_version(repository) as (number, folders):
        say(f"exporting {checkpoint} to ONNX")
        onnx = folders["encoder"] / "model.onnx"
        export(model, spec.max_tokens, onnx)
        if target == "openvino":
            say("compiling for OpenVINO")
            _to_openvino(onnx)
        spec.save(folders["encoder"])
        error = largest_error(model, load_engine(folders["encoder"]), encoder.vocabulary)
        if error > TOLERANCE[precision]:
            raise GateError(f"logits differ from PyTorch's by {error:.2%}, over the {TOLERANCE[precision]:.2%} allowed")
        shutil.copyfile(checkpoint / "tokenizer.json", folders["tokenizer"] / "tokenizer.json")
        shutil.copyfile(checkpoint / "labels.json", folders["labeler"] / "labels.json")
    return {
        **_result(number, spec, reused=False),
        "largest_logit_error": error,
        "bytes": sum(path.stat().st_size for path in (repository / "encoder" / str(number)).iterdir()),
        "seconds": round(time.perf_counter() - start, 1),
    }


def export(model: Any, max_tokens: int, path: Path) -> None:
    """Write the graph over packed rows as ONNX, its rows, width and texts left dynamic."""
    example = pack(np.arange(5 + 3 + max_tokens) % model.config.vocab_size, np.array([5, 3, max_tokens]), max_tokens)
    rows, width, texts = (torch.export.Dim(name, min=1, max=2**16) for name in ("rows", "width", "texts"))
    per_token = {0: rows, 1: width}
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            PackedBert(model).eval(),
            tuple(map(torch.from_numpy, example)),
            path,
            dynamo=True,
            input_names=list(Packed._fields),
            output_names=["logits"],
            dynamic_shapes=(per_token, per_token, per_token, {0: texts}),
            external_data=False,
        )


def largest_error(model: Any, engine: Engine, vocabulary: int) -> float:
    """Return max |Δlogit| / max |logit| between the padded PyTorch model and the engine, on random tokens."""
    rng = np.random.default_rng(0)
    lengths = np.concatenate([[1, 2, engine.spec.max_tokens], rng.integers(1, engine.spec.max_tokens + 1, 29)])
    tokens = rng.integers(0, vocabulary, lengths.sum())
    texts = [text.tolist() for text in np.split(tokens, np.cumsum(lengths)[:-1])]
    expected = logits_of(model, texts, "checking against PyTorch")
    return float(np.abs(engine(tokens, lengths) - expected).max() / np.abs(expected).max())


def _to_openvino(onnx: Path) -> None:
    """Replace the ONNX file by OpenVINO's own form of it, weights in full precision."""
    import openvino

    graph = openvino.Core().read_model(onnx)
    openvino.save_model(graph, onnx.with_suffix(".xml"), compress_to_fp16=False)
    del graph  # it maps the file
    onnx.unlink()


def _spec_or_none(folder: Path) -> EngineSpec | None:
    try:
        return EngineSpec.load(folder)
    except ValueError:
        return None


def _result(version: int, spec: EngineSpec, reused: bool) -> dict[str, Any]:
    return {
        "version": version,
        "target": spec.target,
        "precision": spec.precision,
        "checkpoint": spec.checkpoint,
        "reused": reused,
    }
