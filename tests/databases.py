"""A real PostgreSQL for tests: Debian's package, started in a folder of its own."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import adbc_driver_postgresql.dbapi as dbapi
import pytest

PASSWORD = "Wort-7391"
OWNER = "owner"


class Postgres:
    """A running server."""

    database = "postgres"

    def __init__(self, port: int) -> None:
        self.port = port

    def url(self, table: str = "", user: str = OWNER) -> str:
        return f"postgresql://{user}@127.0.0.1:{self.port}/{self.database}" + (f"?table={table}" if table else "")

    def run(self, *statements: str) -> list[tuple[Any, ...]]:
        """Run statements as the owner; return the rows of the last one."""
        with dbapi.connect(self.url(), autocommit=True) as connection, connection.cursor() as cursor:
            for statement in statements:
                cursor.execute(statement)
            return list(cursor.fetchall()) if cursor.description else []

    def rows(self, table: str, columns: Sequence[str] = ("*",), order: str = "1") -> list[tuple[Any, ...]]:
        return self.run(f"SELECT {', '.join(columns)} FROM {table} ORDER BY {order}")


def programs() -> Path | None:
    """Return the folder of the newest PostgreSQL; None if there is none."""
    found = [each.parent for each in Path("/usr/lib/postgresql").glob("*/bin/initdb")]
    known = shutil.which("initdb")
    return max(found, default=Path(known).parent if known else None, key=lambda each: int(each.parent.name))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def running(folder: Path) -> Iterator[Postgres]:
    """Start a server; skip the test if PostgreSQL is not installed. It refuses to run as root."""
    binaries = programs()
    if binaries is None:
        pytest.skip("no PostgreSQL here: apt-get install postgresql")
    user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    home, secret, port = folder / "data", folder / "password", free_port()
    secret.write_text(PASSWORD)
    if user:
        for each in (folder, secret):
            shutil.chown(each, "postgres")
    options = f"-p {port} -c fsync=off -c unix_socket_directories= -c listen_addresses=127.0.0.1"
    initdb: list[str | Path] = [
        binaries / "initdb",
        "-D",
        home,
        "-U",
        OWNER,
        "--auth=scram-sha-256",
        f"--pwfile={secret}",
        "--no-sync",
    ]
    start: list[str | Path] = [binaries / "pg_ctl", "-D", home, "-w", "-o", options, "-l", folder / "log", "start"]
    for command in ([*initdb, "-E", "UTF8", "--locale=C.UTF-8"], start):
        subprocess.run([*user, *command], check=True, stdout=subprocess.DEVNULL, cwd=folder)
    try:
        yield Postgres(port)
    finally:
        subprocess.run([*user, binaries / "pg_ctl", "-D", home, "-m", "immediate", "stop"], check=True, cwd=folder)
