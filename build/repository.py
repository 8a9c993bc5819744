"""The model repository: list versions, add a version, and verify a version before it is served.

REPOSITORY/MODEL/NUMBER/     the version's files: tokenizer.json, labels.json, report.json, and the engine
REPOSITORY/product_classifier/NUMBER/manifest.json   the list of the version's files; it is written last

A repository holds no code and no configuration. Both come from the installed package, so they are never stale.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aisle
from aisle.errors import InputError
from aisle.preprocess.tables.table import fingerprint

MODELS = ("tokenizer", "encoder", "product_classifier")  # the ensemble comes last
PYTHON_MODELS = MODELS[:2]
TEMPLATE = Path(__file__).parent.parent / "model_repository"  # what Triton runs: code and configuration
MANIFEST = "manifest.json"
LAYOUT = 2  # layout 1 (Aisle 0.1): the manifest holds only digests, and the repository has links to code
REPORT = "encoder/report.json"  # holds measurements, which differ between builds of the same model
REQUIRED_FILES = ("engine.json", "labels.json", "report.json", "tokenizer.json")


def max_batch_size() -> int:
    """Return the largest number of texts in a request and in a packed batch: `max_batch_size` of Triton's encoder."""
    config = (TEMPLATE / "encoder" / "config.pbtxt").read_text("utf-8")
    (found,) = re.findall(r"^max_batch_size: (\d+)$", config, re.M)
    return int(found)


def versions(repository: Path) -> list[int]:
    """Return the complete versions, oldest first. A version is complete if it has a manifest."""
    manifests = (repository / MODELS[-1]).glob(f"[1-9]*/{MANIFEST}")
    return sorted(int(path.parent.name) for path in manifests if _is_number(path.parent.name))


def latest_version(repository: Path) -> int:
    """Return the newest version.

    Raises:
        InputError: there is no version.
    """
    found = versions(repository)
    if not found:
        raise InputError(f"{repository} holds no built version; make one with: aisle build CHECKPOINT")
    return found[-1]


@contextmanager
def new_version(repository: Path) -> Iterator[tuple[int, dict[str, Path]]]:
    """Yield an empty folder for each model; if the block ends without an error, they become the next version.

    Folders are renamed into place, the one with the manifest last. So an incomplete version is never served.

    Raises:
        InputError: the disk is full or the repository cannot be written.
    """
    try:
        for model in MODELS:
            (repository / model).mkdir(parents=True, exist_ok=True)
        taken = (path.name for model in MODELS for path in (repository / model).iterdir())
        number = 1 + max((int(name) for name in taken if _is_number(name)), default=0)
        folders = {model: Path(tempfile.mkdtemp(prefix=".building-", dir=repository / model)) for model in MODELS}
        try:
            yield number, folders
            manifest = {"layout": LAYOUT, "aisle": aisle.__version__, "files": _digests(folders)}
            (folders[MODELS[-1]] / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
            for model, folder in folders.items():
                folder.chmod(0o755)
                folder.rename(repository / model / str(number))
        finally:
            for folder in folders.values():
                shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        raise InputError(f"cannot write to {repository}: {error.strerror or error}") from None


def check_version(repository: Path, version: int) -> dict[str, Path]:
    """Verify that a version is unchanged since its build and passed its gate; return its files by name.

    Raises:
        InputError: a file is missing or changed, or the version is otherwise damaged; the message says which.
    """
    expected = _expected_digests(repository, version)
    models = sorted({*MODELS, *(name.partition("/")[0] for name in expected)})
    try:
        found = _digests({model: repository / model / str(version) for model in models})
    except OSError as error:
        raise InputError(f"version {version} is damaged: {error}; build it again") from None
    for name in sorted({*expected, *found}):
        if expected.get(name) != found.get(name):
            raise InputError(f"version {version} is damaged: {name} changed since the build; build it again")
    parts = (name.split("/", 1) for name in expected)
    files = {name: repository / model / str(version) / name for model, name in parts}
    for name in REQUIRED_FILES:
        if name not in files:
            raise InputError(f"version {version} is damaged: it has no {name}; build it again")
    _check_gate(read_report(repository, version), version)
    return files


def version_fingerprint(repository: Path, version: int) -> str:
    """Return 16 hex digits that tell a version's model from any other: of its files except the report of its build.

    Raises:
        InputError: the version is damaged.
    """
    files = {name: digest for name, digest in _expected_digests(repository, version).items() if name != REPORT}
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:16]


