"""The model repository: which versions it holds, and how a new one gets in."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from aisle.errors import InputError
from aisle.preprocess.table import fingerprint

MODELS = ("tokenizer", "encoder", "labeler", "product_classifier")  # the ensemble comes last
PYTHON_MODELS = MODELS[:3]
TEMPLATE = Path(__file__).parent.parent / "model_repository"
MANIFEST = "manifest.json"  # of the ensemble's version: the SHA-256 of every file that belongs to the version


def versions(repository: Path) -> list[int]:
    """Return the complete versions, oldest first: those that every model has."""
    each = [{int(p.name) for p in (repository / model).glob("[0-9]*") if p.name.isdigit()} for model in MODELS]
    return sorted(set.intersection(*each))


def latest_version(repository: Path) -> int:
    """Return the version that Triton serves.

    Raises:
        InputError: there is none.
    """
    found = versions(repository)
    if not found:
        raise InputError(f"{repository} holds no built version; make one with: aisle build CHECKPOINT")
    return found[-1]


@contextmanager
def new_version(repository: Path) -> Iterator[tuple[int, dict[str, Path]]]:
    """Give an empty folder for each model; on leaving without an error, they become the next version.

    Files are written beside and renamed, the ensemble's last, so that no half-written version is ever served.
    A repository that is not there yet is laid out first.

    Raises:
        InputError: the disk is full or the repository cannot be written.
    """
    try:
        _lay_out(repository)
        number = 1 + max((int(p.name) for m in MODELS for p in (repository / m).glob("[0-9]*")), default=0)
        folders = {model: Path(tempfile.mkdtemp(prefix=".building-", dir=repository / model)) for model in MODELS}
        try:
            for model in PYTHON_MODELS:  # Triton looks for the code in the version's folder
                (folders[model] / "model.py").symlink_to("../model.py")
            yield number, folders
            (folders["product_classifier"] / MANIFEST).write_text(json.dumps(_digests(folders), indent=2) + "\n")
            for model, folder in folders.items():
                folder.chmod(0o755)
                folder.rename(repository / model / str(number))
        finally:
            for folder in folders.values():
                shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        raise InputError(f"cannot write to {repository}: {error.strerror or error}") from None


def check_version(repository: Path, version: int) -> None:
    """Make sure that the files of a version are those that the build wrote.

    Raises:
        InputError: naming the file that is missing or not what it was.
    """
    folders = {model: repository / model / str(version) for model in MODELS}
    try:
        expected, found = json.loads((folders["product_classifier"] / MANIFEST).read_text()), _digests(folders)
    except (OSError, ValueError) as error:
        raise InputError(f"version {version} is damaged: {error}; build it again") from None
    for name in sorted({*expected, *found}):
        if expected.get(name) != found.get(name):
            raise InputError(f"version {version} is damaged: {name} is not what was built; build it again")


def _digests(folders: dict[str, Path]) -> dict[str, str]:
    """Return the SHA-256 of the files of a version, as "encoder/engine.json": "…"."""
    return {
        f"{model}/{path.name}": fingerprint(path)
        for model, folder in folders.items()
        for path in sorted(folder.iterdir())
        if path.is_file() and not path.is_symlink() and path.name != MANIFEST
    }


def _lay_out(repository: Path) -> None:
    """Copy what every repository holds besides its versions: configurations and code, where they are not there yet."""
    for pattern in ("*/config.pbtxt", "*/configs/*.pbtxt", "*/model.py"):
        for source in TEMPLATE.glob(pattern):
            target = repository / source.relative_to(TEMPLATE)
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)
