"""`aisle serve`: keep Triton running, restart failed parts, and apply each new release without downtime."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
from collections import deque
from pathlib import Path

from aisle.build.repository import gate_note, leftovers, read_report
from aisle.console import say
from aisle.deploy.server.apply import apply_release
from aisle.deploy.server.processes import Step, step_processes
from aisle.deploy.server.release import HEARTBEAT_SECONDS, RELEASE, TRIAL_SECONDS, Release, Status
from aisle.deploy.server.served_repository import ENSEMBLES
from aisle.deploy.server.trial import TrialMonitor
from aisle.deploy.server.triton import ServerOptions, Triton, started
from aisle.deploy.server.watchdog import watch_over
from aisle.errors import InputError, ServerError

WATCH_SECONDS = 0.25
MAX_RESTARTS = 5  # per minute; a fault that needs more cannot be fixed by a restart


def serve_forever(options: ServerOptions) -> int:
    """Run the server until a signal stops it or Triton cannot be kept running; return the exit code.

    Raises:
        InputError, ServerError: see `triton.started`; only for the first start.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop_serving)
    if unread := leftovers(options.repository):
        say(
            f"{options.repository} holds {', '.join(unread)} of another Aisle version. They are not read: code and "
            "configuration come from the package. Delete them; put your own settings into MODEL/configs/NAME.pbtxt "
            "and serve with --model-config-name NAME"
        )
    status = Status(f"{options.host}:{options.grpc_port}")
    try:
        with status.beating(options.repository):
            return _keep_running(options, status)
    except KeyboardInterrupt:
        return 0


def _keep_running(options: ServerOptions, status: Status) -> int:
    """Restart Triton whenever it ends; return the exit code if that happens too often."""
    starts: deque[float] = deque(maxlen=MAX_RESTARTS + 1)
    release: Release | None = None
    while True:
        starts.append(time.monotonic())
        try:
            with started(options, release=release) as triton:
                code, release = watch(triton, options, status)
            say(f"Triton ended with exit code {code}; restarting it")
        except (InputError, ServerError, OSError) as error:
            if len(starts) == 1:
                raise
            say(f"{error}; trying again")
        if len(starts) > MAX_RESTARTS and starts[-1] - starts[0] < 60:
            say(f"Triton ended {len(starts)} times within a minute; giving up")
            return 1
        time.sleep(min(8.0, 0.25 * 2 ** len([start for start in starts if start > time.monotonic() - 60])))


def watch(triton: Triton, options: ServerOptions, status: Status) -> tuple[int, Release]:
    """Supervise Triton until it ends; return its exit code and the release to start the next Triton with."""
    gate = _gate(options.repository, triton.release.live)
    say(f"ready: {options.describe()}{triton.served.describe()}, version {triton.release.live}{gate}")
    supervisor = Supervisor(triton, options, status)
    watch_over(triton)
    supervisor.run()
    if supervisor.release.candidate is not None and not status.error:
        status.error = f"Triton ended during the trial of version {supervisor.release.candidate}"
    status.write(options.repository)
    return int(triton.process.returncode), Release(supervisor.release.live)


def _stop_serving(*_: object) -> None:
    raise KeyboardInterrupt


class Supervisor:
    """Supervises one run of Triton."""

    def __init__(self, triton: Triton, options: ServerOptions, status: Status) -> None:
        self._triton = triton
        self._repository = options.repository.resolve()
        self._status = status
        status.live = triton.release.live
        if not status.error:  # else Triton ended because of this revision; it must not be tried again
            status.revision = triton.release.revision
        self.release = triton.release
        self._release_mtime = 0
        self._processes = step_processes(triton.process.pid)
        self._retiring: set[int] = set()  # ids of replaced processes; they end after their last request

    def run(self) -> None:
        """Supervise until Triton ends."""
        last_report = 0.0
        with TrialMonitor(self._triton.trial_socket, self._triton.admin) as monitor:
            while self._triton.process.poll() is None:
                self._reload_dead_steps()
                self._follow_release(monitor)
                interval = HEARTBEAT_SECONDS if self.release.candidate is None else TRIAL_SECONDS
                if time.monotonic() - last_report > interval:
                    last_report = time.monotonic()
                    self._report(monitor)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._triton.process.wait(WATCH_SECONDS)

    def _report(self, monitor: TrialMonitor) -> None:
        self._status.traffic = monitor.metrics()
        self._status.write(self._repository)

    def _reload_dead_steps(self) -> None:
        """Reload each step whose process has ended. Triton notices this, but does not restart the step.

        The encoder and the router hold queued requests, which Triton never answers after their process has died. Their
        callers get an error at once only if Triton itself ends. So then Triton is restarted.
        """
        running = step_processes(self._triton.process.pid)
        dead = {self._processes[pid] for pid in self._processes.keys() - running.keys() - self._retiring}
        for model, version in sorted(dead):
            if not self._triton.served.has_version(model, version):
                continue
            say(f"a process of {model}, version {version}, ended; restarting it")
            answers_callers = version == self.release.live or self.release.share > 0
            if model in ENSEMBLES or (model == "encoder" and answers_callers):
                say("callers wait for requests that it held, so Triton is restarted")
                self._triton.process.kill()
                return
            self._reload((model, version), running)
        if dead:
            running = step_processes(self._triton.process.pid)
        self._retiring &= running.keys()
        self._processes = running

    def _reload(self, step: Step, running: dict[int, Step]) -> None:
        """Reload one version of a step; if that fails, end Triton, so that it is restarted."""
        model, version = step
        self._retiring |= {pid for pid, owner in running.items() if owner == step}
        try:
            self._triton.served.check_version(version)
            self._triton.served.mark_changed(model, version)
            self._triton.admin.load(model)
        except (InputError, ServerError, OSError) as error:
            say(f"the step cannot be reloaded, so Triton is restarted: {error}")
            self._triton.process.kill()

    def _follow_release(self, monitor: TrialMonitor) -> None:
        """Apply release.json, once for each revision."""
        try:
            changed = (self._repository / RELEASE).stat().st_mtime_ns
        except OSError:
            return
        if changed == self._release_mtime:
            return
        self._release_mtime = changed
        before = step_processes(self._triton.process.pid)
        try:
            wanted = Release.load(self._repository)
            if wanted.revision == self._status.revision:
                return
            self._status.revision, self._status.error = wanted.revision, ""
            apply_release(self._triton, self.release, wanted)
        except Exception as error:  # whatever fails, the live version keeps serving
            self._status.error = _one_line(error)
            say(f"version {self.release.live} keeps serving: {self._status.error}")
        else:
            self._switch_to(wanted, monitor)
        kept = self.release.versions()
        self._retiring |= {pid for pid, (model, version) in before.items() if model in ENSEMBLES or version not in kept}
        self._processes = step_processes(self._triton.process.pid)
        self._report(monitor)

    def _switch_to(self, release: Release, monitor: TrialMonitor) -> None:
        self.release = release
        self._status.live = release.live
        monitor.follow(release)
        say(f"release {release.revision}: {release.describe()}{_gate(self._repository, release.live)}")


def _one_line(error: Exception) -> str:
    """Return an error as one line, with its class if it is unexpected."""
    text = " ".join(str(error).split())
    return text if isinstance(error, InputError | ServerError | OSError) else f"{type(error).__name__}: {text}"


def _gate(repository: Path, version: int) -> str:
    try:
        note = gate_note(read_report(repository, version))
    except InputError:
        return ""
    return f"; {note}" if note else ""
