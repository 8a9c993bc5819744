"""Roll out a new version without downtime: load, shadow, canary, switch; and roll back."""

from __future__ import annotations

import fcntl
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from aisle.build.repository import check_version, gate_note, gate_state, latest_version, read_report, versions
from aisle.console import say, track
from aisle.deploy.server.release import POLL_SECONDS, RELEASE, TRIAL_SECONDS, Release, Status, Watch
from aisle.errors import InputError, ServerError
from aisle.train.core import decisions, multi_label
from aisle.train.core.heads import load_heads

FOLLOW_SECONDS = 600.0  # time limit for all servers to load the new version
EXTRA_SECONDS = 30.0  # a trial with too few requests continues for this time


@dataclass(frozen=True)
class Trial:
    """How a new version is tried before it goes live."""

    shadow_seconds: int = 0  # the new version also classifies live texts; callers never see its answers
    agreement: float = 0.9  # smallest allowed share of compared texts on which both versions agree
    canary: float = 0.0  # share of the requests that the new version answers
    canary_seconds: int = 60
    failures: float = 0.001  # largest allowed share of failed requests in the canary
    requests: int = 20  # with fewer requests, neither comparison nor canary can pass


def deploy(repository: Path, version: int | None, trial: Trial) -> dict[str, Any]:
    """Make a version, by default the newest, live on all servers of the repository.

    Each step starts only after all servers have completed the one before. If no server runs, the next one that starts
    serves the version. `rollback` returns to the previous live version.

    Raises:
        InputError: there is no such version, or its files are damaged.
        ServerError: a server could not load the version, or it failed its trial. The old version keeps serving.
    """
    with _locked(repository):
        return _deploy(repository, latest_version(repository) if version is None else version, trial)


def _deploy(repository: Path, version: int, trial: Trial) -> dict[str, Any]:
    if version not in versions(repository):
        held = ", ".join(map(str, versions(repository))) or "none"
        raise InputError(f"{repository} has no version {version}; it has {held}")
    check_version(repository, version)
    watch = Watch(repository)
    running = watch.settle()
    release = _current(repository, version, running)
    result: dict[str, Any] = {"version": version, "previous": release.live, **_summary(repository, version, running)}
    steady = replace(release, candidate=None, share=0.0, shadow=False)
    if version == release.live:
        if release.candidate is not None:  # a rollout was killed during its trial
            _follow(watch, steady, "ending the trial")
        return {**result, "previous": release.previous, "changed": False}
    _warn_of_lost_decisions(repository, release.live, version)
    _warn_of_lost_attributes(repository, release.live, version)
    _check_trial(repository, release.live, version, trial)
    try:
        release = _follow(watch, replace(steady, candidate=version), "loading")
        if trial.shadow_seconds:
            release = _follow(watch, replace(release, shadow=True), "starting the comparison")
            what = f"comparing version {version} with {steady.live}"
            traffic = _observe(watch, trial.shadow_seconds, what, "shadow_compared", trial.requests)
            result["shadow"] = _judge_shadow(traffic, trial)
        if trial.canary:
            release = _follow(watch, replace(release, shadow=False, share=trial.canary), "starting the canary")
            what = f"version {version} answers {trial.canary:.1%}"
            traffic = _observe(watch, trial.canary_seconds, what, "candidate_requests", trial.requests)
            result["canary"] = _judge_canary(traffic, trial)
        shifted = Release(version, steady.live, revision=release.revision)
        _follow(watch, shifted, "shifting")
    except BaseException:  # including Ctrl-C
        replace(steady, revision=Release.load(repository).revision).save(repository)
        raise
    return {**result, "changed": True}


def _warn_of_lost_decisions(repository: Path, old: int, new: int) -> None:
    """Say if only the old version has decisions: callers who ask for them will be refused."""
    had, has = ((repository / "encoder" / str(version) / decisions.FILE).is_file() for version in (old, new))
    if had and not has:
        say(
            f"version {new} has no decisions, unlike version {old}, and will refuse requests for them; see aisle decide"
        )


def _warn_of_lost_attributes(repository: Path, old: int, new: int) -> None:
    """Say which attributes only the old version has."""
    had, has = ({head.name for head in load_heads(repository / "encoder" / str(version))} for version in (old, new))
    if lost := sorted(had - has):
        refuses = ", and will refuse requests for attributes" if not has else ""
        say(f"version {new} has no attribute {', '.join(lost)}, unlike version {old}{refuses}; see aisle train --also")


def _check_trial(repository: Path, old: int, new: int, trial: Trial) -> None:
    """Refuse a trial that cannot compare the versions, or in which callers would get answers of two kinds.

    Raises:
        InputError: a version is multi-label and there is a shadow, or only one is and there is a canary.
    """
    kinds = {(repository / "encoder" / str(version) / multi_label.FILE).is_file() for version in (old, new)}
    if trial.shadow_seconds and True in kinds:
        raise InputError("--shadow compares one category per text, but a version is multi-label; leave it out")
    if trial.canary and len(kinds) > 1:
        raise InputError("--canary: only one of the versions is multi-label, so callers would get two kinds of answers")


def rollback(repository: Path) -> dict[str, Any]:
    """Make the previous live version live again.

    Raises:
        InputError: there is none, or its files are damaged.
        ServerError: a server could not load it and keeps serving the present version.
    """
    with _locked(repository):
        release = Release.load(repository)
        if release.previous is None:
            raise InputError(
                f"{repository}: nothing was deployed after version {release.live}; there is no version to return to"
            )
        check_version(repository, release.previous)
        watch = Watch(repository)
        running = watch.settle()
        _follow(watch, Release(release.previous, release.live, revision=release.revision), "shifting back")
    return {"version": release.previous, "previous": release.live, **_summary(repository, release.previous, running)}


