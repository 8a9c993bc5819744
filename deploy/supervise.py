"""`aisle serve`: keeps Triton running, heals what dies in it, and follows the release without losing a request."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aisle.build.repository import PYTHON_MODELS
from aisle.console import say
from aisle.deploy.admin import Admin
from aisle.deploy.release import HEARTBEAT_SECONDS, RELEASE, TRIAL_SECONDS, Release, Status
from aisle.deploy.triton import Options, Triton, started
from aisle.deploy.view import ENSEMBLE, ensemble_of
from aisle.deploy.watchdog import watch_over
from aisle.errors import InputError, ServerError

WATCH_SECONDS = 0.25
RESTARTS = 5  # within a minute; more is a fault that a restart does not mend
ROUTER_SECONDS = 60.0
WARM_UP = [["warm-up"], ["红富士苹果 5斤装 " * 40] * 64]  # one short text, and a batch as large as they come


def serve_forever(options: Options) -> int:
    """Run the server until this process is told to stop or Triton cannot be kept running; return the exit code.

    Raises:
        InputError, ServerError: as `triton.started`, of the first start.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop_serving)
    status = Status(f"{options.host}:{options.grpc_port}")
    try:
        with status.beating(options.repository):
            return _keep_running(options, status)
    except KeyboardInterrupt:
        return 0


def _keep_running(options: Options, status: Status) -> int:
    """Start Triton again whenever it ends; return the exit code when that happens too often."""
    starts: deque[float] = deque(maxlen=RESTARTS + 1)
    release: Release | None = None
    while True:
        starts.append(time.monotonic())
        try:
            with started(options, release=release) as triton:
                code, release = watch(triton, options, status)
            say(f"Triton ended with exit code {code}; starting it again")
        except (InputError, ServerError) as error:
            if len(starts) == 1:
                raise
            say(f"{error}; trying again")
        if len(starts) > RESTARTS and starts[-1] - starts[0] < 60:
            say(f"Triton ended {len(starts)} times within a minute; giving up")
            return 1
        time.sleep(min(8.0, 0.25 * 2 ** len([each for each in starts if each > time.monotonic() - 60])))


def watch(triton: Triton, options: Options, status: Status) -> tuple[int, Release]:
    """Look after Triton until it ends; return its exit code and what it served, which the next one begins with."""
    say(f"ready: {options.describe()}, version {triton.release.live}")
    supervisor = Supervisor(triton, options, status)
    watch_over(triton)
    supervisor.run()
    if supervisor.release.candidate is not None and not status.error:
        status.error = f"Triton ended while version {supervisor.release.candidate} was tried"
    status.write(options.repository)
    return int(triton.process.returncode), Release(supervisor.release.live)


def _stop_serving(*_: object) -> None:
    raise KeyboardInterrupt


