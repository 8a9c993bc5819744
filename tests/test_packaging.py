import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent


def test_wheel_holds_only_aisle(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path], cwd=ROOT, check=True, text=True
    )
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"aisle", "aisle_classifier"}
    for needed in (
        "aisle/cli.py",
        "aisle/client/classifier.py",
        "aisle/build/graph.py",
        "aisle/train/synthetic/catalogue.toml",
        "aisle/model_repository/product_classifier/config.pbtxt",
        "aisle/model_repository/encoder/configs/gpu.pbtxt",
    ):
        assert needed in names
    assert not [name for name in names if name.endswith((".pyc", "model.bin", "tokenizer.json"))]


def test_minimal_dependencies() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {dependency.partition(">")[0] for dependency in project["dependencies"]}
    assert names == {"numpy", "tritonclient[grpc]", "typer"}


def test_serving_needs_no_torch_and_no_transformers() -> None:
    """Import everything that the model repository's code imports, without torch and transformers."""
    code = """
import sys
sys.modules["torch"] = sys.modules["transformers"] = None
sys.modules["triton_python_backend_utils"] = type(sys)("stub")
import runpy
for model in ("tokenizer", "encoder"):
    runpy.run_path(f"model_repository/{model}/model.py")
import aisle.deploy.server.triton
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, env=dict(os.environ))


@pytest.mark.parametrize("name", ["serve", "build", "dev"])
def test_lock_files_match_pyproject(name: str) -> None:
    """Each lock file pins the requirements of pyproject.toml, with hashes and without addresses, except torch."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lock = (ROOT / "requirements" / f"{name}.lock").read_text()
    assert "://" not in lock
    pinned = {}
    for entry in re.split(r"\n(?=\S)", lock.strip()):
        requirement, *hashes = entry.split(" \\\n")
        pinned[Requirement(requirement).name] = Requirement(requirement)
        assert hashes
        assert all(each.strip().startswith("--hash=sha256:") for each in hashes)
    wanted = [*project["dependencies"], f"{project['name']}[{name}]"]
    for each in wanted:  # grows by the extras that it names
        requirement = Requirement(each)
        if requirement.name == project["name"]:
            wanted += [more for extra in requirement.extras for more in project["optional-dependencies"][extra]]
        elif requirement.name != "torch":
            (pin,) = pinned[canonicalize_name(requirement.name)].specifier
            assert requirement.specifier.contains(pin.version)
