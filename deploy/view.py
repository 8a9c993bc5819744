"""What Triton sees of a model repository: the versions that a release needs, each ensemble bound to its own steps.

Triton has one configuration for all versions of a model, so an ensemble of the repository can only ask for the latest
version of its steps; while a new version is loading, step by step, that would answer with a mixture. Here each ensemble
names one version of all its steps. Changing models is then: load the steps of the new version beside the old, then
replace the ensemble, which Triton does at once and without losing a request. The repository itself is only read.
"""

from __future__ import annotations

import os
import py_compile
import re
import shutil
from pathlib import Path

from aisle.build.repository import PYTHON_MODELS, check_version
from aisle.deploy.release import Release
from aisle.errors import InputError

ENSEMBLE = "product_classifier"
ROUTER = Path(__file__).with_name("router.py")


def ensemble_of(version: int) -> str:
    """Return the name under which a version can be asked whatever the live one is."""
    return f"{ENSEMBLE}_v{version}"


class View:
    """A folder of links, made for one server."""

    def __init__(self, repository: Path, folder: Path, config_name: str) -> None:
        """Lay out the steps, without versions.

        Args:
            config_name: picks MODEL/configs/NAME.pbtxt of the repository, where there is one.
        """
        self._repository = repository
        self._config_name = config_name
        self.folder = folder
        for model in PYTHON_MODELS:
            (folder / model).mkdir(parents=True)
            self._configure(model, self._config(model) + "\nversion_policy { all { } }\n")

    def show(self, version: int) -> None:
        """Add a version of all steps.

        Raises:
            InputError: it is damaged.
        """
        check_version(self._repository, version)
        for model in PYTHON_MODELS:
            target = self.folder / model / str(version)
            if target.exists():
                continue
            target.mkdir()
            for path in (self._repository / model / str(version)).iterdir():
                if path.name != "__pycache__":
                    (target / path.name).symlink_to(path)
            # Python would write this later, and Triton take the folder's new time for a change of the model.
            py_compile.compile(str(target / "model.py"), doraise=True)

    def hide(self, version: int) -> None:
        for model in PYTHON_MODELS:
            shutil.rmtree(self.folder / model / str(version), ignore_errors=True)

    def has(self, model: str, version: int) -> bool:
        return (self.folder / model / str(version)).exists()

    def versions(self) -> set[int]:
        return {int(path.name) for path in (self.folder / PYTHON_MODELS[0]).glob("[0-9]*")}

    def touch(self, model: str, version: int) -> None:
        """Have Triton load this version anew the next time that the model is loaded."""
        os.utime(self.folder / model / str(version))

    def bind(self, version: int, name: str = ENSEMBLE) -> None:
        """Make an ensemble whose steps are all of one version.

        Raises:
            InputError: the repository's own ensemble was bound by hand.
        """
        config, count = re.subn(r"model_version:\s*-1", f"model_version: {version}", self._config(ENSEMBLE))
        if count != len(PYTHON_MODELS):
            raise InputError(f"{self._repository}/{ENSEMBLE}/config.pbtxt: each step's model_version must be -1")
        self._only_version(name, version)
        (self.folder / name / str(version) / "model.py").unlink(missing_ok=True)  # of the router
        self._configure(name, config.replace(f'"{ENSEMBLE}"', f'"{name}"'))

    def route(self, release: Release, tap: Path) -> None:
        """Put a router in the ensemble's place, which shares the requests out between two versions."""
        config = self._config(ENSEMBLE)
        interface = config[config.index("max_batch_size") : config.index("ensemble_scheduling")].rstrip()
        version = '  { name: "version" data_type: TYPE_INT32 dims: [ 1 ] }\n]'
        parameters = {
            "live": ensemble_of(release.live),
            "candidate": ensemble_of(release.candidate or release.live),
            "share": str(release.share),
            "shadow": str(int(release.shadow)),
            "tap": str(tap),
        }
        lines = [
            f'name: "{ENSEMBLE}"\nbackend: "python"',
            interface[: interface.rindex("]")].rstrip() + ",\n" + version,
            "instance_group [ { count: 1 kind: KIND_CPU } ]\ndynamic_batching { }",
            *(
                f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}'
                for key, value in parameters.items()
            ),
        ]
        self._only_version(ENSEMBLE, release.live)
        shutil.copyfile(ROUTER, self.folder / ENSEMBLE / str(release.live) / "model.py")
        self._configure(ENSEMBLE, "\n".join(lines) + "\n")

    def remove(self, name: str) -> None:
        shutil.rmtree(self.folder / name, ignore_errors=True)

    def _only_version(self, name: str, version: int) -> None:
        """Leave an ensemble one folder of a version, which has Triton name it in every answer."""
        folder = self.folder / name
        (folder / str(version)).mkdir(parents=True, exist_ok=True)
        for other in folder.glob("[0-9]*"):
            if other.name != str(version):
                shutil.rmtree(other)

    def _config(self, model: str) -> str:
        named = self._repository / model / "configs" / f"{self._config_name}.pbtxt"
        path = named if self._config_name and named.exists() else self._repository / model / "config.pbtxt"
        return path.read_text("utf-8")

    def _configure(self, model: str, config: str) -> None:
        beside = self.folder / model / ".config"
        beside.write_text(config, "utf-8")
        beside.replace(self.folder / model / "config.pbtxt")