class Supervisor:
    """Watches one run of Triton."""

    def __init__(self, triton: Triton, options: Options, status: Status) -> None:
        self._triton = triton
        self._options = options
        self._repository = options.repository.resolve()
        self._status = status
        status.live = triton.release.live
        if not status.error:  # else Triton ended over this revision, which is not tried again
            status.revision = triton.release.revision
        self.release = triton.release
        self._written: object = None
        self._stubs = _stubs(triton.process.pid)
        self._leaving: set[int] = set()  # replaced by us, and ending when their last request is answered

    def run(self) -> None:
        """Return once Triton has ended."""
        beat = 0.0
        with Tap(self._triton.tap, self._triton.admin) as tap:
            while self._triton.process.poll() is None:
                self._heal()
                self._follow(tap)
                if time.monotonic() - beat > (HEARTBEAT_SECONDS if self.release.candidate is None else TRIAL_SECONDS):
                    beat = time.monotonic()
                    self._report(tap)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._triton.process.wait(WATCH_SECONDS)

    def _report(self, tap: Tap) -> None:
        self._status.traffic = tap.figures()
        self._status.write(self._repository)

    def _heal(self) -> None:
        """Load anew what runs in a process that ended: Triton notices, but leaves it at that.

        The encoder and the router are handed requests ahead, and those that wait in one that ended Triton never
        answers. Only Triton's own end tells their callers, at once, to ask again.
        """
        stubs = _stubs(self._triton.process.pid)
        dead = {self._stubs[pid] for pid in self._stubs.keys() - stubs.keys() - self._leaving}
        for model, version in sorted(dead):
            if not self._triton.view.has(model, version):
                continue
            say(f"a process of {model}, version {version}, ended; starting it again")
            answers_callers = version == self.release.live or self.release.share > 0
            if model == ENSEMBLE or (model == "encoder" and answers_callers):
                say("callers wait for an answer that was to come from it, so all of Triton is started again")
                self._triton.process.kill()
                return
            self._leaving |= {pid for pid, owner in stubs.items() if owner == (model, version)}
            try:
                self._triton.view.touch(model, version)
                self._triton.admin.load(model)
            except (ServerError, OSError) as error:
                say(f"that failed, so all of Triton is started again: {error}")
                self._triton.process.kill()
        if dead:
            stubs = _stubs(self._triton.process.pid)
        self._leaving &= stubs.keys()
        self._stubs = stubs

    def _follow(self, tap: Tap) -> None:
        """Bring Triton to what the release says, once for each revision."""
        try:
            changed = (self._repository / RELEASE).stat().st_mtime_ns
        except OSError:
            return
        if changed == self._written:
            return
        self._written = changed
        before = _stubs(self._triton.process.pid)
        try:
            wanted = Release.load(self._repository)
            if wanted.revision == self._status.revision:
                return
            self._status.revision, self._status.error = wanted.revision, ""
            change(self._triton, self.release, wanted)
        except (InputError, ServerError, OSError) as error:
            self._status.error = " ".join(str(error).split())
            say(f"version {self.release.live} goes on serving: {self._status.error}")
        else:
            self.release = wanted
            self._status.live = wanted.live
            tap.follow(wanted)
            say(f"release {wanted.revision}: {_described(wanted)}")
        kept = _versions(self.release)
        self._leaving |= {pid for pid, (model, version) in before.items() if model == ENSEMBLE or version not in kept}
        self._stubs = _stubs(self._triton.process.pid)
        self._report(tap)


def change(triton: Triton, before: Release, after: Release) -> None:
    """Take Triton from one release to another; requests are answered all the time, each by one version.

    Raises:
        InputError, ServerError, OSError: the new version cannot be served; everything is as it was.
    """
    view, admin = triton.view, triton.admin
    try:
        for version in _versions(after) - _versions(before):
            view.show(version)
        for model in PYTHON_MODELS:
            admin.load(model)
        tried = after.candidate if after.candidate is not None else after.live
        names = {ensemble_of(version): version for version in {after.live, tried}}
        if _routed(after) or tried != before.live:
            for name, version in names.items():
                view.bind(version, name)
                admin.load(name)
            _warm_up(admin, ensemble_of(tried))
        _install(triton, after)
    except (InputError, ServerError, OSError):
        with contextlib.suppress(InputError, ServerError, OSError):
            for version in view.versions() - _versions(before):
                view.hide(version)  # first, for Triton tries again what it could not load
            _install(triton, before)
            _clear(triton, before)
        raise
    if not _routed(after):
        _wait_for_router(triton.process.pid)
    _clear(triton, after)


def _install(triton: Triton, release: Release) -> None:
    """Replace what callers ask for."""
    if _routed(release):
        triton.view.route(release, triton.tap)
    else:
        triton.view.bind(release.live)
    triton.admin.load(ENSEMBLE)


def _wait_for_router(triton: int) -> None:
    """Wait until a router that was replaced has answered its last request, for which it asks what `_clear` unloads."""
    deadline = time.monotonic() + ROUTER_SECONDS
    while any(model == ENSEMBLE for model, _ in _stubs(triton).values()) and time.monotonic() < deadline:
        time.sleep(0.05)


