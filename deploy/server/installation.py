"""Find Triton on this machine: the server in NVIDIA's container, or the one in the nvidia-pytriton wheel."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from aisle.deploy.server.environment import PYTHONS, libpython_folder
from aisle.errors import InputError
from aisle.extras import install

CONTAINER = Path("/opt/tritonserver")
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
FEW_CORES = 4  # up to this number, Triton's default of two gRPC threads is enough


def triton_command(home: Path) -> tuple[list[str], dict[str, str]]:
    """Return the command that starts Triton, without settings, and its environment variables.

    Args:
        home: a temporary folder of this server, where the wheel's backend is assembled.

    Raises:
        InputError: Triton is not installed, or does not support this Python.
    """
    # The Python backend embeds the first `python3` on the PATH: this one, with Aisle and its dependencies.
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"}
    if shutil.which("bash", path=environment["PATH"]) is None:
        environment["PATH"] = f"{_minimal_bash(home / 'bin')}:{environment['PATH']}"
    if CONTAINER.is_dir():
        return [str(CONTAINER / "bin" / "tritonserver")], environment
    site = site_of_wheel()
    wheel = site / "pytriton" / "tritonserver"
    stub = wheel / "python_backend_stubs" / PYTHON / "triton_python_backend_stub"
    # The wheel has one stub for each Python version; Triton looks for it beside the backend's library.
    backend = home / "backends" / "python"
    shutil.copytree(wheel / "backends" / "python", backend)
    shutil.copy2(stub, backend)
    libraries = [str(site / "nvidia_pytriton.libs"), _python_library()]
    if inherited := os.environ.get("LD_LIBRARY_PATH"):
        libraries.append(inherited)
    environment["LD_LIBRARY_PATH"] = ":".join(libraries)
    return [
        str(wheel / "bin" / "tritonserver"),
        f"--backend-directory={backend.parent}",
        f"--cache-directory={wheel / 'caches'}",
    ], environment


def infer_threads(server: str, environment: dict[str, str], cores: int) -> list[str]:
    """Return the argument for more than two gRPC threads, if there are enough cores and Triton has the option."""
    if cores <= FEW_CORES:
        return []
    usage = subprocess.run([server, "--help"], env=environment, capture_output=True, text=True, check=False)
    if "--grpc-infer-thread-count" not in usage.stdout + usage.stderr:
        return []
    return [f"--grpc-infer-thread-count={min(128, cores // 2)}"]


def site_of_wheel() -> Path:
    """Return the site-packages folder that holds nvidia-pytriton.

    Raises:
        InputError: it is not installed, or does not support this Python or this numpy.
    """
    if PYTHON not in PYTHONS:
        raise InputError(f"Triton's wheel needs Python {' or '.join(PYTHONS)}; use one, or NVIDIA's Triton container")
    spec = importlib.util.find_spec("pytriton")
    if spec is None or spec.origin is None:
        raise InputError(f"Triton is not installed: {install('serve')}, or use NVIDIA's Triton container")
    if int(version("numpy").partition(".")[0]) >= 2:  # the stub would corrupt strings
        raise InputError("Triton's Python backend is built for numpy 1: pip install 'numpy<2'")
    return Path(spec.origin).parent.parent


def _minimal_bash(folder: Path) -> Path:
    """Write a `bash` that can do the only thing that the Python backend needs: -c "exec STUB ARGUMENTS"."""
    folder.mkdir()
    script = folder / "bash"
    script.write_text(
        f"#!{sys.executable} -IS\nimport os, shlex, sys\n"
        "_, *command = shlex.split(sys.argv[2])\nos.execv(command[0], command)\n"
    )
    script.chmod(0o755)
    return folder


def _python_library() -> str:
    """Return the folder of libpython, which the Python backend is linked with.

    Raises:
        InputError: libpython is not installed.
    """
    folder = libpython_folder(PYTHON, sys.base_prefix)
    if folder is None:
        raise InputError(f"Triton's Python backend needs libpython{PYTHON}.so.1.0: apt-get install libpython{PYTHON}")
    return folder