def check_unlocked(repository: Path) -> None:
    """Make sure, before a long build, that no other rollout is running.

    Raises:
        InputError: one is running, or the repository cannot be written.
    """
    if repository.is_dir():
        with _locked(repository):
            return


@contextmanager
def _locked(repository: Path) -> Iterator[None]:
    """Hold the repository's lock, so that only one rollout runs at a time.

    Raises:
        InputError: another one is running, or the repository does not exist or cannot be written.
    """
    if not repository.is_dir():
        raise InputError(f"{repository} is not a model repository: the folder does not exist; see --repository")
    with ExitStack() as stack:
        try:
            lock = stack.enter_context((repository / ".deploying").open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{repository}: another `aisle deploy` or `aisle rollback` is running") from None
        except OSError as error:
            raise InputError(f"cannot write to {repository}: {error.strerror}") from None
        yield


def _summary(repository: Path, version: int, running: list[Status]) -> dict[str, Any]:
    """Return the part of the result that all rollouts have: the number of servers and the gate of the version."""
    report = read_report(repository, version)
    return {"servers": len(running), "gate": {**report["gate"], "state": gate_state(report), "note": gate_note(report)}}


def _current(repository: Path, version: int, running: list[Status]) -> Release:
    """Return the current release. If nothing was ever deployed, it is the version that a server started with."""
    if (repository / RELEASE).exists():
        return Release.load(repository)
    others = [each for each in versions(repository) if each != version]
    return Release(running[0].live if running else (others or [version])[-1])


def _follow(watch: Watch, release: Release, what: str) -> Release:
    """Write the release, wait until all servers have applied it, and return it.

    Raises:
        ServerError: a server could not apply it, or not within `FOLLOW_SECONDS`.
    """
    release = release.save(watch.repository)
    deadline = time.monotonic() + FOLLOW_SECONDS
    while behind := [status for status in watch.running() if status.revision < release.revision]:
        if time.monotonic() > deadline:
            raise ServerError(
                f"{what}: {behind[0].server} has not applied it within {FOLLOW_SECONDS:.0f} s; see its log"
            )
        time.sleep(POLL_SECONDS)
    _check_servers(watch, what)
    return release


def _check_servers(watch: Watch, what: str) -> None:
    """Raise ServerError for the first server that reports an error."""
    for status in watch.running():
        if status.error:
            raise ServerError(f"{what}: {status.server} cannot serve it: {status.error}")


def _observe(watch: Watch, seconds: int, description: str, counter: str, min_count: int) -> dict[str, Any]:
    """Observe live traffic for `seconds`, or longer while `counter` is below `min_count`; return the summed metrics."""
    for _ in track(range(seconds), description, seconds):
        time.sleep(1)
        _check_servers(watch, description)
    deadline = time.monotonic() + EXTRA_SECONDS
    while total(watch.running()).get(counter, 0) < min_count and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    time.sleep(2 * TRIAL_SECONDS)  # until the servers have reported their last requests
    _check_servers(watch, description)
    return total(watch.running())


def total(statuses: list[Status]) -> dict[str, Any]:
    """Add up the trial metrics of several servers."""
    counts: Counter[str] = Counter()
    changes: Counter[str] = Counter()
    for status in statuses:
        counts.update({key: value for key, value in status.traffic.items() if key != "changes"})
        changes.update(status.traffic.get("changes", {}))
    return {**counts, "changes": dict(changes.most_common(20))}


def _judge_shadow(traffic: dict[str, Any], trial: Trial) -> dict[str, Any]:
    compared, errors = traffic.get("shadow_compared", 0), traffic.get("shadow_errors", 0)
    if errors:
        raise ServerError(f"the new version failed on {errors} of {compared} live texts")
    if compared < trial.requests:
        raise _too_few("comparison", "--shadow", compared, trial)
    agreement = traffic.get("shadow_agreed", 0) / compared
    if agreement < trial.agreement:
        most = next(iter(traffic["changes"].items()), ("", 0))
        raise ServerError(
            f"the new version agrees on {agreement:.2%} of {compared} live texts; {trial.agreement:.2%} are required; "
            f"the most frequent change is {most[0]} ({most[1]} times)"
        )
    return {"compared": compared, "agreement": agreement, "asked": trial.agreement, "changes": traffic["changes"]}


def _judge_canary(traffic: dict[str, Any], trial: Trial) -> dict[str, Any]:
    def mean(version: str) -> float | None:
        requests = traffic.get(f"{version}_requests", 0)
        return round(traffic[f"{version}_seconds"] / requests * 1e3, 2) if requests else None

    requests, failures = traffic.get("candidate_requests", 0), traffic.get("candidate_failures", 0)
    if failures > trial.failures * requests:
        raise ServerError(f"the new version failed on {failures} of its {requests} requests")
    if requests < trial.requests:
        raise _too_few("canary", "--canary-seconds", requests, trial)
    return {
        "share": trial.canary,
        "requests": requests,
        "failures": failures,
        "mean_ms": mean("candidate"),
        "mean_ms_of_live": mean("live"),
    }


def _too_few(what: str, option: str, seen: int, trial: Trial) -> ServerError:
    return ServerError(
        f"the {what} saw only {seen} of the required {trial.requests} live requests; give {option} more seconds, "
        f"lower --trial-requests, or deploy without the {what}"
    )
