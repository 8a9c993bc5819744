"""A local Triton: the container's own server, or the one that the nvidia-pytriton wheel carries."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tritonclient.grpc import InferenceServerClient, InferenceServerException

from aisle.build.repository import latest_version
from aisle.console import say
from aisle.errors import InputError, ServerError

CONTAINER = Path("/opt/tritonserver")
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
START_SECONDS = 120.0
STOP_SECONDS = 30.0


@dataclass(frozen=True)
class Options:
    """How `serve` runs the server."""

    repository: Path
    host: str = "127.0.0.1"
    grpc_port: int = 8001
    http_port: int = 8000
    metrics_port: int = 8002
    model_config_name: str = ""  # picks MODEL/configs/NAME.pbtxt where there is one, as `gpu`
    cache_mb: int = 256  # of answers; 0 turns the response cache off


def free_ports(count: int) -> list[int]:
    """Return ports of the loopback address that nothing listens on now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@contextmanager
def running(options: Options, log: IO[bytes] | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """Start Triton, wait until it is ready, stop it on leaving.

    Args:
        log: where its log goes; stderr by default.

    Raises:
        InputError: the repository holds no built version, a port is taken, or there is no Triton here.
        ServerError: the server ended before it was ready, or took too long.
    """
    repository = options.repository.resolve()
    latest_version(repository)
    _check_ports(options)
    with tempfile.TemporaryDirectory(prefix="aisle-triton-") as home:
        shared_memory = f"aisle_{Path(home).name}_"
        command, environment = _installation(Path(home))
        command += [
            f"--model-repository={repository}",
            f"--backend-config=python,shm-region-prefix-name={shared_memory}",
            f"--grpc-address={options.host}",
            f"--grpc-port={options.grpc_port}",
            f"--http-address={options.host}",
            f"--http-port={options.http_port}",
            f"--metrics-address={options.host}",
            f"--metrics-port={options.metrics_port}",
            "--disable-auto-complete-config",
            "--exit-timeout-secs=10",
        ]
        if options.model_config_name:
            command += [f"--model-config-name={options.model_config_name}"]
        if options.cache_mb:
            command += [f"--cache-config=local,size={options.cache_mb << 20}"]
        process = subprocess.Popen(
            command, env=environment, stdout=log or sys.stderr, stderr=log, preexec_fn=_end_with_parent
        )
        try:
            _wait_until_ready(process, f"{options.host}:{options.grpc_port}")
            yield process
        finally:
            stop(process)
            for leftover in Path("/dev/shm").glob(f"{shared_memory}*"):
                leftover.unlink(missing_ok=True)


def _check_ports(options: Options) -> None:
    """Make sure that nobody else listens: the readiness of another server would be taken for this one's."""
    for name in ("grpc_port", "http_port", "metrics_port"):
        port = getattr(options, name)
        try:
            socket.create_server((options.host, port)).close()
        except OSError as error:
            option = "--" + name.replace("_", "-")
            raise InputError(f"cannot listen on {options.host}:{port} ({error.strerror}); see {option}") from None


def serve_forever(options: Options) -> int:
    """Run the server until it ends or this process is told to stop; return the exit code.

    Raises:
        InputError, ServerError: as `running`.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop_serving)
    try:
        with running(options) as process:
            say(f"ready: gRPC on {options.host}:{options.grpc_port}, metrics on port {options.metrics_port}")
            return process.wait()
    except KeyboardInterrupt:
        return 0


def _stop_serving(*_: object) -> None:
    raise KeyboardInterrupt


def stop(process: subprocess.Popen[bytes]) -> None:
    """Let requests under way finish, then end the server."""
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _installation(home: Path) -> tuple[list[str], dict[str, str]]:
    """Return the command that starts Triton and its environment."""
    # The Python backend embeds the `python3` it finds first: this one, with Aisle and its dependencies.
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"}
    if CONTAINER.is_dir():
        return [str(CONTAINER / "bin" / "tritonserver")], environment
    spec = importlib.util.find_spec("pytriton")
    if spec is None or spec.origin is None:
        raise InputError("there is no Triton here: pip install 'aisle[serve]', or use NVIDIA's Triton container")
    site = Path(spec.origin).parent.parent
    wheel = site / "pytriton" / "tritonserver"
    stub = wheel / "python_backend_stubs" / PYTHON / "triton_python_backend_stub"
    if not stub.is_file():
        raise InputError(f"nvidia-pytriton has no backend for Python {PYTHON}; use Python 3.11")
    # The wheel keeps one stub a Python version; Triton looks for it beside the backend's library.
    backend = home / "backends" / "python"
    shutil.copytree(wheel / "backends" / "python", backend)
    shutil.copy2(stub, backend)
    libraries = [str(site / "nvidia_pytriton.libs"), python_library()]
    if inherited := os.environ.get("LD_LIBRARY_PATH"):
        libraries.append(inherited)
    environment["LD_LIBRARY_PATH"] = ":".join(libraries)
    return [
        str(wheel / "bin" / "tritonserver"),
        f"--backend-directory={backend.parent}",
        f"--cache-directory={wheel / 'caches'}",
    ], environment


def python_library() -> str:
    """Return the folder of libpython, which the Python backend links.

    Raises:
        InputError: it is not installed.
    """
    name = f"libpython{PYTHON}.so.1.0"
    folders = [
        Path(sys.base_prefix) / "lib",
        *map(Path, ("/usr/lib/x86_64-linux-gnu", "/usr/local/lib", "/usr/lib64")),
    ]
    for folder in folders:
        if (folder / name).exists():
            return str(folder)
    raise InputError(f"Triton's Python backend needs {name}: apt-get install libpython{PYTHON}")


def _end_with_parent() -> None:
    """Have the kernel end the server should this process be killed (Linux prctl, PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _wait_until_ready(process: subprocess.Popen[bytes], url: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    with InferenceServerClient(url) as client:
        while process.poll() is None:
            try:
                if client.is_server_ready():
                    return
            except InferenceServerException:
                pass
            if time.monotonic() > deadline:
                raise ServerError(f"Triton was not ready within {START_SECONDS:.0f} s; its log says why")
            time.sleep(0.1)
    raise ServerError(f"Triton ended with exit code {process.returncode} before it was ready; its log says why")
