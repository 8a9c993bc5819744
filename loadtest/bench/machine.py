"""Describe the machine on which a measurement was taken."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

# The instruction sets that engines use.
EXTENSIONS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
PACKAGES = ("openvino", "torch", "transformers", "tritonclient", "nvidia-pytriton")


def machine() -> dict[str, Any]:
    """Return this machine's processor, extensions, cores, memory and load, and the versions of the packages."""
    info = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in info)}
    return {
        "processor": fields.get("model name", platform.processor()),
        "cores": len(os.sched_getaffinity(0)),
        "extensions": [flag for flag in EXTENSIONS if flag in fields.get("flags", "").split()],
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_before": os.getloadavg()[0],  # about 0 on an idle machine
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
    }


def describe(found: dict[str, Any]) -> str:
    return (
        f"{found['processor']}, {found['cores']} cores ({', '.join(found['extensions'])}), {found['memory_gib']} GiB; "
        f"load before: {found['load_before']:.1f}; {found['system']}, Python {found['python']}, "
        + ", ".join(f"{name} {number}" for name, number in found["packages"].items())
    )
