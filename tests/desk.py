"""A desk: in this process for its routes, or in one of its own, as `aisle desk` starts it, for browsers and kills."""

from __future__ import annotations

import http.client
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.testclient import TestClient

from aisle.deploy.desk.app import create_app
from aisle.deploy.desk.desk import Desk, DeskOptions
from aisle.deploy.server.triton import free_ports

from .conftest import wait_for

NOWHERE = "localhost:1"


class DeskClient(TestClient):
    """Calls the routes of a desk as its own pages do."""

    def __init__(self, desk: Desk) -> None:
        super().__init__(create_app(desk), base_url="http://localhost", follow_redirects=False)
        self.desk = desk

    @property
    def token(self) -> str:
        (found,) = re.findall(r'data-csrf="([^"]*)"', self.get("/login").text)
        return str(found)

    def act(self, path: str, content: bytes | None = None, **fields: Any) -> Any:
        """Post a form, or raw content, with the page's token, as htmx does."""
        headers = {"X-CSRF-Token": self.token, "HX-Request": "true"}
        if content is not None:
            return self.post(path, content=content, headers=headers)
        return self.post(path, data=fields, headers=headers)


@contextmanager
def desk_client(folder: Path, url: str = NOWHERE, **options: Any) -> Iterator[DeskClient]:
    """Run a desk's routes and jobs in this process."""
    with DeskClient(Desk(DeskOptions(url, folder, **options))) as client:
        yield client


@dataclass
class RunningDesk:
    url: str
    process: subprocess.Popen[bytes]


@contextmanager
def running_desk(folder: Path, url: str, *options: object) -> Iterator[RunningDesk]:
    """Run `aisle desk` until the end of the context."""
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "aisle", "desk", "--folder", folder, "--url", url, "--port", port, *options]
    log = folder.parent / f"desk-{port}.log"
    with log.open("wb") as file:
        process = subprocess.Popen([*map(str, command)], stdout=file, stderr=file, env={**os.environ})
    try:
        wait_for(lambda: _answers(process, port, log))
        yield RunningDesk(f"http://localhost:{port}", process)
    finally:
        process.terminate()
        process.wait(60)


def _answers(process: subprocess.Popen[bytes], port: int, log: Path) -> bool:
    assert process.poll() is None, log.read_text()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()
