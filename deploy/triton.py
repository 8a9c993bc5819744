"""A local Triton: the container's own server, or the one that the nvidia-pytriton wheel carries."""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from aisle.deploy.access import HEADER, ServerTLS, closed
from aisle.deploy.admin import Admin
from aisle.deploy.release import Release
from aisle.deploy.view import ENSEMBLE, View
from aisle.errors import InputError, ServerError

CONTAINER = Path("/opt/tritonserver")
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
START_SECONDS = 120.0
STOP_SECONDS = 30.0
DRAIN_SECONDS = 15.0


@dataclass(frozen=True)
class Options:
    """How `serve` runs the server."""

    repository: Path
    host: str = "127.0.0.1"
    grpc_port: int = 8001
    http_port: int | None = None  # HTTP is off unless asked for: it has neither TLS nor closed protocols
    metrics_host: str = "127.0.0.1"
    metrics_port: int = 8002
    tls: ServerTLS | None = None
    model_config_name: str = ""  # picks MODEL/configs/NAME.pbtxt where there is one, as `gpu`
    cache_mb: int = 256  # of answers; 0 turns the response cache off
    trace_url: str = ""  # where OpenTelemetry's spans go (OTLP over HTTP), as http://collector:4318/v1/traces
    trace_one_in: int = 1000  # of the requests that bring no trace context; all that bring one are traced

    def describe(self) -> str:
        encryption = f", {'mutual ' if self.tls.client_authority else ''}TLS" if self.tls else ""
        return f"gRPC on {self.host}:{self.grpc_port}{encryption}, metrics on port {self.metrics_port}"


def free_ports(count: int) -> list[int]:
    """Return ports of the loopback address that nothing listens on now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@dataclass(frozen=True)
class Triton:
    """A server that runs, and what it takes to change the models that it serves."""

    process: subprocess.Popen[bytes]
    release: Release  # as it was started
    view: View
    admin: Admin
    tap: Path  # the socket on which the router tells what happens


@contextmanager
def running(options: Options, log: IO[bytes] | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """Start Triton, wait until it is ready, stop it on leaving; nobody watches it meanwhile.

    Raises:
        InputError, ServerError: as `started`.
    """
    with started(options, log) as triton:
        yield triton.process


@contextmanager
def started(options: Options, log: IO[bytes] | None = None, release: Release | None = None) -> Iterator[Triton]:
    """Start Triton, wait until it is ready; on leaving, have it answer the requests under way and stop it.

    Args:
        log: where its log goes; stderr by default.
        release: what to serve; by default what the repository says.

    Raises:
        InputError: the repository holds no built version, a port is taken, a file of TLS cannot be used, or there is
            no Triton here.
        ServerError: the server ended before it was ready, or took too long.
    """
    repository = options.repository.resolve()
    release = Release((release or Release.load(repository)).live)  # a trial is joined later, by who watches
    _check_ports(options)
    with tempfile.TemporaryDirectory(prefix="aisle-triton-") as home, closed(options.grpc_port) as restriction:
        view = View(repository, Path(home, "models"), options.model_config_name)
        try:
            view.show(release.live)
        except InputError as error:
            raise ServerError(str(error)) from None
        view.bind(release.live)
        shared_memory = f"aisle_{Path(home).name}_"
        command, environment = _installation(Path(home))
        command += [
            f"--model-repository={view.folder}",
            "--model-control-mode=explicit",
            f"--load-model={ENSEMBLE}",  # its steps come with it
            "--strict-readiness=false",  # else the server counts as not ready while another version is loading
            f"--backend-config=python,shm-region-prefix-name={shared_memory}",
            f"--grpc-address={options.host}",
            f"--grpc-port={options.grpc_port}",
            restriction,
            # Milliseconds: a client that balances then looks the name up again, and finds servers that were added.
            "--grpc-max-connection-age=300000",
            "--grpc-max-connection-age-grace=60000",
            f"--metrics-address={options.metrics_host}",
            f"--metrics-port={options.metrics_port}",
            "--disable-auto-complete-config",
            "--exit-timeout-secs=10",
        ]
        restricted, key = restriction.partition("=")[2], restriction.rpartition("=")[2]
        command += [f"--http-restricted-api={restricted}"]
        if options.http_port is None:
            address: Path | tuple[str, int] = Path(home, "http")
            command += [f"--http-address=unix:{address}", "--http-port=1"]
        else:
            address = options.host, options.http_port
            command += [f"--http-address={options.host}", f"--http-port={options.http_port}"]
        if options.tls:
            command += options.tls.arguments()
        if options.cache_mb:
            command += [f"--cache-config=local,size={options.cache_mb << 20}"]
        if options.trace_url:
            command += [f"--trace-config={setting}" for setting in _tracing(options)]
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=log or sys.stderr,
            stderr=log,
            preexec_fn=_end_with_parent,
            start_new_session=True,  # so that Ctrl-C reaches us alone, who let it finish
        )
        threading.Thread(target=_sweep, args=(process,), daemon=True).start()
        admin = Admin(address, {HEADER.removeprefix("triton-grpc-protocol-"): key})
        try:
            _wait_until_ready(process, options)
            yield Triton(process, release, view, admin, Path(home, "tap"))
        finally:
            _drain(process, admin)
            stop(process)
            for leftover in Path("/dev/shm").glob(f"{shared_memory}*"):
                leftover.unlink(missing_ok=True)


def _check_ports(options: Options) -> None:
    """Make sure that nobody else listens: the readiness of another server would be taken for this one's."""
    wanted = {
        "--grpc-port": (options.host, options.grpc_port),
        "--http-port": (options.host, options.http_port),
        "--metrics-port": (options.metrics_host, options.metrics_port),
    }
    for option, (host, port) in wanted.items():
        if port is None:
            continue
        try:
            socket.create_server((host, port)).close()
        except OSError as error:
            raise InputError(f"cannot listen on {host}:{port} ({error.strerror}); see {option}") from None


