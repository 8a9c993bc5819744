"""Where a table of a database is: an address on the command line, taken apart. It never has a password."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from aisle.errors import InputError

EXTRA = "sql"
NO_PASSWORD = "leave the password out, because lists of processes and logs show it; set PGPASSWORD or use ~/.pgpass"
_ADDRESS = re.compile(r"(postgres(?:ql)?|duckdb|delta):(?!\s)(.*)", re.DOTALL)  # not a text such as "delta: a tap"
_PASSWORD = re.compile(r"postgres(?:ql)?:/*[^@?]*:[^@?]*@|.*[?&](?:ssl)?password=", re.DOTALL)
_PART = r'(?:"(?:[^"]|"")+"|[^".]+)'  # of a name such as shop."my.table"


@dataclass(frozen=True)
class Place:
    """A table of a database."""

    scheme: str  # postgresql, duckdb or delta
    address: str  # the server's URL, the database's file, or the table's folder
    table: tuple[str, ...] = ()  # the schema, if it is given, and the table; of Delta none

    def __str__(self) -> str:
        named = ".".join(f'"{part}"' if "." in part else part for part in self.table)
        start = self.address if self.scheme == "postgresql" else f"{self.scheme}:{self.address}"
        return f"{start}{'&' if '?' in start else '?'}table={named}" if named else start


@dataclass(frozen=True)
class Since:
    """The rows of a table that are to be read: those whose `column` is `least` or more, or has no value."""

    column: str
    least: Any | None  # a value of pyarrow; None for all rows


def is_database(path: Path | str) -> bool:
    """Return whether a path is the address of a table of a database."""
    return _ADDRESS.fullmatch(str(path)) is not None


def as_argument(text: str) -> str:
    """Return an argument of a command line; an address in it gets a form that is the same after `Path`.

    A path loses the second of two slashes, so an empty host is written as ``@``, which PostgreSQL reads the same.

    Raises:
        InputError: the address has a password.
    """
    option, value = re.fullmatch(r"(--?[\w-]+=)?(.*)", text, re.DOTALL).groups("")  # type: ignore[union-attr]
    if not is_database(value):
        return text
    _refuse_password(value)
    value = re.sub(r"^(postgres(?:ql)?):///", r"\1://@/", value)
    return option + re.sub(r"^(duckdb|delta)://(?!/)", r"\1:", value)


def place_of(path: Path) -> Place:
    """Return the place that an address names.

    Raises:
        InputError: it names no table, or has a password.
    """
    scheme, rest = _ADDRESS.fullmatch(str(path)).groups()  # type: ignore[union-attr]
    _refuse_password(str(path))
    if scheme == "delta":
        return Place(scheme, re.sub(r"^([\w+-]{2,}):/+", r"\1://", re.sub("^/+", "/", rest)))
    address, _, query = rest.partition("?")
    parameters = [each for each in query.split("&") if each]
    tables = [unquote(each.partition("=")[2]) for each in parameters if each.startswith("table=")]
    if len(tables) != 1 or not re.fullmatch(rf"{_PART}(\.{_PART}){{0,2}}", tables[0]):
        raise InputError(f"{path}: end it with ?table=NAME or ?table=SCHEMA.NAME, in quotes for the shell")
    names = tuple(_unquoted(part) for part in re.findall(_PART, tables[0]))
    others = "&".join(each for each in parameters if not each.startswith("table="))
    if scheme == "duckdb":
        return Place(scheme, re.sub("^/+", "/", address), names)
    return Place("postgresql", f"postgresql://{address.lstrip('/')}{'?' if others else ''}{others}", names)


def shown(path: Path) -> str:
    """Return a path as the user wrote it."""
    return str(place_of(path)) if is_database(path) else str(path)


def quoted(*names: str) -> str:
    """Return a name of SQL, such as "schema"."table"."""
    return ".".join('"' + name.replace('"', '""') + '"' for name in names)


def _unquoted(part: str) -> str:
    return part[1:-1].replace('""', '"') if part.startswith('"') else part


def _refuse_password(address: str) -> None:
    if _PASSWORD.match(address):
        raise InputError(f"an address of PostgreSQL has a password; {NO_PASSWORD}")
