"""The model repository that Triton reads: the package's code and configuration, with the versions that a release needs.

Triton has one configuration for all versions of a model. So a normal ensemble uses the latest version of each step, and
would mix two versions while a new one is loaded step by step. Here each ensemble names the same version for all its
steps. A change of models loads the new steps beside the old ones and then replaces the ensemble, which Triton does
without losing a request. Of the user's repository, only the files in the manifest are read, and nothing is written.
"""

from __future__ import annotations

import json
import os
import py_compile
import re
import shutil
from pathlib import Path

from aisle.build.repository import PYTHON_MODELS, TEMPLATE, check_version, version_fingerprint
from aisle.deploy.server.instances import Tokenizers, cores, encoders, gpus, with_instances
from aisle.deploy.server.release import Release
from aisle.errors import InputError
from aisle.preprocess import fields
from aisle.train.core import decisions, heads, multi_label

ENSEMBLE = "product_classifier"
# Over the same steps; the second one also returns decisions, and the third one also attributes.
ROUTED = (ENSEMBLE, "product_decisions", "product_attributes")
ENSEMBLES = (*ROUTED, "product_embeddings")  # the last one always runs the live version
ROUTER = Path(__file__).parents[1] / "serving" / "router.py"


def ensemble_of(version: int, ensemble: str = ENSEMBLE) -> str:
    """Return the name of the ensemble that always runs this version, whether it is live or not."""
    return f"{ensemble}_v{version}"


def ensembles_of(version: int) -> list[str]:
    """Return the names of the ensembles that always run this version."""
    return [ensemble_of(version, ensemble) for ensemble in ROUTED]


