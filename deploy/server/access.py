"""Access control: the server's TLS files, and the key for the protocols that callers may not use.

Only the operator may load models, register shared memory, and change trace and log settings. Triton requires a key for
these protocols. Each start creates a new key, in a file that only the same user on the same host can read. The key
protects against callers who can only reach the port: Triton takes it on its command line, which other users of the host
can list, unless the host prevents that.
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

RESTRICTED = ("model-repository", "shared-memory", "logging", "trace")
HEADER = "triton-grpc-protocol-aisle-admin"  # Triton adds the prefix triton-grpc-protocol-


@dataclass(frozen=True)
class ServerTLS:
    """PEM files: the server's certificate chain and key and, for mutual TLS, the CA of its clients."""

    certificate: Path
    key: Path
    client_authority: Path | None = None

    def arguments(self) -> list[str]:
        """Return Triton's command-line arguments for these files.

        Raises:
            InputError: a file is missing or is not PEM, or the key does not belong to the certificate.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(self.certificate, self.key, password="")  # refuse encrypted keys, without a prompt
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
def restrict_protocols(grpc_port: int) -> Iterator[str]:
    """Yield Triton's argument that restricts the protocols; keep their key in a file until the server ends.

    Raises:
        InputError: the folder for keys belongs to another user.
    """
    key, file = secrets.token_hex(32), _key_file(grpc_port)
    file.unlink(missing_ok=True)  # left over by a server that was killed
    with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as opened:
        opened.write(key)
    try:
        yield f"--grpc-restricted-protocol={','.join(RESTRICTED)}:{HEADER.removeprefix('triton-grpc-protocol-')}={key}"
    finally:
        file.unlink(missing_ok=True)


def admin_headers(grpc_port: int) -> dict[str, str]:
    """Return the gRPC headers that allow the restricted protocols of a server of this user on this host.

    Raises:
        InputError: this user has not started a server on that port of this host with `aisle serve`.
    """
    file = _key_file(grpc_port)
    try:
        return {HEADER: file.read_text()}
    except FileNotFoundError:
        message = (
            f"this user runs no server on port {grpc_port}: {file} is missing; run this on the host of `aisle serve`"
        )
        raise InputError(message) from None


def _key_file(grpc_port: int) -> Path:
    """Return the path of a server's key, in a folder that this user owns and nobody else can read.

    Raises:
        InputError: the folder has another owner or other permissions.
    """
    folder = Path(tempfile.gettempdir()) / f"aisle-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise InputError(f"{folder} must be a folder that only this user can read; remove it")
    return folder / f"{grpc_port}.key"
