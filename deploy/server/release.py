"""The release protocol: `aisle deploy` writes release.json into the model repository, and servers follow it.

Every server of the repository watches this file, on this machine and on others that share the volume. It applies the
release and reports its progress in its own status file. So a change of models needs no open port.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from aisle.build.repository import latest_version, versions
from aisle.console import say
from aisle.errors import InputError

RELEASE = "release.json"
SERVERS = ".servers"
HEARTBEAT_SECONDS = 2.0
TRIAL_SECONDS = 0.5  # between two heartbeats during a trial
LOST_SECONDS = 15.0  # a server without a heartbeat for this time counts as lost
POLL_SECONDS = 0.2
_WRITING = threading.Lock()  # the heartbeat and the supervisor write the same file


@dataclass(frozen=True)
class Release:
    """The live version, and the trial of a candidate beside it."""

    live: int  # the version that answers callers
    previous: int | None = None  # the version that `aisle rollback` returns to
    candidate: int | None = None  # a version that is loaded and warmed up beside the live one
    share: float = 0.0  # share of the requests that the candidate answers (canary)
    shadow: bool = False  # the candidate classifies the same texts too, and callers never see its answers
    revision: int = 0  # grows with each change

    @staticmethod
    def load(repository: Path) -> Release:
        """Read the release. If nothing was ever deployed, the newest version is live.

        Raises:
            InputError: the file is damaged, or its live version does not exist.
        """
        path = repository / RELEASE
        if not path.exists():
            return Release(latest_version(repository))
        try:
            release = Release(**json.loads(path.read_text("utf-8")))
            release._check()
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"{path} is damaged: {error}") from None
        if release.live not in versions(repository):
            raise InputError(f"{path}: version {release.live} is not in {repository}; deploy another")
        return release

    def _check(self) -> None:
        """Raise ValueError if a value has the wrong type or is out of range."""
        integers = {self.live, self.revision, *(each for each in (self.previous, self.candidate) if each is not None)}
        if not all(type(each) is int for each in integers) or type(self.shadow) is not bool or not 0 <= self.share <= 1:
            raise ValueError(f"it holds invalid values: {asdict(self)}")

    @property
    def routed(self) -> bool:
        """Whether the candidate gets traffic. Then a router replaces the ensemble."""
        return self.candidate is not None and (self.share > 0 or self.shadow)

    def versions(self) -> set[int]:
        """Return the versions that must be loaded."""
        return {self.live} if self.candidate is None else {self.live, self.candidate}

    def describe(self) -> str:
        text = f"version {self.live} is live"
        if self.candidate is None:
            return text
        state = f"answers {self.share:.1%}" if self.share else "runs in shadow" if self.shadow else "is loaded"
        return f"{text}, {self.candidate} {state}"

    def save(self, repository: Path) -> Release:
        """Write the release atomically as the next revision, and return that.

        Raises:
            InputError: the repository cannot be written.
        """
        release = replace(self, revision=self.revision + 1)
        _write(repository / RELEASE, asdict(release))
        return release


@dataclass
class Status:
    """The status that one server reports."""

    server: str  # HOST:PORT
    revision: int = 0  # of the last release that it tried to apply
    live: int = 0
    error: str = ""  # why it could not apply that release
    traffic: dict[str, Any] = field(default_factory=dict)  # metrics of the trial; see `TrialMonitor.metrics`
    beats: int = 0  # number of heartbeats so far

    def __post_init__(self) -> None:
        self._reported: dict[str, Any] = {}  # what was written last

    def write(self, repository: Path) -> None:
        """Write the status to the server's status file; do nothing if the repository is read-only."""
        self._reported = asdict(self)
        self._beat(repository)

    def _beat(self, repository: Path) -> None:
        """Write the last report again, as a new heartbeat. Changes since then stay unreported until `write`."""
        with _WRITING, contextlib.suppress(OSError, InputError):
            self.beats += 1
            self._path(repository).parent.mkdir(exist_ok=True)
            _write(self._path(repository), {**self._reported, "beats": self.beats})

    @contextlib.contextmanager
    def beating(self, repository: Path) -> Iterator[None]:
        """Send heartbeats after the first `write`, also during a change; remove the status file at the end."""
        stop = threading.Event()

        def beat() -> None:
            while not stop.wait(HEARTBEAT_SECONDS):
                if self._reported:
                    self._beat(repository)

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
    """Return the last status of each server of this repository. Some servers may have crashed; see `Watch`."""
    return [status for _, _, status in _read(repository)]


class Watch:
    """Distinguishes running servers from crashed ones by their heartbeats.

    It uses only the clock of its own process, because the clocks of other servers and of a shared volume may be wrong.
    """

    def __init__(self, repository: Path) -> None:
        self.repository = repository
        self._seen: dict[Path, tuple[str, float, int]] = {}  # content, time when it was first seen, number of changes

    def running(self) -> list[Status]:
        """Return the status of each running server. A server counts as lost `LOST_SECONDS` after its last heartbeat."""
        found, now = [], time.monotonic()
        for path, content, status in _read(self.repository):
            before, since, changes = self._seen.get(path, ("", now, -1))
            if content != before:
                self._seen[path] = content, now, changes + 1
            elif now - since > LOST_SECONDS:
                continue
            found.append(status)
        return found

    def settle(self) -> list[Status]:
        """Wait until each server has sent a heartbeat or counts as lost; return the running servers."""
        announced = False
        start = time.monotonic()
        while self.running() and time.monotonic() - start <= LOST_SECONDS:
            silent = {path for path, (_, _, changes) in self._seen.items() if not changes and path.exists()}
            if not silent:
                break
            if not announced and time.monotonic() - start > 2 * HEARTBEAT_SECONDS:
                announced = True
                say(f"waiting for a heartbeat of {', '.join(sorted(path.stem for path in silent))}")
            time.sleep(POLL_SECONDS)
        self._remove_lost()
        return self.running()

    def _remove_lost(self) -> None:
        for path, (_, since, _) in self._seen.items():
            if time.monotonic() - since > LOST_SECONDS:
                with contextlib.suppress(OSError):  # if the server runs after all, its next heartbeat writes it again
                    path.unlink(missing_ok=True)


def _read(repository: Path) -> Iterator[tuple[Path, str, Status]]:
    """Yield the status file of each server, a text that changes with every heartbeat, and the status."""
    known = {each.name for each in fields(Status)}
    for path in sorted((repository / SERVERS).glob("*.json")):
        try:
            content = path.read_text("utf-8")
            status = Status(**{key: value for key, value in json.loads(content).items() if key in known})
            yield path, f"{path.stat().st_mtime_ns} {content}", status
        except (OSError, ValueError, TypeError, AttributeError):
            continue  # the server has just ended


def _write(path: Path, value: dict[str, Any]) -> None:
    """Write JSON atomically.

    Raises:
        InputError: the file cannot be written.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(json.dumps(value, indent=2) + "\n")
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise InputError(f"cannot write {path}: {error.strerror}") from None
