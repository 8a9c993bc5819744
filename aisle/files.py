"""Write files atomically: to a temporary name in the same folder, then rename."""

from __future__ import annotations

import atexit
import json
import os
import secrets
import shutil
import tempfile
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(text, "utf-8")
    temporary.replace(path)


def write_private(path: Path, text: str) -> None:
    """Write a file that only this user can read."""
    temporary = path.with_name(f".{path.name}.part")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
    temporary.replace(path)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def put_in_place(folder: Path, out: Path) -> None:
    """Move `folder` to `out`; then delete the folder that was there before."""
    old = folder.with_name("replaced")
    if out.exists():
        out.rename(old)
    folder.rename(out)
    if old.exists():
        shutil.rmtree(old)


def new_temporary(prefix: str, suffix: str = "") -> Path:
    """Create a temporary file that only its owner can read. It is deleted when the process ends, also by a signal."""
    path = Path(tempfile.gettempdir(), f"{prefix}{secrets.token_hex(8)}{suffix}")
    atexit.register(path.unlink, missing_ok=True)  # first, so that no signal comes between
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    return path
