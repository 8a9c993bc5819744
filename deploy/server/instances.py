"""Choose how many processes tokenize and, on a GPU, how many run the engine."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

from aisle.build.cuda_runtime import ON_CPU
from aisle.errors import InputError

CPU_MAX = Path("/sys/fs/cgroup/cpu.max")  # a container's CPU limit: "QUOTA PERIOD" in microseconds, or "max PERIOD"
# An engine on the CPU needs the cores itself, and one process tokenizes several times faster than it computes.
CORES_PER_PROCESS_CPU = 8
# With a GPU the cores are free. Four processes, which use 1.7 cores together, keep up with an H200 on short texts.
MIN_PROCESSES_GPU = 4
CORES_PER_PROCESS_GPU = 4
# One Python process cannot feed a fast GPU: beside 16 cores, 1, 2 and 3 answered 2,000, 4,000 and 5,400 calls a second.
CORES_PER_ENCODER = 5
MAX_ENCODERS = 3
DEVICES = Path("/dev")
GPU_DEVICES = ("nvidiactl", "dxg", "nvhost-*", "nvmap")  # of NVIDIA's driver on Linux, in WSL and on Jetson
_COUNT = re.compile(r"(instance_group \[ \{ count: )\d+")


def cores() -> int:
    """Return how many cores this process may use, by its affinity and its container's limit; at least 1."""
    found = len(os.sched_getaffinity(0))
    try:
        quota, period = CPU_MAX.read_text().split()
        return found if quota == "max" else max(1, min(found, math.floor(int(quota) / int(period))))
    except (OSError, ValueError):
        return found


def gpus() -> int:
    """Return how many GPUs this machine or container has; at least 1."""
    return max(1, len(list(DEVICES.glob("nvidia[0-9]*"))))


def has_gpu() -> bool:
    """Return whether this machine has the driver of an NVIDIA GPU."""
    return any(True for name in GPU_DEVICES for _ in DEVICES.glob(name))


def check_gpu(version: int, target: str) -> None:
    """Check before Triton starts that a version's engine can run here.

    Raises:
        InputError: it needs a GPU, and there is none.
    """
    if target == "openvino" or has_gpu() or os.environ.get(ON_CPU):
        return
    raise InputError(
        f"version {version} is built for target {target}, which needs an NVIDIA GPU, and this machine has none; serve "
        "it on one, or build for CPUs: aisle build CHECKPOINT --target openvino"
    )


def encoders(cores: int, gpus: int) -> int:
    """Return how many processes run the engine on each GPU. Each has its own copy of the weights."""
    return max(1, min(MAX_ENCODERS, cores // (CORES_PER_ENCODER * gpus)))


def with_instances(config: str, count: int) -> str:
    """Return a model's configuration with this number of instances."""
    return _COUNT.sub(rf"\g<1>{count}", config)


@dataclass(frozen=True)
class Tokenizers:
    """The processes of the tokenizer, and the threads of each."""

    processes: int
    threads: int

    @staticmethod
    def choose(config_name: str, cores: int) -> Tokenizers:
        """Choose for a number of cores: with configuration `gpu` beside a GPU, else beside an engine on the CPU."""
        if config_name == "gpu":
            processes = max(MIN_PROCESSES_GPU, cores // CORES_PER_PROCESS_GPU)
        else:
            processes = max(1, cores // CORES_PER_PROCESS_CPU)
        return Tokenizers(processes, max(1, cores // processes))

    def describe(self) -> str:
        processes = f"{self.processes} tokenizer process{'es' if self.processes > 1 else ''}"
        return f"{processes} with {self.threads} thread{'s' if self.threads > 1 else ''} each"
