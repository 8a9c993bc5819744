"""The manual and the project files: the commands of the pages run, and their statements are true."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from aisle.deploy.server import environment, installation
from aisle.deploy.server.triton import free_ports
from aisle.errors import InputError
from aisle.extras import install_for

from .conftest import Server, aisle

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# The commands of the pages, on the ports of the test. Tables are smaller, and so are models whose size a page leaves to
# the defaults: training and exporting took most of the time. Of an option given twice, the last value counts.
COMMAND = """set -e
set -m
aisle() {{
    case $1 in
        sample) {aisle} "$@" --rows 1500 ;;
        train) {aisle} "$@" $([[ $* == *--model* ]] || echo --layers 1 --learning-rate 2e-3) ;;
        serve) {aisle} "$@" --grpc-port {grpc} --metrics-port {metrics} --http-port {http} ;;
        classify) {aisle} "$@" --url localhost:{grpc} ;;
        rest) {aisle} "$@" --url localhost:{grpc} --port {rest} ;;
        *) {aisle} "$@" ;;
    esac
}}
trap 'kill %1 2> /dev/null && wait %1 || true' EXIT
"""


# Simulates missing packages; some libraries would take None in sys.modules for a module.
ABSENT = """import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {0!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
"""


def tracked() -> list[Path]:
    """Return the files of the project."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [path for name in names.split("\0") if name and (path := ROOT / name).is_file() and not path.is_symlink()]


def commands(page: str) -> str:
    """Return the commands of a page."""
    return "\n".join(re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text("utf-8"), re.S))


@pytest.mark.long
@pytest.mark.parametrize(
    ("page", "written"),
    [
        ("README.md", "clean.report.html"),
        ("docs/tutorials/catalogue.md", "evaluation.html"),
        ("docs/tutorials/hugging-face.md", "models/product_classifier/1/manifest.json"),
        ("docs/tutorials/rollout.md", "models/release.json"),
        ("docs/tutorials/drift.md", "drift.html"),
    ],
)
def test_commands_of_the_manual_run(page: str, written: str, tmp_path: Path) -> None:
    """All commands of a page run, on smaller tables and models, and have the result that the page describes."""
    grpc, metrics, http, rest = free_ports(4)
    start = COMMAND.format(aisle=f"{sys.executable} -m aisle", grpc=grpc, metrics=metrics, http=http, rest=rest)
    lines = commands(page)
    if page == "README.md":  # the same server answers the requests of the pages on HTTP
        both = commands("docs/how-to/triton-http.md") + commands("docs/how-to/rest.md")
        lines = lines.replace("kill %1", both + "\nkill %1")
    for port, own in ((8001, grpc), (8000, http), (8080, rest)):
        lines = lines.replace(f"localhost:{port}", f"localhost:{own}")
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", start + lines], cwd=tmp_path, env=env, capture_output=True, text=True, check=False, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / written).exists()