def read_report(repository: Path, version: int) -> dict[str, Any]:
    """Return a version's build report: the engine's measurements and the gate's thresholds.

    Raises:
        InputError: the report is missing or damaged.
    """
    try:
        report: dict[str, Any] = json.loads((repository / "encoder" / str(version) / "report.json").read_text("utf-8"))
        report["gate"]["loosened"], report["agreement"], report["f1_loss"]  # other code reads all three
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"version {version} is damaged: its report cannot be read ({error}); build it again") from None
    return report


def gate_state(report: dict[str, Any]) -> str:
    """Return how a version's engine passed its gate: `passed`, `loosened`, or `elsewhere`.

    `elsewhere`: checked on another device than its target, such as a GPU engine built without a GPU.
    """
    if report["gate"]["loosened"]:
        return "loosened"
    return "passed" if report.get("checked_on") in (None, report.get("target")) else "elsewhere"


def gate_note(report: dict[str, Any]) -> str:
    """Return a note on a version's gate if it was loosened or checked elsewhere, else ""."""
    state = gate_state(report)
    if state == "loosened":
        required, found = report["gate"]["least_agreement"], report["agreement"]
        return f"its gate was loosened: {required:.2%} agreement required, {found:.2%} found"
    if state == "elsewhere":
        return f"its engine was checked on {report['checked_on']}, not on {report['target']}"
    return ""


def leftovers(repository: Path) -> list[str]:
    """Return old code and configuration files in a repository: they differ from the package's and are never read."""
    found = []
    for source in sorted(
        each for name in ("model.py", "*.pbtxt", "configs/*.pbtxt") for each in TEMPLATE.glob(f"*/{name}")
    ):
        name = str(source.relative_to(TEMPLATE))
        own = repository / name
        if own.is_file() and own.read_bytes() != source.read_bytes():
            found.append(name)
    return found


def _expected_digests(repository: Path, version: int) -> dict[str, str]:
    """Return the digests in a manifest. In layout 1, the manifest holds nothing else.

    Raises:
        InputError: the manifest is missing or damaged, or has an unknown layout, of a later Aisle.
    """
    try:
        manifest = json.loads((repository / MODELS[-1] / str(version) / MANIFEST).read_text("utf-8"))
        if manifest.get("layout", LAYOUT) == LAYOUT:
            return dict(manifest["files"] if "layout" in manifest else manifest)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"version {version} is damaged: {error}; build it again") from None
    raise InputError(
        f"version {version} was built by Aisle {manifest.get('aisle')}, but this is Aisle {aisle.__version__}; "
        "install that version of Aisle, or build the model again"
    )


def _check_gate(report: dict[str, Any], version: int) -> None:
    """Verify that the engine passed its gate. A measurement that is NaN never passes.

    Raises:
        InputError: it did not pass.
    """
    gate = report["gate"]
    try:
        agreements = [report["agreement"], *report.get("attributes", {}).values()]
        passed = all(each >= gate["least_agreement"] for each in agreements)
        passed = passed and report["f1_loss"] <= gate["largest_f1_loss"]
    except (KeyError, TypeError, AttributeError):
        passed = False
    if not passed:
        raise InputError(f"version {version} did not pass its gate; build it again")


def _digests(folders: dict[str, Path]) -> dict[str, str]:
    """Return the SHA-256 of a version's files by name, such as "encoder/engine.json"."""
    return {
        f"{model}/{path.relative_to(folder)}": fingerprint(path)
        for model, folder in folders.items()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.is_symlink() and path.name != MANIFEST and path.parent.name != "__pycache__"
    }


def _is_number(name: str) -> bool:
    """Return whether a folder name is a version number, unlike "2.old" or "02"."""
    return name.isascii() and name.isdigit() and not name.startswith("0")
