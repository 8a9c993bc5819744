"""A REST front in its own process, as `aisle rest` starts it, and plain HTTP to it."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aisle.deploy.server.triton import free_ports

from .conftest import wait_for

JSON = {"Content-Type": "application/json"}
NDJSON = {"Content-Type": "application/x-ndjson"}


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    data: bytes

    @property
    def body(self) -> Any:
        return json.loads(self.data)


@dataclass
class RunningFront:
    port: int
    log: Path
    process: subprocess.Popen[bytes]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] = JSON, timeout: float = 120
    ) -> Answer:
        """Send one request; a body that is not bytes is sent as JSON."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request(method, path, data, dict(headers))
            response = connection.getresponse()
            return Answer(response.status, dict(response.getheaders()), response.read())
        finally:
            connection.close()

    def post(self, path: str, body: Any, headers: Mapping[str, str] = JSON) -> Answer:
        return self.ask("POST", path, body, headers)

    def logged(self) -> list[dict[str, Any]]:
        """Return the rows of the access log."""
        return [json.loads(line) for line in self.log.read_text("utf-8").splitlines() if line.startswith("{")]


@contextmanager
def front(url: str, folder: Path, *options: object, env: Mapping[str, str] | None = None) -> Iterator[RunningFront]:
    """Run a front for the server at `url`, and stop it as a supervisor would."""
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "aisle", "rest", "--url", url, "--port", str(port), *map(str, options)]
    log = folder / f"rest-{port}.log"
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env={**os.environ, **(env or {})})
    running = RunningFront(port, log, process)
    try:
        wait_for(lambda: _accepts(running))
        yield running
    finally:
        process.terminate()
        process.wait(60)


def _accepts(running: RunningFront) -> bool:
    assert running.process.poll() is None, running.log.read_text()
    try:
        connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=30)
        connection.connect()
        connection.close()
    except OSError:
        return False
    return True