def _sweep(process: subprocess.Popen[bytes]) -> None:
    """End with Triton its Python processes: one that is just starting would miss it, and keep our connection open."""
    process.wait()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _drain(process: subprocess.Popen[bytes], admin: Admin) -> None:
    """Let requests under way be answered: told to stop, Triton itself would fail them between two steps."""
    admin.close()
    deadline, admin = time.monotonic() + DRAIN_SECONDS, admin.another(DRAIN_SECONDS)
    try:
        while process.poll() is None and time.monotonic() < deadline:
            admin.unload(ENSEMBLE)
            if not any(s == "UNLOADING" for (model, _), s in admin.states().items() if model == ENSEMBLE):
                return
            time.sleep(0.05)
    except ServerError:
        pass  # it had not come so far, or is no more
    finally:
        admin.close()


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
    if shutil.which("bash", path=environment["PATH"]) is None:
        environment["PATH"] = f"{_bash(home / 'bin')}:{environment['PATH']}"
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


def _bash(folder: Path) -> Path:
    """Leave in a folder what does for `bash` all that the Python backend wants of it: -c "exec STUB ARGUMENTS"."""
    folder.mkdir()
    script = folder / "bash"
    script.write_text(
        f"#!{sys.executable} -IS\nimport os, shlex, sys\n"
        "_, *command = shlex.split(sys.argv[2])\nos.execv(command[0], command)\n"
    )
    script.chmod(0o755)
    return folder


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


def _tracing(options: Options) -> list[str]:
    """Return Triton's settings for a span of each request and of each step of the ensemble."""
    return [
        "mode=opentelemetry",
        "level=TIMESTAMPS",
        f"rate={options.trace_one_in}",
        f"opentelemetry,url={options.trace_url}",
        "opentelemetry,resource=service.name=aisle",
    ]


def _end_with_parent() -> None:
    """Have the kernel end the server should this process be killed (Linux prctl, PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _wait_until_ready(process: subprocess.Popen[bytes], options: Options) -> None:
    """Wait for the metrics: Triton offers them last, after models and gRPC, and to callers without a certificate."""
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None:
        metrics = http.client.HTTPConnection(options.metrics_host, options.metrics_port, timeout=START_SECONDS)
        try:
            metrics.request("HEAD", "/metrics")
            metrics.getresponse()
            return
        except OSError:
            pass
        finally:
            metrics.close()
        if time.monotonic() > deadline:
            raise ServerError(f"Triton was not ready within {START_SECONDS:.0f} s; its log says why")
        time.sleep(0.1)
    raise ServerError(f"Triton ended with exit code {process.returncode} before it was ready; its log says why")