class ServedRepository:
    """A folder with links to the versions, and with the steps' configuration, for one server."""

    def __init__(self, repository: Path, folder: Path, config_name: str) -> None:
        """Create the steps, without versions.

        Args:
            config_name: selects MODEL/configs/NAME.pbtxt of the package or, if it has none, of the repository.

        Raises:
            InputError: no model has a configuration of this name.
        """
        self._repository = repository
        self._config_name = config_name
        self.folder = folder
        self._about: dict[int, dict[str, str]] = {}  # the parameters that describe each version that was added
        if config_name and not any(self._named_config(model) for model in (*PYTHON_MODELS, *ENSEMBLES)):
            own = {path.stem for root in (TEMPLATE, repository) for path in root.glob("*/configs/*.pbtxt")}
            raise InputError(f"no model has a configuration {config_name!r}; there is {', '.join(sorted(own))}")
        # None if a named configuration sets the number of processes.
        self.tokenizers = None if self._named_config("tokenizer") else Tokenizers.choose(config_name, cores())
        self.encoders = encoders(cores(), gpus()) if config_name == "gpu" else None  # on each GPU
        counts = {"tokenizer": self.tokenizers and self.tokenizers.processes, "encoder": self.encoders}
        for model in PYTHON_MODELS:
            (folder / model).mkdir(parents=True)
            config = self._config(model)
            if count := counts.get(model):
                config = with_instances(config, count)
            self._configure(model, config + "\nversion_policy { all { } }\n")

    def describe(self) -> str:
        """Return which numbers of processes were chosen, for people."""
        found = []
        if self.encoders:
            found.append(f"{self.encoders} encoder process{'es' if self.encoders > 1 else ''} per GPU")
        if self.tokenizers:
            found.append(self.tokenizers.describe())
        return "".join(f", {each}" for each in found)

    def add_version(self, version: int) -> None:
        """Add a version to all steps.

        Raises:
            InputError: the version or a step's code is damaged.
        """
        files = check_version(self._repository, version)
        self._about[version] = {
            f"fingerprint_{version}": version_fingerprint(self._repository, version),
            f"categories_{version}": str(len(json.loads(files["labels.json"].read_text("utf-8")))),
            **({f"decisions_{version}": "1"} if decisions.FILE in files else {}),
            **({f"multi_label_{version}": "1"} if multi_label.FILE in files else {}),
            **({f"attributes_{version}": _attributes(files[heads.FILE])} if heads.FILE in files else {}),
            **({f"fields_{version}": files[fields.FILE].read_text("utf-8")} if fields.FILE in files else {}),
        }
        for model in PYTHON_MODELS:
            target = self.folder / model / str(version)
            if target.exists():
                continue
            # Each step sees all files of the version, from every folder of the repository.
            for name, path in {**files, "model.py": TEMPLATE / model / "model.py"}.items():
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                (target / name).symlink_to(path)
            # If Python compiled it later, Triton would take the folder's new mtime for a change of the model.
            try:
                py_compile.compile(str(target / "model.py"), doraise=True)
            except py_compile.PyCompileError as error:
                raise InputError(f"{TEMPLATE / model / 'model.py'} is damaged: {error}; install Aisle again") from None

    def check_version(self, version: int) -> None:
        """Verify a version's files against its manifest.

        Raises:
            InputError: the version is damaged.
        """
        check_version(self._repository, version)

    def remove_version(self, version: int) -> None:
        """Remove a version from all steps."""
        for model in PYTHON_MODELS:
            shutil.rmtree(self.folder / model / str(version), ignore_errors=True)

    def has_version(self, model: str, version: int) -> bool:
        return (self.folder / model / str(version)).exists()

    def versions(self) -> set[int]:
        return {int(path.name) for path in (self.folder / PYTHON_MODELS[0]).glob("[0-9]*")}

    def mark_changed(self, model: str, version: int) -> None:
        """Make Triton reload this version when the model is next loaded."""
        os.utime(self.folder / model / str(version))

    def write_ensemble(self, ensemble: str, version: int, *, live: bool = True) -> str:
        """Write an ensemble with the same version of all steps, and return its name.

        Load it before the other ensemble is written: if a step is reloaded in between, Triton makes an ensemble of the
        old configuration with the new folder's version.

        Args:
            live: under the name that callers use; otherwise under that of `ensemble_of`.

        Raises:
            InputError: the named configuration of the ensemble sets a model_version itself.
        """
        name = ensemble if live else ensemble_of(version, ensemble)
        config, count = re.subn(r"model_version:\s*-1", f"model_version: {version}", self._config(ensemble))
        if count != len(PYTHON_MODELS):
            raise InputError(f"{ensemble}/configs/{self._config_name}.pbtxt: each step's model_version must be -1")
        self._keep_one_version(name, version)
        (self.folder / name / str(version) / "model.py").unlink(missing_ok=True)  # the code of an earlier router
        config = config.replace(f'"{ensemble}"', f'"{name}"')
        self._configure(name, "\n".join([config.rstrip(), *_parameters(self._parameters_of({version}))]) + "\n")
        return name

    def write_router(self, ensemble: str, release: Release, trial_socket: Path) -> None:
        """Replace an ensemble with a router, which divides the requests between the live version and the candidate.

        Args:
            trial_socket: Unix datagram socket to which the router sends its metrics.
        """
        config = self._config(ensemble)
        interface = config[config.index("max_batch_size") : config.index("ensemble_scheduling")].rstrip()
        version = '  { name: "version" data_type: TYPE_INT32 dims: [ 1 ] }\n]'
        parameters = {
            "live": ensemble_of(release.live, ensemble),
            "candidate": ensemble_of(release.candidate or release.live, ensemble),
            "share": str(release.share),
            "shadow": str(int(release.shadow)),
            "trial_socket": str(trial_socket),
            **self._parameters_of(release.versions()),
        }
        lines = [
            f'name: "{ensemble}"\nbackend: "python"',
            interface[: interface.rindex("]")].rstrip() + ",\n" + version,
            "instance_group [ { count: 1 kind: KIND_CPU } ]\ndynamic_batching { }",
            *_parameters(parameters),
        ]
        self._keep_one_version(ensemble, release.live)
        shutil.copyfile(ROUTER, self.folder / ensemble / str(release.live) / "model.py")
        self._configure(ensemble, "\n".join(lines) + "\n")

    def _parameters_of(self, versions: set[int]) -> dict[str, str]:
        """Return what clients can ask about the versions: which model each is, its categories, and whether it decides.

        Two repositories may number different models alike.
        """
        known = (self._about[version] for version in sorted(versions & self._about.keys()))
        return {name: value for each in known for name, value in each.items()}

    def remove_ensemble(self, name: str) -> None:
        shutil.rmtree(self.folder / name, ignore_errors=True)

    def _keep_one_version(self, name: str, version: int) -> None:
        """Leave an ensemble exactly one version folder: Triton returns its number with every answer."""
        folder = self.folder / name
        (folder / str(version)).mkdir(parents=True, exist_ok=True)
        for other in folder.glob("[0-9]*"):
            if other.name != str(version):
                shutil.rmtree(other)

    def _config(self, model: str) -> str:
        return (self._named_config(model) or TEMPLATE / model / "config.pbtxt").read_text("utf-8")

    def _named_config(self, model: str) -> Path | None:
        """Return the path of a model's configuration with the given name, or None. The package takes precedence."""
        places = (root / model / "configs" / f"{self._config_name}.pbtxt" for root in (TEMPLATE, self._repository))
        return next((path for path in places if self._config_name and path.is_file()), None)

    def _configure(self, model: str, config: str) -> None:
        beside = self.folder / model / ".config"
        beside.write_text(config, "utf-8")
        beside.replace(self.folder / model / "config.pbtxt")


def _attributes(file: Path) -> str:
    """Return the names of a version's attributes as JSON."""
    return json.dumps([head.name for head in heads.load_heads(file.parent)], ensure_ascii=False)


def _parameters(values: dict[str, str]) -> list[str]:
    """Return the lines of a model's configuration that set parameters."""
    quoted = {key: json.dumps(value, ensure_ascii=False) for key, value in values.items()}  # a string of pbtxt, too
    return [f'parameters {{ key: "{key}" value {{ string_value: {value} }} }}' for key, value in quoted.items()]
