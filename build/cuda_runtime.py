"""The CUDA runtime through its Python bindings: which GPU this machine has, and errors that name the failed call."""

from __future__ import annotations

from typing import Any

ON_CPU = "AISLE_CUDA_ON_CPU"  # environment variable for tests: target `cuda` runs on the CPU if there is no GPU
TOO_OLD = 35  # cudaErrorInsufficientDriver
# After one of these errors every later CUDA call of the process fails too; only a new process gets a working context.
# They are documented at cudaError_t in the CUDA runtime reference.
FATAL = frozenset({214, 219, 220, 226, 700, 702, 708, 709, 710, 714, 715, 716, 717, 718, 719})


class CudaError(RuntimeError):
    """A call of the CUDA runtime failed; `code` is its cudaError_t."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(f"CUDA: {message} ({code})")
        self.code = code


def is_fatal(error: BaseException) -> bool:
    """Return whether an error leaves this process without a working GPU. PyTorch's own errors have a code as well."""
    code = getattr(error, "code", getattr(error, "error_code", None))
    return isinstance(code, int) and code in FATAL


def load_bindings() -> Any:
    """Return the bindings of the CUDA runtime, or None if they are not installed."""
    try:
        from cuda.bindings import runtime
    except ImportError:
        return None
    return runtime


def check(runtime: Any, result: tuple[Any, ...]) -> Any:
    """Return the value of a runtime call's result (error, value).

    Raises:
        CudaError: the call failed.
    """
    error, *values = result
    if int(error):
        raise CudaError(int(error), runtime.cudaGetErrorString(error)[1].decode())
    return values[0] if values else None


def gpu_name(device_id: int = 0) -> str:
    """Return a GPU's name and compute capability, such as "NVIDIA H100 80GB HBM3 (9.0)", or "" without a GPU."""
    properties = _properties(device_id)
    return f"{properties.name.decode()} ({properties.major}.{properties.minor})" if properties else ""


def compute_capability(device_id: int = 0) -> tuple[int, int] | None:
    """Return a GPU's compute capability as (major, minor), or None without a GPU."""
    properties = _properties(device_id)
    return (properties.major, properties.minor) if properties else None


def driver_problem() -> str:
    """Return what is wrong with the NVIDIA driver and how to fix it, or "".

    Bindings newer than the driver report no GPU, as on a machine without one. This tells the two cases apart.
    """
    runtime = load_bindings()
    if runtime is None:
        return ""
    error, version = runtime.cudaDriverGetVersion()
    if int(error) or not version:  # 0: no driver at all
        return ""
    error, _ = runtime.cudaGetDeviceCount()
    if int(error) != TOO_OLD:
        return ""
    driver, needed = _dotted(version), _dotted(runtime.cudaRuntimeGetVersion()[1])
    return (
        f"the NVIDIA driver supports CUDA {driver} and cuda-bindings needs {needed}; "
        f"update the driver, or: pip install 'cuda-bindings<{int(driver.split('.')[0]) + 1}'"
    )


def _properties(device_id: int) -> Any:
    runtime = load_bindings()
    if runtime is None:
        return None
    error, properties = runtime.cudaGetDeviceProperties(device_id)
    return None if int(error) else properties


def _dotted(version: int) -> str:
    """Return 13000 as "13.0"."""
    return f"{version // 1000}.{version % 1000 // 10}"
