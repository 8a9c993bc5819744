"""Open tables: detect the file format, decompress, check the encoding, and read standard input."""

from __future__ import annotations

import bz2
import codecs
import contextlib
import gzip
import io
import json
import lzma
import os
import re
import shutil
import sys
import zipfile
import zlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, Literal, cast

from aisle.console import say_once
from aisle.errors import InputError
from aisle.extras import install
from aisle.files import new_temporary
from aisle.preprocess.tables.databases import snapshot
from aisle.preprocess.tables.encodings import SHOWN, guess
from aisle.preprocess.tables.place import is_database

CERTAIN = 8  # characters outside ASCII; a file with so many that are valid UTF-8 is in no other encoding
SAMPLE = 64 * 1024  # bytes from which the format and the encoding are detected
STDIO = Path("-")  # standard input and output
PACKED = (".gz", ".bz2", ".zst", ".zip")
KINDS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".txt": "txt",
    ".parquet": "parquet",
    ".xlsx": "xlsx",
    ".xls": "xls",
}
NAMES = "name it .csv, .tsv, .jsonl, .json, .txt (or these with .gz, .bz2, .zst, .zip), .parquet, .xlsx or .xls"
NAME_ENCODING = "convert it to UTF-8, or give its encoding with --encoding"
MAGIC = {  # first bytes of files that often have a wrong name
    b"\xd0\xcf\x11\xe0": "a spreadsheet (.xls)",
    b"PAR1": "a Parquet file (.parquet)",
    b"\x1f\x8b": "a gzip file (.gz)",
    b"\x28\xb5\x2f\xfd": "a zstd file (.zst)",
    b"%PDF": "a PDF",
}
_BEYOND_ASCII = re.compile(rb"[\xc2-\xf4]")  # first bytes of UTF-8's characters outside ASCII
DAMAGED = (gzip.BadGzipFile, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, RuntimeError)


@dataclass(frozen=True)
class Reading:
    """How the user wants tables to be read."""

    delimiter: str = ""  # between the columns of CSV and TSV; by default from the file's name
    encoding: str = ""  # of text files that are not UTF-8
    header: bool = True  # whether the first line names the columns

    def __post_init__(self) -> None:
        if self.delimiter and (len(self.delimiter) != 1 or self.delimiter in '"\r\n'):
            raise InputError(f"a delimiter must be one character, such as ';' or '\\t'; got {self.delimiter!r}")
        if self.encoding:
            try:
                "".encode(self.encoding)
            except (LookupError, ValueError):
                raise InputError(
                    f"unknown encoding {self.encoding!r}; name one such as gb18030, big5, shift_jis or cp1252"
                ) from None


READING: ContextVar[Reading | None] = ContextVar("reading", default=None)
VARIABLE = "AISLE_READING"  # passes the options on to child processes


def reading() -> Reading:
    """Return how to read tables: by the options of this command, or of the command that started this process."""
    options = READING.get()
    return Reading(**json.loads(os.environ.get(VARIABLE, "{}"))) if options is None else options


def set_reading(options: Reading) -> None:
    """Set how this process and its child processes read tables."""
    READING.set(options)
    os.environ[VARIABLE] = json.dumps(asdict(options))


def kind_of_name(name: str) -> str | None:
    """Return csv, tsv, jsonl, json, txt, parquet, xlsx or xls, from a file's name; None if the name does not say.

    A table of a database is read by way of a Parquet file.
    """
    if is_database(name):
        return "parquet"
    suffixes = [suffix.lower() for suffix in Path(name).suffixes]
    if suffixes and suffixes[-1] in PACKED:
        suffixes.pop()
        if suffixes and KINDS.get(suffixes[-1]) in ("parquet", "xlsx", "xls"):
            return None
    return KINDS.get(suffixes[-1]) if suffixes else None


def kind_of(path: Path) -> str:
    """Return the format of a table: from its name, from the name of the only file in a .zip, or from its first bytes.

    Raises:
        InputError: the format is unknown.
    """
    found = kind_of_name(str(path))
    if found is None and path == STDIO:
        found = _kind_of_head(local(path))
    if found is None and path.suffix.lower() == ".zip" and path.is_file():
        found = kind_of_name(_member(path))
    if found is None:
        if not path.is_dir():
            _refuse_pipe(path)
        raise InputError(f"{path}: unknown file format; {NAMES}")
    return found


