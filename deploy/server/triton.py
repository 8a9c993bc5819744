"""Start Triton on this machine, wait until it is ready, and stop it without losing a request."""

from __future__ import annotations

import contextlib
import http.client
import os
import random
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

from aisle.build.engine import EngineSpec
from aisle.console import say
from aisle.deploy.server.access import HEADER, ServerTLS, restrict_protocols
from aisle.deploy.server.admin import Admin
from aisle.deploy.server.installation import infer_threads, triton_command
from aisle.deploy.server.instances import check_gpu, cores
from aisle.deploy.server.logs import TritonLog
from aisle.deploy.server.release import Release
from aisle.deploy.server.served_repository import ENSEMBLES, ServedRepository
from aisle.deploy.serving.cache import CACHE_MB
from aisle.errors import InputError, ServerError
from aisle.processes import end_with_parent

START_SECONDS = 120.0
STARTS = 4  # at most, if each crashes over a lock in Triton's shared memory, as happens on a busy machine
STOP_SECONDS = 30.0
DRAIN_SECONDS = 15.0


@dataclass(frozen=True)
class ServerOptions:
    """The options of `aisle serve`."""

    repository: Path
    host: str = "127.0.0.1"
    grpc_port: int = 8001
    http_port: int | None = None  # HTTP is off by default: it has no TLS
    metrics_host: str = "127.0.0.1"
    metrics_port: int = 8002
    tls: ServerTLS | None = None
    model_config_name: str = ""  # selects MODEL/configs/NAME.pbtxt, such as `gpu`, in models that have it
    cache_mb: int = 256  # MiB of the answer cache in each encoder process; 0 turns it off
    trace_url: str = ""  # OpenTelemetry collector (OTLP over HTTP), such as http://collector:4318/v1/traces
    trace_one_in: int = 1000  # of requests without a trace context; those with one are always traced

    def describe(self) -> str:
        encryption = f", {'mutual ' if self.tls.client_authority else ''}TLS" if self.tls else ""
        return f"gRPC on {self.host}:{self.grpc_port}{encryption}, metrics on port {self.metrics_port}"


class _LockFailed(ServerError):
    """Triton's start crashed over a lock in its shared memory. The next start mostly succeeds."""


def free_ports(count: int) -> list[int]:
    """Return ports that are free now on the loopback address."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@dataclass(frozen=True)
class Triton:
    """A running server, and access to the models that it serves."""

    process: subprocess.Popen[bytes]
    release: Release  # the release at its start
    served: ServedRepository
    admin: Admin
    trial_socket: Path  # Unix datagram socket to which the router sends its metrics


@contextmanager
def running(options: ServerOptions, log: IO[bytes] | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """Start Triton without supervision, wait until it is ready, and stop it at the end.

    Raises:
        InputError, ServerError: see `started`.
    """
    with started(options, log) as triton:
        yield triton.process


@contextmanager
def started(options: ServerOptions, log: IO[bytes] | None = None, release: Release | None = None) -> Iterator[Triton]:
    """Start Triton and wait until it is ready; at the end, complete the requests in flight and stop it.

    A start that crashes over a lock in Triton's shared memory is tried again, up to `STARTS` starts in all.

    Args:
        log: a file for its log; stderr by default.
        release: what to serve; by default the repository's release.

    Raises:
        InputError: the repository holds no built version, a port is taken, a TLS file is unusable, or Triton is not
            installed.
        ServerError: the live version is damaged, or the server ended or took too long before it was ready.
    """
    repository = options.repository.resolve()
    # Start with the live version; the supervisor adds a candidate later.
    release = Release((release or Release.load(repository)).live)
    _check_ports(options)
    with contextlib.ExitStack() as stack:
        for left in reversed(range(STARTS)):
            try:
                triton = stack.enter_context(_started_once(options, repository, release, log))
                break
            except _LockFailed as error:
                if not left:
                    raise
                say(f"{error}; trying again")
                time.sleep(random.uniform(0.1, 1.0))
        yield triton


@contextmanager
def _started_once(
    options: ServerOptions, repository: Path, release: Release, log: IO[bytes] | None
) -> Iterator[Triton]:
    """As `started`, but with a single start.

    Raises:
        _LockFailed: Triton crashed over a lock in its shared memory.
    """
    with (
        tempfile.TemporaryDirectory(prefix="aisle-triton-") as folder,
        restrict_protocols(options.grpc_port) as restriction,
        contextlib.closing(TritonLog((log or sys.stderr).fileno())) as output,
    ):
        home = Path(folder)
        served = _served_repository(options, repository, home, release.live)
        command, environment = _command(options, served, home, restriction)
        process = _start(command, environment, output.descriptor)
        key = restriction.rpartition("=")[2]
        admin = Admin(_http_address(options, home), {HEADER.removeprefix("triton-grpc-protocol-"): key})
        try:
            _wait_until_ready(process, options, output)
            yield Triton(process, release, served, admin, home / "trial")
        finally:
            _drain(process, admin)
            stop(process)
            for leftover in Path("/dev/shm").glob(f"{_shared_memory(home)}*"):
                leftover.unlink(missing_ok=True)


def _served_repository(options: ServerOptions, repository: Path, home: Path, version: int) -> ServedRepository:
    """Create the folder that Triton reads, with one version."""
    served = ServedRepository(repository, home / "models", options.model_config_name)
    try:
        served.add_version(version)
    except InputError as error:
        raise ServerError(str(error)) from None
    check_gpu(version, EngineSpec.load(served.folder / "encoder" / str(version)).target)
    for ensemble in ENSEMBLES:
        served.write_ensemble(ensemble, version)
    return served


def _command(
    options: ServerOptions, served: ServedRepository, home: Path, restriction: str
) -> tuple[list[str], dict[str, str]]:
    """Return Triton's command with all settings, and its environment variables."""
    command, environment = triton_command(home)
    environment[CACHE_MB] = str(options.cache_mb)
    if served.tokenizers:
        environment.setdefault("RAYON_NUM_THREADS", str(served.tokenizers.threads))
    command += infer_threads(command[0], environment, cores())
    command += [
        f"--model-repository={served.folder}",
        "--model-control-mode=explicit",
        *(f"--load-model={ensemble}" for ensemble in ENSEMBLES),  # loads their steps too
        "--strict-readiness=false",  # otherwise the server is not ready while another version is loading
        f"--backend-config=python,shm-region-prefix-name={_shared_memory(home)}",
        "--disable-auto-complete-config",
        "--exit-timeout-secs=10",
        *_endpoints(options, home, restriction),
    ]
    if options.trace_url:
        command += [f"--trace-config={setting}" for setting in _tracing(options)]
    return command, environment


