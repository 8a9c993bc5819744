"""The hidden folder beside a result, where a run that was killed left what it had; the same run goes on from there."""

from __future__ import annotations

import fcntl
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from aisle.console import say
from aisle.errors import InputError
from aisle.files import write_json
from aisle.preprocess.table import fingerprint
from aisle.train.checkpoint import code_fingerprint
from aisle.train.processes import Processes
from aisle.train.settings import Settings

STATE = "state.pt"


def identity(settings: Settings, made_from: Any, team: Processes) -> dict[str, Any]:
    """Return what a run is told, by name: a run goes on from the state of one that was told the same."""
    return {
        **{name.replace("_", " "): value for name, value in asdict(settings).items()},
        "model files": {} if settings.from_scratch else _folder_fingerprint(Path(settings.model)),
        "data": made_from,
        "code": code_fingerprint(),
        "number of processes": team.count,
        "torch": torch.__version__,
    }


def _folder_fingerprint(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file in a local model's folder; none for a model of the hub."""
    return {path.name: fingerprint(path) for path in sorted(folder.glob("*")) if path.is_file()}


def check_replaceable(out: Path, mark: str) -> None:
    """Refuse to replace anything but a folder that an earlier run made.

    Raises:
        InputError: `out` is something else.
    """
    if out.exists() and not (out / mark).is_file() and (out.is_file() or any(out.iterdir())):
        raise InputError(f"{out} exists and is no checkpoint; choose another folder")


@contextmanager
def working_folder(out: Path, told: dict[str, Any], *, first: bool = True) -> Iterator[Path]:
    """Yield the folder `.OUT.partial`; it is removed at the end, unless an error left a state worth keeping.

    `told` is its `identity`. What another run left there is thrown away, and a line says what differs.
    All but the first of several processes get a temporary folder of their own.

    Raises:
        InputError: the folder cannot be written, or another run is at work in it.
    """
    if not first:
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch)
        return
    out = out.absolute()
    folder = out.with_name(f".{out.name}.partial")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("w")
    except OSError as error:
        raise InputError(f"cannot write to {out.parent}: {error.strerror}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another run is writing {out}; wait for it or choose another folder") from None
        _empty_unless(folder, told)
        write_json(folder / "run.json", told)
        try:
            yield folder
        except BaseException:
            if not any(folder.rglob(STATE)):
                shutil.rmtree(folder)
            raise
        shutil.rmtree(folder)


def _empty_unless(folder: Path, told: dict[str, Any]) -> None:
    """Remove what a run that was told otherwise left in the folder."""
    if not (folder / "run.json").is_file():
        return
    try:
        before = json.loads((folder / "run.json").read_text("utf-8"))
        differing = [key for key in told if before.get(key) != json.loads(json.dumps(told[key]))]
    except ValueError:
        differing = ["run.json"]
    if not differing:
        return
    if any(folder.rglob(STATE)):
        say(f"starting anew: the run stopped in {folder} differs in {', '.join(differing)}")
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "lock":
            path.unlink()


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a training state, whole or not at all."""
    beside = path.with_suffix(".part")
    torch.save(state, beside)
    beside.replace(path)


def load_state(path: Path) -> dict[str, Any] | None:
    """Read a training state: tensors, numbers and strings only. None if there is none, or if it is damaged."""
    if not path.is_file():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds
        say(f"starting anew: {path} cannot be read: {str(error).splitlines()[0]}")
        return None
    return state


def put_in_place(folder: Path, out: Path) -> None:
    """Move `folder` to `out`; an older one there goes first."""
    if out.exists():
        shutil.rmtree(out)
    folder.rename(out)