def _kind_of_head(path: Path) -> str:
    """Return the format of a file from its first bytes."""
    with path.open("rb") as file:
        head = file.read(SAMPLE)
    if head.startswith(b"PAR1"):
        return "parquet"
    if _is_excel(head):
        return "xlsx"
    first = head.removeprefix(codecs.BOM_UTF8).lstrip()[:1]
    if first in (b"{", b"["):
        return "jsonl" if first == b"{" else "json"
    line = head.partition(b"\n")[0]
    return "tsv" if b"\t" in line and not reading().delimiter else "csv"


@lru_cache(maxsize=1)
def _spooled() -> Path:
    """Return a temporary file with all of standard input, because tables are read more than once."""
    path = new_temporary("aisle-stdin-")
    with path.open("wb") as file:
        shutil.copyfileobj(sys.stdin.buffer, file)
    return path


def local(path: Path) -> Path:
    """Return the file that holds a table's bytes.

    Raises:
        InputError: there is no such file.
    """
    if path == STDIO:
        return _spooled()
    if is_database(path):
        return snapshot(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder; give a file")
    if not path.is_file():
        _refuse_pipe(path)
        raise InputError(f"{path}: no such file")
    return path


def _refuse_pipe(path: Path) -> None:
    """Raise InputError for a pipe or a device: it gives its data only once, and tables are read more than once."""
    if path.exists() and not path.is_file():
        raise InputError(f"{path} is a pipe or a device; give - and redirect it: < {path}")


def _member(path: Path) -> str:
    """Return the name of the only file in a .zip."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [each for each in archive.namelist() if not each.endswith("/") and "__MACOSX/" not in each]
    except zipfile.BadZipFile:
        raise InputError(f"{path}: not a .zip file, or incomplete") from None
    if len(names) != 1:
        raise InputError(f"{path} holds {len(names)} files; unpack it and give the one to read")
    return names[0]


@contextlib.contextmanager
def open_bytes(path: Path) -> Iterator[IO[bytes]]:
    """Open a table's bytes, decompressed.

    Raises:
        InputError: the file is missing, damaged, or in another format than its name says.
    """
    where = local(path)
    suffix = path.suffix.lower()
    try:
        with contextlib.ExitStack() as stack:
            if suffix == ".zip":
                archive = stack.enter_context(zipfile.ZipFile(where))
                yield stack.enter_context(archive.open(_member(path)))
            elif suffix == ".gz":
                yield cast(IO[bytes], stack.enter_context(gzip.open(where)))
            elif suffix == ".bz2":
                yield stack.enter_context(bz2.open(where))
            elif suffix == ".zst":
                yield stack.enter_context(_pyarrow().input_stream(str(where), compression="zstd"))
            else:
                yield stack.enter_context(where.open("rb"))
    except DAMAGED as error:
        raise InputError(f"{path}: damaged, or not what its name says: {error or 'incomplete'}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None


@contextlib.contextmanager
def open_lines(path: Path) -> Iterator[IO[str]]:
    """Open a table's text. Bytes that are invalid in its encoding become surrogate escapes.

    Raises:
        InputError: as `open_bytes`, or the file is in another encoding; also while it is read.
    """
    with open_bytes(path) as file:
        head = _head(file)
    _check_kind(path, head)
    encoding = _encoding(path, head)
    _check_encoding(path, head, encoding)
    encoding = "utf-8-sig" if codecs.lookup(encoding).name == "utf-8" else encoding
    errors = "surrogatepass" if _is_wide(encoding) else "surrogateescape"
    with open_bytes(path) as file:
        try:
            yield io.TextIOWrapper(file, encoding, errors=errors, newline="")
        except UnicodeError as error:
            raise InputError(f"{path}: not {encoding}, or cut short ({error}); {NAME_ENCODING}") from None


def _head(file: IO[bytes]) -> bytes:
    parts: list[bytes] = []
    while sum(map(len, parts)) < SAMPLE and (part := file.read(SAMPLE - sum(map(len, parts)))):
        parts.append(bytes(part))
    return b"".join(parts)


def _is_excel(head: bytes) -> bool:
    return head.startswith(b"PK\x03\x04") and (b"xl/" in head or b"[Content_Types].xml" in head)


def _check_kind(path: Path, head: bytes) -> None:
    """Refuse a file in another format than its name says."""
    what = next((what for magic, what in MAGIC.items() if head.startswith(magic)), None)
    if head.startswith(b"PK\x03\x04"):
        what = "a spreadsheet (.xlsx)" if _is_excel(head) else "a zip file (.zip)"
    if what is not None:
        raise InputError(f"{path} is {what}, not what its name says; rename it")


def _check_encoding(path: Path, head: bytes, encoding: str) -> None:
    """Refuse a file that begins in another encoding. Single invalid bytes are left to cleaning."""
    if _is_wide(encoding):
        _check_wide(path, head, encoding)
        return
    nulls, marked = head.count(b"\0"), head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    if marked or nulls > len(head) // 4:
        longest = head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)) or nulls > len(head) * 5 // 8
        wide = "UTF-32" if longest else "UTF-16"  # in ASCII, three quarters of UTF-32 and half of UTF-16 are NUL
        raise InputError(
            f"{path}, line 1: looks like {wide}; read it with --encoding {wide.lower()}, or convert it: "
            f"iconv -f {wide} -t UTF-8"
        )
    lines = _whole_lines(head)
    foreign = [number for number, line in enumerate(lines, start=1) if not _decodes(line, encoding)]
    if 2 * len(foreign) <= sum(not line.isascii() for line in lines):
        return
    name = "UTF-8" if codecs.lookup(encoding).name == "utf-8" else encoding
    found = guess([line for line in lines if not line.isascii()])
    hint = NAME_ENCODING
    if found:
        hint = (
            f"it looks like {SHOWN[found]}; read it with --encoding {found}, or convert it: "
            f"iconv -f {found.upper().replace('_', '-')} -t UTF-8"
        )
    raise InputError(f"{path}, line {foreign[0]}: not {name}; {hint}")


def _encoding(path: Path, head: bytes) -> str:
    """Return the encoding to read a file in: UTF-8, or the option's encoding if the file is not UTF-8."""
    given = reading().encoding
    if given and codecs.lookup(given).name not in ("utf-8", "utf-8-sig") and _is_utf8(head):
        say_once(f"{path} is UTF-8 and is read so; --encoding {given} is for the files that are not")
        return "utf-8"
    return given or "utf-8"


def _is_utf8(head: bytes) -> bool:
    """Return whether a file is certainly UTF-8: no other text looks so by chance."""
    lines = _whole_lines(head)
    if b"\0" in head or not all(_decodes(line, "utf-8") for line in lines):
        return False
    return sum(len(_BEYOND_ASCII.findall(line)) for line in lines) >= CERTAIN


def _whole_lines(head: bytes) -> list[bytes]:
    """Return the lines of a file's beginning, without the last one if it may be incomplete."""
    return head.splitlines()[: -1 if len(head) == SAMPLE else None]


def _is_wide(encoding: str) -> bool:
    return codecs.lookup(encoding).name.startswith(("utf-16", "utf-32"))


def _check_wide(path: Path, head: bytes, encoding: str) -> None:
    """Refuse a file that is not in this UTF-16 or UTF-32: decoded so, it has many NUL or no ASCII character."""
    marked = head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE))
    if codecs.lookup(encoding).name in ("utf-16", "utf-32") and head and not marked:
        hint = f"it has no byte order mark; give --encoding {encoding}-le or {encoding}-be if it is {encoding}"
        raise InputError(f"{path}, line 1: not {encoding}: {hint}")
    text = head.decode(encoding, "replace")
    if text and (text.count("\0") > len(text) // 4 or not any(map(str.isascii, text))):
        raise InputError(f"{path}, line 1: not {encoding}; {NAME_ENCODING}")


def _decodes(line: bytes, encoding: str) -> bool:
    try:
        line.decode(encoding)
    except UnicodeError:
        return False
    return True


def _pyarrow() -> Any:
    try:
        import pyarrow
    except ImportError:
        raise InputError(f".zst needs an extra: {install('parquet')}") from None
    return pyarrow


@contextlib.contextmanager
def open_output(path: Path, encoding: Literal["utf-8", "utf-8-sig"] = "utf-8") -> Iterator[IO[str]]:
    """Open a text file for writing, compressed as its name says. Surrogate escapes become the original bytes."""
    suffix = path.suffix.lower()
    if suffix == ".zip":
        raise InputError(f"{path}: .zip can only be read; name it .gz, .bz2 or .zst")
    with contextlib.ExitStack() as stack:
        if suffix == ".gz":
            file: Any = stack.enter_context(gzip.open(path, "wb"))
        elif suffix == ".bz2":
            file = stack.enter_context(bz2.open(path, "wb"))
        elif suffix == ".zst":
            file = stack.enter_context(_pyarrow().output_stream(str(path), compression="zstd"))
        else:
            file = stack.enter_context(path.open("wb"))
        text = io.TextIOWrapper(file, encoding, errors="surrogateescape", newline="")
        yield text
        text.flush()
        text.detach()
