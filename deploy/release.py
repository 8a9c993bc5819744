"""What is to be served: one small file in the model repository, which `aisle deploy` writes and servers follow.

Every server of the repository, on this machine or on others that share the volume, watches the file, brings itself to
what it says and tells in a file of its own how far it got. So no port has to be open for a change of models.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from aisle.build.repository import latest_version, versions
from aisle.errors import InputError

RELEASE = "release.json"
SERVERS = ".servers"
HEARTBEAT_SECONDS = 2.0
TRIAL_SECONDS = 0.5  # the same, while a candidate is tried
GONE_SECONDS = 15.0  # without a heartbeat


@dataclass(frozen=True)
class Release:
    """Which version answers, and what another one is tried with."""

    live: int
    previous: int | None = None  # what `aisle rollback` returns to
    candidate: int | None = None  # loaded and warmed beside the live one
    share: float = 0.0  # of the requests that the candidate answers
    shadow: bool = False  # the candidate classifies live texts too, and nobody sees its answers
    revision: int = 0  # counts the changes

    @staticmethod
    def load(repository: Path) -> Release:
        """Read what is to be served: the newest version where nothing was ever deployed.

        Raises:
            InputError: the file is damaged, or its live version is gone.
        """
        path = repository / RELEASE
        if not path.exists():
            return Release(latest_version(repository))
        try:
            release = Release(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"{path} is damaged: {error}") from None
        if release.live not in versions(repository):
            raise InputError(f"{path}: version {release.live} is not in {repository}; deploy another")
        return release

    def save(self, repository: Path) -> Release:
        """Write this as the next revision, whole or not at all; return it.

        Raises:
            InputError: the repository cannot be written.
        """
        release = replace(self, revision=self.revision + 1)
        _write(repository / RELEASE, asdict(release))
        return release


@dataclass
class Status:
    """What one server says of itself."""

    server: str  # HOST:PORT
    revision: int = 0  # the release that it last tried to follow
    live: int = 0
    error: str = ""  # why it could not
    traffic: dict[str, Any] = field(default_factory=dict)  # of the candidate; see `Tap`

    def write(self, repository: Path) -> None:
        """Leave this where `servers` finds it; a repository that cannot be written goes without."""
        with contextlib.suppress(OSError, InputError):
            self._path(repository).parent.mkdir(exist_ok=True)
            _write(self._path(repository), asdict(self))

    @contextlib.contextmanager
    def beating(self, repository: Path) -> Iterator[None]:
        """Show that the server lives, however long it is busy with a change; forget it on leaving."""
        stop = threading.Event()

        def beat() -> None:
            while not stop.wait(HEARTBEAT_SECONDS):
                with contextlib.suppress(OSError):
                    os.utime(self._path(repository))

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            with contextlib.suppress(OSError):
                self._path(repository).unlink(missing_ok=True)

    def _path(self, repository: Path) -> Path:
        host, _, port = self.server.rpartition(":")
        return repository / SERVERS / f"{os.uname().nodename}-{host}-{port}.json"


def servers(repository: Path) -> list[Status]:
    """Return what the servers of this repository that are alive say."""
    found = []
    for path in sorted((repository / SERVERS).glob("*.json")):
        try:
            if time.time() - path.stat().st_mtime < GONE_SECONDS:
                found.append(Status(**json.loads(path.read_text())))
        except (OSError, ValueError, TypeError):
            continue  # it ended meanwhile
    return found


def _write(path: Path, value: dict[str, Any]) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(json.dumps(value, indent=2) + "\n")
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise InputError(f"cannot write {path}: {error.strerror}") from None
