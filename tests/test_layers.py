"""The layers in CONTRIBUTING.md: they cover every folder, and no file imports from a layer above its own."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = ("preprocess", "client", "train", "build", "model_repository", "deploy", "loadtest")


@cache
def layers() -> list[tuple[str, ...]]:
    """Return the folders of each row of the table. A row may import from the rows before it."""
    table = (ROOT / "CONTRIBUTING.md").read_text("utf-8").partition("| folder |")[2].partition("\n\n")[0]
    return [tuple(re.findall(r"`([^`]+)`", row.split("|")[1])) for row in table.splitlines() if row.startswith("| `")]


def modules() -> dict[str, str]:
    """Return the file of each module, relative to the repository. Each file counts once, without links."""
    found = {}
    for folder in ("aisle", *FOLDERS):
        for path in (ROOT / folder).rglob("*.py"):
            file = path.relative_to(ROOT)
            linked = folder == "aisle" and file.parts[1] in FOLDERS
            if not linked and "peers" not in file.parts:  # peers run in their own environments
                name = ".".join(file.with_suffix("").parts).removesuffix(".__init__")
                found[name if folder == "aisle" else f"aisle.{name}"] = file.as_posix()
    return found


def layer(file: str) -> int:
    """Return the number of a file's layer: the row with the longest matching folder."""
    matches = [
        (len(folder), number)
        for number, row in enumerate(layers())
        for folder in row
        if (folder == "aisle/*.py" and re.fullmatch(r"aisle/\w+\.py", file)) or file.startswith(folder)
    ]
    assert matches, f"{file} is in no folder of CONTRIBUTING.md's table"
    return max(matches)[1]


def imports(file: str, names: dict[str, str]) -> set[str]:
    """Return the modules of this project that a file imports, anywhere in it."""
    imported = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text("utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{file} imports relatively"
            imported |= {f"{node.module}.{alias.name}" for alias in node.names}
    found = set()
    for name in imported:
        while name not in names and "." in name:
            name = name.rpartition(".")[0]
        found |= {name} & names.keys()
    return found


def test_no_import_goes_up_a_layer() -> None:
    names = modules()
    assert len(names) > 100
    up = [
        f"{file} → {names[other]}"
        for file in names.values()
        for other in imports(file, names)
        if layer(names[other]) > layer(file)
    ]
    assert not up


def test_every_folder_of_the_table_exists() -> None:
    assert len(layers()) > 10
    for folder in (folder for row in layers() for folder in row):
        assert list(ROOT.glob(folder)), folder
