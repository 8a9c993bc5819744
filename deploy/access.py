"""Who may call what: the server's side of TLS, and the key to what is closed to callers.

Loading models, registering shared memory, tracing and log settings are for whoever runs the server. Triton asks callers
of those protocols for a key; each start makes a new one and leaves it where only the same user of the same host reads
it. The key keeps out who can only reach the port: Triton takes it on its command line, which other users of an
unhardened host can list.
"""

from __future__ import annotations

import os
import secrets
import ssl
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from aisle.errors import InputError

CLOSED = ("model-repository", "shared-memory", "logging", "trace")
HEADER = "triton-grpc-protocol-aisle-admin"  # Triton looks for its own prefix and the name given to it


@dataclass(frozen=True)
class ServerTLS:
    """PEM files: the server's certificate chain and key and, for mutual TLS, the authority of its clients."""

    certificate: Path
    key: Path
    client_authority: Path | None = None

    def arguments(self) -> list[str]:
        """Return what Triton calls these.

        Raises:
            InputError: a file is missing or no PEM, or the key is not the certificate's.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(self.certificate, self.key, password="")  # a locked key is refused, not asked for
        except (OSError, ssl.SSLError) as error:
            raise InputError(f"cannot use {self.certificate} with {self.key}: {_reason(error)}") from None
        arguments = ["--grpc-use-ssl=true", f"--grpc-server-cert={self.certificate}", f"--grpc-server-key={self.key}"]
        if self.client_authority:
            try:
                context.load_verify_locations(self.client_authority)
            except (OSError, ssl.SSLError) as error:
                raise InputError(f"cannot use {self.client_authority}: {_reason(error)}") from None
            arguments += ["--grpc-use-ssl-mutual=true", f"--grpc-root-cert={self.client_authority}"]
        return arguments


def _reason(error: OSError) -> str:
    return getattr(error, "reason", None) or error.strerror or str(error)


@contextmanager
def closed(grpc_port: int) -> Iterator[str]:
    """Give Triton's argument that closes the protocols to callers; their key lies in a file meanwhile.

    Raises:
        InputError: the folder for keys is another user's.
    """
    key, file = secrets.token_hex(32), _key_file(grpc_port)
    file.unlink(missing_ok=True)  # of a server that was killed
    with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as opened:
        opened.write(key)
    try:
        yield f"--grpc-restricted-protocol={','.join(CLOSED)}:{HEADER.removeprefix('triton-grpc-protocol-')}={key}"
    finally:
        file.unlink(missing_ok=True)


def admin_headers(grpc_port: int) -> dict[str, str]:
    """Return the gRPC headers that open the closed protocols of the server that this user runs on this host.

    Raises:
        InputError: no server was started here on that port by `aisle serve` of this user.
    """
    file = _key_file(grpc_port)
    try:
        return {HEADER: file.read_text()}
    except FileNotFoundError:
        message = f"no server of this user on port {grpc_port}: {file} is missing; run this where `aisle serve` runs"
        raise InputError(message) from None


def _key_file(grpc_port: int) -> Path:
    """Return where the key of a server lies: in a folder that nobody else can list or have made."""
    folder = Path(tempfile.gettempdir()) / f"aisle-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise InputError(f"{folder} must be a folder that only this user can read; remove it")
    return folder / f"{grpc_port}.key"