def _endpoints(options: ServerOptions, home: Path, restriction: str) -> list[str]:
    """Return the arguments for gRPC, HTTP and metrics; `restriction` is the argument that restricts protocols."""
    arguments = [
        f"--grpc-address={options.host}",
        f"--grpc-port={options.grpc_port}",
        restriction,
        f"--http-restricted-api={restriction.partition('=')[2]}",
        # In milliseconds. After that time, clients resolve the name again and find new servers.
        "--grpc-max-connection-age=300000",
        "--grpc-max-connection-age-grace=60000",
        f"--metrics-address={options.metrics_host}",
        f"--metrics-port={options.metrics_port}",
    ]
    address = _http_address(options, home)
    if isinstance(address, Path):
        arguments += [f"--http-address=unix:{address}", "--http-port=1"]
    else:
        arguments += [f"--http-address={address[0]}", f"--http-port={address[1]}"]
    return arguments + (options.tls.arguments() if options.tls else [])


def _http_address(options: ServerOptions, home: Path) -> Path | tuple[str, int]:
    """Return the address of HTTP: a Unix socket for this user alone, or host and port if callers have HTTP too."""
    return home / "http" if options.http_port is None else (options.host, options.http_port)


def _shared_memory(home: Path) -> str:
    """Return the name prefix of the server's shared memory."""
    return f"aisle_{home.name}_"


def _start(command: list[str], environment: dict[str, str], output: int) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=output,
        stderr=output,
        preexec_fn=end_with_parent,
        start_new_session=True,  # so that Ctrl-C reaches only this process, which lets Triton finish
    )
    threading.Thread(target=_end_process_group, args=(process,), daemon=True).start()
    return process


def _check_ports(options: ServerOptions) -> None:
    """Make sure that the ports are free. Otherwise another server would be taken for this one.

    Raises:
        InputError: a port is taken.
    """
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


def _end_process_group(process: subprocess.Popen[bytes]) -> None:
    """Kill Triton's Python processes when Triton has ended: a process that was just starting would run on."""
    process.wait()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _drain(process: subprocess.Popen[bytes], admin: Admin) -> None:
    """Let requests in flight complete. When Triton stops, it would fail those that are between two steps."""
    admin.close()
    deadline, admin = time.monotonic() + DRAIN_SECONDS, admin.new_connection(DRAIN_SECONDS)
    try:
        while process.poll() is None and time.monotonic() < deadline:
            for ensemble in ENSEMBLES:
                admin.unload(ensemble)
            if not any(s == "UNLOADING" for (model, _), s in admin.states().items() if model in ENSEMBLES):
                return
            time.sleep(0.05)
    except ServerError:
        pass  # Triton was not ready yet, or has ended
    finally:
        admin.close()


def stop(process: subprocess.Popen[bytes]) -> None:
    """Terminate the server; kill it after `STOP_SECONDS`."""
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _tracing(options: ServerOptions) -> list[str]:
    """Return Triton's settings for one span per request and one per step of the ensemble."""
    return [
        "mode=opentelemetry",
        "level=TIMESTAMPS",
        f"rate={options.trace_one_in}",
        f"opentelemetry,url={options.trace_url}",
        "opentelemetry,resource=service.name=aisle",
    ]


def _wait_until_ready(process: subprocess.Popen[bytes], options: ServerOptions, log: TritonLog) -> None:
    """Wait for the metrics endpoint: Triton opens it last, after models and gRPC, and it needs no certificate.

    Raises:
        ServerError: the server ended, or was not ready within `START_SECONDS`.
        _LockFailed: it ended over a lock in its shared memory.
    """
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
    ended = f"Triton ended with exit code {process.returncode} before it was ready"
    log.close()
    if log.lock_failed:
        raise _LockFailed(f"{ended}: it could not lock its shared memory (boost lock_exception)")
    raise ServerError(f"{ended}; its log says why")
