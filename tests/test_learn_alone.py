"""The learning half in its own environment, with the newest numpy and without the serving half.

`make test` creates this environment, .venv-learn, once, and again when pyproject.toml changes.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PYTHON = ROOT / ".venv-learn" / "bin" / "python"

SMOKE = """
import sys
from importlib.metadata import distributions

names = {each.metadata["Name"].lower() for each in distributions()}
assert not names & {"nvidia-pytriton", "openvino", "onnx", "locust"}, names
import numpy
assert int(numpy.__version__.split(".")[0]) >= 2, numpy.__version__

from aisle.cli import run

def aisle(*arguments):
    print("$ aisle", *arguments, file=sys.stderr)
    assert run(arguments) == 0, arguments

small = ("--layers", "1", "--hidden-size", "64", "--epochs", "2", "--max-tokens", "32")
aisle("sample", "-o", "a.csv", "--rows", "600")
aisle("clean", "a.csv", "-o", "clean.csv")
aisle("train", "a.csv", "-o", "teacher", *small, "--augment", "homophone", "--mixup", "0.2", "--class-weight", "0.5")
aisle("pretrain", "a.csv", "-o", "language", *small)
aisle("distil", "teacher", "--data", "a.csv", "-o", "student", *small[:2], "--linear-share", "0.5", "--epochs", "1")
aisle("prune", "student", "--data", "a.csv", "-o", "pruned")
aisle("evaluate", "student", "a.csv", "--baselines", "a.csv", "--report", "evaluation.html")
aisle("explain", "--check", "a.csv", "--checkpoint", "student", "--rows", "40", "--json")
aisle("search", "a.csv", "-o", "search", "--trials", "1", "--epochs", "1")
"""


@pytest.mark.skipif(not PYTHON.exists(), reason="make test makes .venv-learn first")
@pytest.mark.long
def test_the_learning_half_runs_alone_with_the_newest_numpy(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [PYTHON, "-c", SMOKE], cwd=tmp_path, capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (found,) = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert 0 <= json.loads(found)["methods"][0]["area"] <= 1
    assert (tmp_path / "evaluation.html").exists()