def _clear(triton: Triton, release: Release) -> None:
    """Take away what a release does not need, once requests under way have been answered."""
    needed = {ensemble_of(version) for version in _versions(release)} if _routed(release) else set()
    for name in {path.name for path in triton.view.folder.glob(f"{ENSEMBLE}_v*")} - needed:
        triton.admin.unload(name)
        triton.view.remove(name)
    for version in triton.view.versions() - _versions(release):
        triton.view.hide(version)
    for model in PYTHON_MODELS:
        triton.admin.load(model)


def _warm_up(admin: Admin, model: str) -> None:
    """Have a version answer before anybody waits for it.

    Raises:
        ServerError: it cannot.
    """
    for texts in WARM_UP:
        if len(admin.classify(model, texts)) != len(texts):
            raise ServerError(f"{model} does not answer every text")


def _routed(release: Release) -> bool:
    return release.candidate is not None and (release.share > 0 or release.shadow)


def _versions(release: Release) -> set[int]:
    return {release.live} if release.candidate is None else {release.live, release.candidate}


def _described(release: Release) -> str:
    text = f"version {release.live} is live"
    if release.candidate is None:
        return text
    how = f"answers {release.share:.1%}" if release.share else "in its shadow" if release.shadow else "stands by"
    return f"{text}, {release.candidate} {how}"


class Tap:
    """Hears what the router tells: counts each version's requests, and shows the candidate the live ones' texts."""

    def __init__(self, path: Path, admin: Admin) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._admin = admin.another()
        self._lock = threading.Lock()
        self._candidate = ""
        self._counts: Counter[str] = Counter()
        self._changes: Counter[str] = Counter()
        self._thread = threading.Thread(target=self._listen, daemon=True)

    def __enter__(self) -> Tap:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        self._admin.close()

    def follow(self, release: Release) -> None:
        """Begin to count anew, for another release."""
        with self._lock:
            self._candidate = "" if release.candidate is None else ensemble_of(release.candidate)
            self._counts.clear()
            self._changes.clear()

    def figures(self) -> dict[str, Any]:
        """Return counts of requests, failures and seconds by version, and of shadow texts compared and agreed."""
        with self._lock:
            return {
                **{key: round(value, 3) for key, value in self._counts.items()},
                "changes": dict(self._changes.most_common(50)),  # live category → candidate's
            }

    def _listen(self) -> None:
        for event in self._events():
            who = "candidate" if event.get("model") == self._candidate else "live"
            if "model" in event:
                with self._lock:
                    self._counts[f"{who}_requests"] += 1
                    self._counts[f"{who}_failures"] += event["failed"]
                    self._counts[f"{who}_seconds"] += event["seconds"]
            elif self._candidate:
                self._compare(self._candidate, event["text"], event["category"])

    def _compare(self, candidate: str, text: str, category: str) -> None:
        """Ask the candidate as well: one text at a time, so that it costs the live version little."""
        try:
            other = self._admin.classify(candidate, [text])[0]
        except ServerError:
            other = None
        with self._lock:
            if candidate != self._candidate:
                return
            self._counts["shadow_compared"] += 1
            self._counts["shadow_errors"] += other is None
            self._counts["shadow_agreed"] += other == category
            if other not in (category, None):
                self._changes[f"{category} → {other}"] += 1

    def _events(self) -> Iterator[dict[str, Any]]:
        while True:
            try:
                yield json.loads(self._socket.recv(1 << 18))
            except ValueError:
                continue  # cut off
            except OSError:
                return


def _stubs(triton: int) -> dict[int, tuple[str, int]]:
    """Return Triton's Python processes that live, each with the model and the version that it runs."""
    found = {}
    for children in Path(f"/proc/{triton}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for pid in map(int, children.read_text().split()):
                with contextlib.suppress(OSError, IndexError, ValueError):
                    state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
                    model = Path(Path(f"/proc/{pid}/cmdline").read_text().split("\0")[1])  # …/MODEL/VERSION/model.py
                    if state != "Z" and model.parts[-3] in (*PYTHON_MODELS, ENSEMBLE):
                        found[pid] = (model.parts[-3], int(model.parts[-2]))
    return found
