"""The GPU for target `cuda`: whether PyTorch can use it, and which precisions it supports."""

from __future__ import annotations

import os

import torch

from aisle.build.cuda_runtime import ON_CPU, gpu_name
from aisle.errors import InputError

# Compute capabilities: FlashAttention needs Ampere, fp8 matrix products need Ada or Hopper.
MIN_CAPABILITY = (8, 0)
MIN_CAPABILITY_FP8 = (8, 9)


def find_device(device_id: int = 0) -> torch.device:
    """Return the GPU.

    Raises:
        InputError: no GPU can be used.
    """
    problem = gpu_problem(device_id)
    if not problem:
        return torch.device("cuda", device_id)
    if os.environ.get(ON_CPU):
        return torch.device("cpu")
    raise InputError(problem)


def gpu_problem(device_id: int = 0) -> str:
    """Return why no GPU can be used and how to fix it, or "" if one can be used."""
    if torch.version.cuda is None:
        return "target cuda needs an NVIDIA GPU and a PyTorch built for CUDA; this PyTorch is built for CPUs"
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except Exception as error:  # its type differs between PyTorch releases
        reason = str(error).splitlines()[0]
        if "driver" in reason and "too old" in reason:
            return f"the NVIDIA driver is too old for CUDA {torch.version.cuda}: update it, or install an older PyTorch"
        return f"target cuda needs an NVIDIA GPU and its driver; {reason}"
    count = torch.cuda.device_count()
    if device_id >= count:
        return f"there is no GPU {device_id}; this machine has {count}"
    if torch.cuda.get_device_capability(device_id) < MIN_CAPABILITY:
        name = gpu_name(device_id) or "an older GPU"
        return f"target cuda needs compute capability {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]} or later; this is {name}"
    return ""


def check_precision(precision: str, device: torch.device) -> None:
    """Make sure that the GPU supports a precision.

    Raises:
        InputError: it does not.
    """
    if precision == "fp8" and torch.cuda.get_device_capability(device) < MIN_CAPABILITY_FP8:
        name = gpu_name(device.index or 0) or "this GPU"
        raise InputError(
            f"{name} has no fp8 matrix products; build it again with: aisle build CHECKPOINT --precision fp16"
        )
    if precision == "fp32":
        raise InputError("FlashAttention has no fp32; build it again with: aisle build CHECKPOINT --precision fp16")


def too_little_memory(device: torch.device) -> str:
    """Return the message for a GPU without enough free memory."""
    free, total = torch.cuda.mem_get_info(device)
    return (
        f"the GPU has too little memory: {free >> 20} of {total >> 20} MiB are free; free some, or use a smaller model"
    )
