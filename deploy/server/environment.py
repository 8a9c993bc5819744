"""Create the environment for `make demo` and `make test`. It reports what cannot work before it downloads anything.

    python3.11 deploy/server/environment.py demo

It needs no packages. On an unsuitable Python it names a suitable one.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VENV = ROOT / ".venv"
VERSION = "{}.{}".format(*sys.version_info[:2])
# nvidia-pytriton has a stub for these, and numpy 1.26, which the stub needs, has a wheel.
PYTHONS = ("3.11", "3.12")
GLIBC = (2, 35)  # the oldest that nvidia-pytriton's wheel supports
LIBRARIES = ("/usr/lib/x86_64-linux-gnu", "/usr/local/lib", "/usr/lib64")
CUDA_BUILD = """\
This machine has no GPU, and your package index has no CPU build of PyTorch for Python {version}. The CUDA build is
installed instead: about 3 GB to download and 6 GB on disk. To avoid this, stop now (Ctrl-C) and give the index with the
CPU build, whose address is on https://pytorch.org/get-started/: make demo TORCH_INDEX=ADDRESS"""


def libpython_folder(version: str, prefix: str) -> str | None:
    """Return the folder of libpython, which Triton's Python backend is linked with, or None."""
    folders = (os.path.join(prefix, "lib"), *LIBRARIES)
    return next((each for each in folders if os.path.exists(os.path.join(each, f"libpython{version}.so.1.0"))), None)


def problem() -> str | None:
    """Return why Triton cannot run with this Python on this machine, in one line, or None."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"Aisle's Triton needs Linux on x86-64; this is {sys.platform} on {platform.machine()}"
    if VERSION not in PYTHONS:
        return f"Python {VERSION} cannot run Triton's wheel; use {' or '.join(PYTHONS)}: make demo PYTHON=python3.11"
    name, number = platform.libc_ver()
    if name == "glibc" and tuple(map(int, number.split("."))) < GLIBC:
        return f"Triton's wheel needs glibc 2.35 or later, as in Debian 12 and Ubuntu 22.04; this system has {number}"
    config = VENV / "pyvenv.cfg"
    found = re.search(r"^version = (\d+\.\d+)", config.read_text(), re.M) if config.exists() else None
    if found and found.group(1) != VERSION:
        return (
            f".venv was made with Python {found.group(1)}; remove it (rm -r .venv) and run this again to use {VERSION}"
        )
    return None


def ensure_libpython(install: bool) -> str | None:
    """Return what to do about a missing libpython, in one line, or None. It is installed only with `install`."""
    if libpython_folder(VERSION, sys.base_prefix):
        return None
    package = f"libpython{VERSION}"
    if not install:
        return (
            f"Triton's Python backend needs {package}, which is not installed: run apt-get install {package} as root, "
            "or make demo LIBPYTHON=install; Python of conda, or of pyenv with --enable-shared, includes it"
        )
    sudo = [] if os.geteuid() == 0 else ["sudo"]
    run([*sudo, "apt-get", "update", "-qq"])
    run([*sudo, "apt-get", "install", "-y", "--no-install-recommends", package])
    return None


def install_torch(pip: list[str], index: str) -> None:
    """On a machine without a GPU, install PyTorch's CPU build if the index has it, else announce the CUDA build."""
    (pinned,) = re.findall(r'"torch==([\d.]+)"', (ROOT / "pyproject.toml").read_text("utf-8"))
    present = subprocess.run([*pip, "show", "torch"], capture_output=True, check=False).returncode == 0
    if present or shutil.which("nvidia-smi"):
        return
    install = [*pip, "install", "--no-compile"]
    cpu = f"torch=={pinned}+cpu"
    if index:
        run([*install, "--index-url", index, f"torch=={pinned}"])
    elif subprocess.run([*install, "--dry-run", "--no-deps", cpu], capture_output=True, check=False).returncode == 0:
        run([*install, cpu])
    else:
        print(CUDA_BUILD.format(version=VERSION), flush=True)


def drop_torch_tests() -> None:
    """Remove the tests in PyTorch's wheel: over 100 MB of programs that Aisle never calls."""
    for torch in VENV.glob("lib/python*/site-packages/torch"):
        shutil.rmtree(torch / "test", ignore_errors=True)
        for program in [*(torch / "bin").glob("test_*"), *(torch / "bin").glob("*Test")]:
            program.unlink()


def run(command: list[str]) -> None:
    """Run a command and show its output; if it fails, exit with its exit code."""
    print("$", *command, flush=True)
    code = subprocess.run(command, check=False).returncode
    if code:
        sys.exit(code)


def main() -> None:
    parser = argparse.ArgumentParser(description="Create .venv for `make demo` or `make test`.")
    parser.add_argument("extra", choices=("demo", "dev"))
    parser.add_argument("--check", action="store_true", help="only check whether this Python is suitable")
    parser.add_argument("--torch-index", default="", help="the package index for PyTorch")
    parser.add_argument("--install-libpython", action="store_true", help="install a missing libpython with apt-get")
    options = parser.parse_args()
    stop = problem() or (None if options.check else ensure_libpython(options.install_libpython))
    if stop:
        print(f"aisle: {stop}", file=sys.stderr)
        sys.exit(2)
    if options.check:
        return
    if not (VENV / "bin" / "python").exists():
        run([sys.executable, "-m", "venv", str(VENV)])
    pip = [str(VENV / "bin" / "python"), "-m", "pip"]
    install_torch(pip, options.torch_index)
    # Without bytecode, which Python writes later for the modules that run: this saves a sixth of the disk space.
    run([*pip, "install", "--no-compile", "--only-binary", "numpy", "--editable", f"{ROOT}[{options.extra}]"])
    drop_torch_tests()


if __name__ == "__main__":
    main()
