"""Every command that reads a table refuses an unusable one in the same way, before it does anything else."""

import socket
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aisle.cli import run

ROWS = "text,category\ncafés moulus 250g,épicerie\nthéière rouge,maison\n"


def _cut_short(path: Path) -> None:
    pq.write_table(pa.table({"text": ["usb c cable"] * 50, "category": ["a"] * 50}), path)
    path.write_bytes(path.read_bytes()[:-20])


def _of_one_name(path: Path) -> None:
    columns = [pa.array(["usb c cable"]), pa.array(["SECOND"]), pa.array(["a"])]
    pq.write_table(pa.Table.from_arrays(columns, names=["text", "text", "category"]), path)


def _spreadsheet(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("xl/worksheets/sheet1.xml", "<worksheet/>")
        archive.writestr("[Content_Types].xml", "<Types/>")


FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "twice.csv": (lambda path: path.write_text("text,text,category\nusb c cable,SECOND,c\n"), "two columns are called"),
    "semi.csv": (lambda path: path.write_text("text;category\nusb c cable;a\n"), "--delimiter"),
    "latin1.csv": (lambda path: path.write_bytes(ROWS.encode("latin-1")), "UTF-8"),
    "big5.csv": (lambda path: path.write_bytes("text,category\n藍牙耳機 降噪,數碼\n".encode("big5")), "UTF-8"),
    "sjis.csv": (
        lambda path: path.write_bytes("text,category\nイヤホン,電子\n".encode("shift-jis")),
        "UTF-8",
    ),
    "sheet.csv": (_spreadsheet, "sheet.csv"),
    "twice.parquet": (_of_one_name, "two columns are called"),
    "short.parquet": (_cut_short, "short.parquet"),
    "other.csv": (lambda path: path.write_text("title,kind\nusb c cable,a\n"), "no column"),
    "absent.csv": (lambda path: None, "no such file"),
}
COMMANDS = [
    "clean {data} -o {out}.csv",
    "train {data} -o {out}",
    "pretrain {data} -o {out}",
    "search {data} -o {out}",
    "evaluate {checkpoint} {data}",
    "evaluate --url {url} {data}",
    "evaluate {checkpoint} {good} --baselines {data}",
    "explain --check {data} --checkpoint {checkpoint}",
    "frontier {checkpoint} {data}",
    "distil {checkpoint} {data} -o {out} --layers 1",
    "distil {checkpoint} {good} -o {out} --layers 1 --unlabelled {data}",
    "retrain {checkpoint} {good} --corrections {data} -o {out}",
    "prune {checkpoint} {data} -o {out}",
    "build {checkpoint} {data} --repository {out}",
    "review {data} -o {out}.csv --url {url}",
    "classify {data} -o {out}.csv --url {url}",
    "loadtest {data} --url {url}",
]


@pytest.fixture(scope="module")
def url() -> str:
    """The address of no server."""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        return f"127.0.0.1:{closed.getsockname()[1]}"


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_table_that_cannot_be_used_is_refused_in_one_line(
    command: str,
    name: str,
    checkpoint: Path,
    sample: Path,
    url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write, complaint = FILES[name]
    write(tmp_path / name)
    words = {"data": name, "good": sample, "checkpoint": checkpoint, "url": url, "out": tmp_path / "out"}
    assert run([word.format(**words) for word in command.split()]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = [line for line in printed.err.splitlines() if line.startswith("aisle: ")]
    assert name in line
    assert complaint in line
    assert "Traceback" not in printed.err
    assert not (tmp_path / "out.csv").exists()
