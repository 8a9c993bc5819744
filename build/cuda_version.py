"""The files of a `cuda` engine in a version folder: weights, module.json and compiled kernels."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from aisle.build.cuda_device import check_precision, find_device, too_little_memory
from aisle.build.cuda_runner import CudaRunner
from aisle.build.encoder import Shape
from aisle.build.varlen import Fp8Linear, VarlenEncoder
from aisle.errors import InputError

WEIGHTS, MODULE, CACHE = "model.safetensors", "module.json", "compiled.bin"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.float16}


def save(module: VarlenEncoder, folder: Path) -> None:
    """Write the weights and the shape. They run on any supported GPU."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
    save_file(state, folder / WEIGHTS)
    fp8 = sorted(name for name, each in module.named_modules() if isinstance(each, Fp8Linear))
    (folder / MODULE).write_text(json.dumps({"shape": asdict(module.shape), "fp8_layers": fp8}, indent=2) + "\n")


def load(folder: Path, precision: str, max_tokens: int) -> VarlenEncoder:
    """Read what `save` wrote.

    Raises:
        InputError: a file is missing or damaged.
    """
    try:
        described = json.loads((folder / MODULE).read_text())
        dtype = DTYPES[precision]
        with torch.device("meta"):
            module = VarlenEncoder(Shape(**described["shape"]), max_tokens, dtype)
            for name in described["fp8_layers"]:
                linear: Any = module.get_submodule(name)
                module.set_submodule(name, Fp8Linear(linear.in_features, linear.out_features, dtype))
        module.load_state_dict(load_file(folder / WEIGHTS), strict=True, assign=True)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{folder} holds no engine: {str(error).splitlines()[0]}") from None
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    return module.eval()


def load_runner(folder: Path, precision: str, max_tokens: int, device_id: int = 0) -> CudaRunner:
    """Load an engine onto a GPU, with the kernels compiled at build time if they fit this GPU.

    Raises:
        InputError: there is no suitable GPU, the driver is too old, or the GPU has too little memory.
    """
    device = find_device(device_id)
    if device.type == "cuda":
        check_precision(precision, device)
        needed = 2 * (folder / WEIGHTS).stat().st_size
        free, _ = torch.cuda.mem_get_info(device)
        if free < needed:
            raise InputError(too_little_memory(device))
        restore_cache(folder / CACHE)
    return CudaRunner(load(folder, precision, max_tokens), max_tokens, device)


def save_cache(path: Path) -> None:
    """Save the kernels that torch.compile made in this process, so that loading the version needs no compilation."""
    artifacts = torch.compiler.save_cache_artifacts()
    if artifacts is not None:
        path.write_bytes(artifacts[0])


def restore_cache(path: Path) -> None:
    """Load the kernels that `save_cache` saved. Those of another GPU or PyTorch do not match and are compiled again."""
    if path.exists():
        torch.compiler.load_cache_artifacts(path.read_bytes())
