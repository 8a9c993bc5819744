"""Apply a release to a running Triton: load the new version, warm it up, and switch over. No request is lost."""

from __future__ import annotations

import contextlib
import time

from aisle.build.repository import PYTHON_MODELS
from aisle.deploy.server.admin import Admin
from aisle.deploy.server.processes import step_processes
from aisle.deploy.server.release import Release
from aisle.deploy.server.served_repository import ENSEMBLES, ROUTED, ensemble_of, ensembles_of
from aisle.deploy.server.triton import Triton
from aisle.errors import ServerError

ROUTER_SECONDS = 60.0
WARM_UP = [["warm-up"], ["红富士苹果 5斤装 " * 40] * 64]  # one short text, and the largest batch
WARM_UP_SECONDS = 300.0  # enough for the largest batch on a slow machine under load


def apply_release(triton: Triton, before: Release, after: Release) -> None:
    """Switch Triton from one release to another. Requests are answered meanwhile, each by a single version.

    Raises:
        Exception: the new version cannot be served, for any reason. Triton keeps serving `before`.
    """
    try:
        _load_steps(triton, before, after)
        _load_ensembles(triton, before, after)
        _install(triton, after)
    except Exception:
        with contextlib.suppress(Exception):
            for version in triton.served.versions() - before.versions():
                triton.served.remove_version(version)  # first, because Triton tries again to load failed versions
            _install(triton, before)
            _clean_up(triton, before)
        raise
    if not after.routed:
        _wait_for_router(triton.process.pid)
    _clean_up(triton, after)


def _load_steps(triton: Triton, before: Release, after: Release) -> None:
    """Load the tokenizer and the encoder of each new version beside the old ones."""
    for version in after.versions() - before.versions():
        triton.served.add_version(version)
    for model in PYTHON_MODELS:
        triton.admin.load(model)


def _load_ensembles(triton: Triton, before: Release, after: Release) -> None:
    """Load the ensembles of each version that needs its own, and warm up the new version."""
    new = after.candidate if after.candidate is not None else after.live
    if not after.routed and new == before.live:
        return
    for version in {after.live, new}:
        for ensemble in ROUTED:
            triton.admin.load(triton.served.write_ensemble(ensemble, version, live=False))
    _warm_up(triton.admin, ensemble_of(new))


def _install(triton: Triton, release: Release) -> None:
    """Replace the models that callers use: by routers while a candidate gets traffic, else by the live ensembles.

    Embeddings always come from the live version.
    """
    for ensemble in ENSEMBLES:
        if release.routed and ensemble in ROUTED:
            triton.served.write_router(ensemble, release, triton.trial_socket)
        else:
            triton.served.write_ensemble(ensemble, release.live)
        triton.admin.load(ensemble)


def _wait_for_router(triton: int) -> None:
    """Wait until replaced routers have answered their last request, which needs the models that `_clean_up` unloads."""
    deadline = time.monotonic() + ROUTER_SECONDS
    while any(model in ROUTED for model, _ in step_processes(triton).values()) and time.monotonic() < deadline:
        time.sleep(0.05)


def _clean_up(triton: Triton, release: Release) -> None:
    """Unload the models that a release does not need. Triton first completes their requests."""
    needed = {name for version in release.versions() if release.routed for name in ensembles_of(version)}
    loaded = {path.name for ensemble in ENSEMBLES for path in triton.served.folder.glob(f"{ensemble}_v*")}
    for name in loaded - needed:
        triton.admin.unload(name)
        triton.served.remove_ensemble(name)
    for version in triton.served.versions() - release.versions():
        triton.served.remove_version(version)
    for model in PYTHON_MODELS:
        triton.admin.load(model)


def _warm_up(admin: Admin, model: str) -> None:
    """Send a version its first requests before callers do.

    Raises:
        ServerError: it does not answer them.
    """
    for texts in WARM_UP:
        if len(admin.classify(model, texts, WARM_UP_SECONDS)) != len(texts):
            raise ServerError(f"{model} does not answer every text")
