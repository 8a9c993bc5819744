"""The recipe of an engine: everything that determines the result. The same recipe is not built twice."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from aisle.build.compile_tensorrt import CompilerOptions
from aisle.build.cuda_runtime import gpu_name
from aisle.build.engine import EngineSpec
from aisle.build.gate import Gate
from aisle.preprocess.tables.table import fingerprint

# Packages that export, calibrate, quantize and compile: their versions determine the engine.
PACKAGES = ("onnx", "onnxruntime", "onnxscript", "openvino", "tensorrt", "tensorrt-rtx-cu13", "tokenizers", "torch")


def recipe(
    spec: EngineSpec, gate: Gate, texts: list[Path], columns: list[str], options: CompilerOptions
) -> dict[str, Any]:
    """Return everything that determines the engine and whether it passes its gate, as plain JSON.

    Args:
        spec: the requested engine, without the fields that the build fills in.
        texts: the files to calibrate and check with, and the decisions.
    """
    # A timing cache changes only the duration of the build.
    compiler = {key: value for key, value in asdict(options).items() if key != "timing_cache"}
    content: dict[str, Any] = {
        "spec": asdict(spec),
        "gate": asdict(gate),
        "texts": [fingerprint(path) if path.is_file() else None for path in texts],
        "columns": columns,
        "options": compiler,
        "code": _code(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "gpu": gpu_name(),
    }
    plain: dict[str, Any] = json.loads(json.dumps(content))
    return plain


def _code() -> str:
    """Return a SHA-256 over the source that makes an engine and its tokens."""
    root = Path(__file__).parent.parent
    sources = sorted(path for part in ("preprocess", "build") for path in (root / part).rglob("*.py"))
    return hashlib.sha256("".join(fingerprint(path) for path in sources).encode()).hexdigest()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
