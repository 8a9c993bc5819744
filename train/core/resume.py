"""The hidden folder beside an output. It keeps the state of a run, so that a run that was killed can resume."""

from __future__ import annotations

import fcntl
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from aisle.console import say
from aisle.errors import InputError
from aisle.files import write_json
from aisle.preprocess.tables.table import fingerprint
from aisle.train.core.checkpoint import code_fingerprint
from aisle.train.core.processes import Processes
from aisle.train.core.settings import TrainingSettings

STATE = "state.pt"


def identity(settings: TrainingSettings, made_from: Any, world: Processes) -> dict[str, Any]:
    """Return a run's configuration by name. A run resumes only from the state of a run with the same configuration."""
    return {
        **{name.replace("_", " "): value for name, value in asdict(settings).items()},
        "model files": {} if settings.from_scratch else _folder_fingerprint(Path(settings.model)),
        "data": made_from,
        "code": code_fingerprint(),
        "number of processes": world.count,
        "torch": torch.__version__,
    }


def _folder_fingerprint(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file in a local model's folder; nothing for a model from the hub."""
    return {path.name: fingerprint(path) for path in sorted(folder.glob("*")) if path.is_file()}


def check_replaceable(out: Path, mark: str, overwrite: bool) -> None:
    """Check that `out` may be written: it is missing, is empty, or is an earlier result and `overwrite` is set.

    Raises:
        InputError: `out` holds something else, or an earlier result without `overwrite`.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / mark).is_file():
        raise InputError(f"{out} exists and is not a checkpoint; choose another folder")
    if not overwrite:
        raise InputError(f"{out} holds a checkpoint; replace it with --overwrite, or choose another folder")


def folder_beside(out: Path) -> Path:
    """Return the hidden folder of a run that writes `out`."""
    out = out.absolute()
    return out.with_name(f".{out.name}.partial")


@contextmanager
def working_folder(
    out: Path, config: dict[str, Any], *, is_main: bool = True, kept: Sequence[str] = (STATE,)
) -> Iterator[Path]:
    """Yield the folder `.OUT.partial`; it is removed at the end, unless an error left a file worth keeping.

    `config` is the run's `identity`. The state of a run with another configuration is deleted, and a message names the
    differences. If several processes train together, only the main one uses this folder; the others get temporary
    folders.

    Args:
        kept: the names of the files that are worth keeping.

    Raises:
        InputError: the folder cannot be written, or another run is using it.
    """
    if not is_main:
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch)
        return
    folder = folder_beside(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("w")
    except OSError as error:
        raise InputError(f"cannot write to {folder.parent}: {error.strerror}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another run is writing {out}; wait for it or choose another folder") from None
        _empty_unless(folder, config, kept)
        write_json(folder / "run.json", config)
        try:
            yield folder
        except BaseException:
            if not _holds(folder, kept):
                shutil.rmtree(folder)
            raise
        shutil.rmtree(folder)


def _holds(folder: Path, names: Iterable[str]) -> bool:
    """Return whether a folder or one below it holds a file of one of the names."""
    return any(True for name in names for _ in folder.rglob(name))


def _empty_unless(folder: Path, config: dict[str, Any], kept: Sequence[str]) -> None:
    """Delete the state of a run with another configuration."""
    if not (folder / "run.json").is_file():
        return
    try:
        before = json.loads((folder / "run.json").read_text("utf-8"))
        differing = [key for key in config if before.get(key) != json.loads(json.dumps(config[key]))]
    except ValueError:
        differing = ["run.json"]
    if not differing:
        return
    if _holds(folder, kept):
        say(f"starting from the beginning: the run stopped in {folder} differs in {', '.join(differing)}")
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "lock":
            path.unlink()


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a training state atomically."""
    temporary = path.with_suffix(".part")
    torch.save(state, temporary)
    temporary.replace(path)


def load_state(path: Path) -> dict[str, Any] | None:
    """Read a training state of tensors, numbers and strings; None if it is missing or damaged."""
    if not path.is_file():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises errors of many types
        say(f"starting from the beginning: {path} cannot be read: {str(error).splitlines()[0]}")
        return None
    return state
