"""Changing the model that answers, while it answers: build, load, compare, try, shift; and back."""

from __future__ import annotations

import fcntl
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from aisle.build.repository import check_version, latest_version, versions
from aisle.console import track
from aisle.deploy.release import RELEASE, TRIAL_SECONDS, Release, Status, servers
from aisle.errors import InputError, ServerError

FOLLOW_SECONDS = 600.0  # for loading the new version; a server that says nothing for so long is not waited for
POLL_SECONDS = 0.2
PATIENCE_SECONDS = 30.0  # for the first request of a trial


@dataclass(frozen=True)
class Trial:
    """How a new version is tried before it answers everybody."""

    shadow_seconds: int = 0  # it classifies live texts unseen
    agreement: float = 0.9  # least share of those whose category stays the same
    canary: float = 0.0  # share of the requests that it answers
    canary_seconds: int = 60
    failures: float = 0.001  # largest share of these that it may fail


def deploy(repository: Path, version: int | None, trial: Trial) -> dict[str, Any]:
    """Have a version, the newest by default, take over on all servers of the repository, each step only if all can.

    Where no server runs, the next one to start serves it. The version that was live stays for `rollback`.

    Raises:
        InputError: there is no such version, or its files are not what was built.
        ServerError: a server could not load it, or it failed its trial; the old one goes on serving everywhere.
    """
    version = latest_version(repository) if version is None else version
    with _alone(repository):
        return _deploy(repository, version, trial)


def _deploy(repository: Path, version: int, trial: Trial) -> dict[str, Any]:
    if version not in versions(repository):
        raise InputError(f"{repository} holds no version {version}; it has {', '.join(map(str, versions(repository)))}")
    check_version(repository, version)
    release = _current(repository, version)
    result: dict[str, Any] = {"version": version, "previous": release.live, "servers": len(servers(repository))}
    if version == release.live:
        return {**result, "previous": release.previous, "changed": False}
    steady = replace(release, candidate=None, share=0.0, shadow=False)
    try:
        release = _follow(repository, replace(steady, candidate=version), "loading")
        if trial.shadow_seconds:
            release = _follow(repository, replace(release, shadow=True), "starting the comparison")
            traffic = _observe(
                repository, trial.shadow_seconds, f"comparing version {version} with {steady.live}", "shadow_compared"
            )
            result["shadow"] = _judge_shadow(traffic, trial)
        if trial.canary:
            release = _follow(repository, replace(release, shadow=False, share=trial.canary), "starting the canary")
            traffic = _observe(
                repository, trial.canary_seconds, f"version {version} answers {trial.canary:.1%}", "candidate_requests"
            )
            result["canary"] = _judge_canary(traffic, trial)
        shifted = Release(version, steady.live, revision=release.revision)
        _follow(repository, shifted, "shifting")
    except BaseException:  # stopped by hand as well
        replace(steady, revision=Release.load(repository).revision).save(repository)
        raise
    return {**result, "changed": True}


def rollback(repository: Path) -> dict[str, Any]:
    """Have the version before the live one answer again.

    Raises:
        InputError: there is none, or its files are not what was built.
        ServerError: a server could not load it; the live one goes on serving there.
    """
    with _alone(repository):
        release = Release.load(repository)
        if release.previous is None:
            raise InputError(f"{repository}: nothing was deployed after version {release.live}; there is no way back")
        check_version(repository, release.previous)
        _follow(repository, Release(release.previous, release.live, revision=release.revision), "shifting back")
    return {"version": release.previous, "previous": release.live, "servers": len(servers(repository))}


@contextmanager
def _alone(repository: Path) -> Iterator[None]:
    """Make sure that only one change of models is under way.

    Raises:
        InputError: another one is, or the repository cannot be written.
    """
    try:
        with (repository / ".deploying").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
    except BlockingIOError:
        raise InputError(f"{repository}: another `aisle deploy` or `aisle rollback` is under way") from None
    except PermissionError as error:
        raise InputError(f"cannot write to {repository}: {error.strerror}") from None


def _current(repository: Path, version: int) -> Release:
    """Return what is served now: where nothing was ever deployed, the version that a server was started with."""
    if (repository / RELEASE).exists():
        return Release.load(repository)
    running, others = servers(repository), [each for each in versions(repository) if each != version]
    return Release(running[0].live if running else (others or [version])[-1])


def _follow(repository: Path, release: Release, what: str) -> Release:
    """Make this the release and wait until all servers have followed.

    Raises:
        ServerError: one could not, or none of them says how far it is.
    """
    release = release.save(repository)
    deadline = time.monotonic() + FOLLOW_SECONDS
    while behind := [each for each in servers(repository) if each.revision < release.revision]:
        if time.monotonic() > deadline:
            raise ServerError(f"{what}: {behind[0].server} has not followed within {FOLLOW_SECONDS:.0f} s; see its log")
        time.sleep(POLL_SECONDS)
    _check_servers(repository, what)
    return release


def _check_servers(repository: Path, what: str) -> None:
    for each in servers(repository):
        if each.error:
            raise ServerError(f"{what}: {each.server} cannot serve it: {each.error}")


def _observe(repository: Path, seconds: int, description: str, wanted: str) -> dict[str, Any]:
    """Let live traffic flow for some seconds, for longer while none of it is `wanted`; return what all servers saw."""
    for _ in track(range(seconds), description, seconds):
        time.sleep(1)
        _check_servers(repository, description)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not total(servers(repository)).get(wanted) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    time.sleep(2 * TRIAL_SECONDS)  # what was seen last must be reported too
    _check_servers(repository, description)
    return total(servers(repository))


def total(statuses: list[Status]) -> dict[str, Any]:
    """Add up the figures of several servers' candidates."""
    counts: Counter[str] = Counter()
    changes: Counter[str] = Counter()
    for each in statuses:
        counts.update({key: value for key, value in each.traffic.items() if key != "changes"})
        changes.update(each.traffic.get("changes", {}))
    return {**counts, "changes": dict(changes.most_common(20))}


def _judge_shadow(traffic: dict[str, Any], trial: Trial) -> dict[str, Any]:
    compared, errors = traffic.get("shadow_compared", 0), traffic.get("shadow_errors", 0)
    if not compared:
        raise ServerError("no live text came by to compare on; give --shadow more seconds, or deploy without it")
    agreement = traffic.get("shadow_agreed", 0) / compared
    if errors:
        raise ServerError(f"the new version failed on {errors} of {compared} live texts")
    if agreement < trial.agreement:
        most = next(iter(traffic["changes"].items()), ("", 0))
        raise ServerError(
            f"the new version agrees on {agreement:.2%} of {compared} live texts; {trial.agreement:.2%} are asked; "
            f"most often {most[0]} ({most[1]} times)"
        )
    return {"compared": compared, "agreement": agreement, "asked": trial.agreement, "changes": traffic["changes"]}


def _judge_canary(traffic: dict[str, Any], trial: Trial) -> dict[str, Any]:
    def mean(who: str) -> float | None:
        requests = traffic.get(f"{who}_requests", 0)
        return round(traffic[f"{who}_seconds"] / requests * 1e3, 2) if requests else None

    requests, failures = traffic.get("candidate_requests", 0), traffic.get("candidate_failures", 0)
    if failures > trial.failures * requests:
        raise ServerError(f"the new version failed {failures} of the {requests} requests that it was given")
    return {
        "share": trial.canary,
        "requests": requests,
        "failures": failures,
        "mean_ms": mean("candidate"),
        "mean_ms_of_live": mean("live"),
    }