@pytest.mark.long
def test_manual_builds_without_warnings_and_loads_nothing_from_outside(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "-q", "docs", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        text = page.read_text("utf-8")
        assert not re.findall(r"<(?:script|img|iframe|source)[^>]+src=\"(?:https?:)?//", text), page
        assert not re.findall(r"<link[^>]+href=\"(?:https?:)?//[^>]+stylesheet", text), page
    for sheet in tmp_path.rglob("*.css"):
        assert not re.findall(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//", sheet.read_text("utf-8")), sheet
    reference = re.sub(r"<[^>]+>", "", (tmp_path / "reference" / "cli.html").read_text("utf-8"))
    assert "aisle train" in reference
    assert "aisle_texts_total" in (tmp_path / "reference" / "metrics.html").read_text("utf-8")


def test_readme_is_short_and_its_links_work() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(text.splitlines()) <= 150
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert "://" in target or (ROOT / target).exists(), target


def test_no_page_installs_another_project() -> None:
    """On the package index, `aisle` is a different project."""
    stranger = re.compile(r"\b(?:pipx?3?|uv|poetry)\b[^\n`]*?\b(?:install|add)\s+(?:-\S+\s+)*['\"]?aisle(?![\w-])")
    assert stranger.search("pip install 'aisle[train]'")
    assert stranger.search("uv pip install -U aisle")
    assert not stranger.search("pip install 'aisle-classifier[train]'")
    for path in tracked():
        if path != Path(__file__) and path.suffix not in (".js", ".lock"):
            assert not stranger.search(path.read_text("utf-8", errors="replace")), path


@pytest.mark.parametrize(
    ("command", "module", "served", "extras"),
    [
        ("train", "torch", False, "train"),
        ("clean", "jinja2", False, "clean"),
        ("bench", "matplotlib.figure", False, "bench"),
        ("demo", "torch", False, "demo"),
        ("evaluate", "torch", False, "train"),
        ("evaluate", "sklearn", True, "evaluate"),
        ("evaluate", "matplotlib", True, "evaluate,report"),
        ("explain", "captum", False, "explain"),
        ("train", "pypinyin", False, "train,augment"),
        ("classify", "pyarrow", False, "parquet"),
        ("rest", "uvicorn", False, "rest"),
        ("stream", "confluent_kafka", False, "stream"),
        ("demand", "statsforecast.models", False, "demand"),
    ],
)
def test_hints_name_the_extras_that_are_enough(command: str, module: str, served: bool, extras: str) -> None:
    hint = install_for(command, module, served=served)
    assert hint is not None
    assert hint.endswith(f"[{extras}]'")


@pytest.mark.long
def test_servers_are_measured_and_explained_without_torch(tmp_path: Path, server: Server, sample: Path) -> None:
    heavy = ("torch", "transformers", "captum", "openvino", "onnx", "onnxruntime", "matplotlib", "jinja2")
    (tmp_path / "sitecustomize.py").write_text(ABSENT.format(heavy))
    env = {"PYTHONPATH": str(tmp_path)}
    few = tmp_path / "few.csv"
    few.write_text("".join(sample.read_text("utf-8").splitlines(keepends=True)[:40]), "utf-8")
    done = aisle("evaluate", "--url", server.url, few, "--json", env=env)
    assert done.returncode == 0, done.stderr
    done = aisle("explain", "红富士苹果 5斤装", "--url", server.url, "--json", env=env)
    assert done.returncode == 0, done.stderr
    done = aisle("explain", "红富士苹果 5斤装", "--checkpoint", tmp_path, env=env)
    assert done.returncode == 2


def test_wheel_is_complete_without_symbolic_links(tmp_path: Path) -> None:
    """A clone on Windows has small text files instead of links."""
    for path in subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split():
        source, copy = ROOT / path, tmp_path / "clone" / path
        if path.startswith(("docs/_static", "requirements")) or not (source.is_symlink() or source.exists()):
            continue
        copy.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink():
            copy.write_text(os.readlink(source))
        else:
            shutil.copy2(source, copy)
    names = [wheel_names(folder, tmp_path / name) for folder, name in ((ROOT, "a"), (tmp_path / "clone", "b"))]
    assert "aisle/client/classifier.py" in names[1]
    missing = {name for name in names[0] if not name.startswith("aisle/deploy/helm/aisle/files/")} - names[1]
    assert not missing


def wheel_names(folder: Path, out: Path) -> set[str]:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return set(zipfile.ZipFile(next(out.glob("*.whl"))).namelist())


def test_an_unsuitable_python_is_reported_before_a_download(monkeypatch: pytest.MonkeyPatch) -> None:
    assert environment.problem() is None
    monkeypatch.setattr(environment, "VERSION", "3.13")
    assert "use 3.11 or 3.12" in (environment.problem() or "")
    monkeypatch.setattr(environment, "VERSION", "3.12")
    assert "rm -r .venv" in (environment.problem() or "rm -r .venv")  # if .venv has another version


def test_an_unsuitable_python_or_numpy_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """With numpy 2, Triton's stub runs and corrupts strings."""
    assert installation.site_of_wheel().is_dir()
    monkeypatch.setattr(installation, "version", lambda _: "2.3.5")
    with pytest.raises(InputError, match="numpy<2"):
        installation.site_of_wheel()
    monkeypatch.setattr(installation, "PYTHON", "3.13")
    with pytest.raises(InputError, match=r"3\.11 or 3\.12"):
        installation.site_of_wheel()


def test_system_packages_are_installed_only_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []
    monkeypatch.setattr(environment, "libpython_folder", lambda *_: None)
    monkeypatch.setattr(environment, "run", ran.append)
    assert "LIBPYTHON=install" in (environment.ensure_libpython(install=False) or "")
    assert not ran
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert environment.ensure_libpython(install=True) is None
    assert [command[0] for command in ran] == ["sudo", "sudo"]


def test_project_files_are_consistent() -> None:
    assert PROJECT["name"] == "aisle-classifier"
    assert PROJECT["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    assert f"version: {PROJECT['version']}" in (ROOT / "CITATION.cff").read_text()
    changes = (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert changes.index("## [Unreleased]") < changes.index(f"## [{PROJECT['version']}]")
    for name in ("CONTRIBUTING.md", "SECURITY.md", ".pre-commit-config.yaml", ".github/workflows/ci.yaml"):
        assert (ROOT / name).stat().st_size


CALLERS = [path for path in sorted((ROOT / "examples").glob("*.py")) if path.stem != "demand_sample"]  # of a server


@pytest.mark.parametrize("script", CALLERS, ids=lambda path: path.stem)
def test_examples_run(script: Path, server: Server, sample: Path, tmp_path: Path) -> None:
    command = [sys.executable, script, "--url", server.url]
    if script.stem == "classify_file":
        command += [sample, tmp_path / "out.jsonl"]
    if script.stem == "search_products":
        command += ["红富士苹果", "--index", tmp_path / "index", "--classified", tmp_path / "classified.csv"]
        few = tmp_path / "few.csv"
        few.write_text("".join(itertools.islice(sample.open(encoding="utf-8"), 100)), "utf-8")
        assert aisle("classify", few, "-o", tmp_path / "classified.csv", "--url", server.url).returncode == 0
        assert aisle("embed", few, "-o", tmp_path / "vectors.parquet", "--url", server.url).returncode == 0
        assert aisle("index", tmp_path / "vectors.parquet", "-o", tmp_path / "index").returncode == 0
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
