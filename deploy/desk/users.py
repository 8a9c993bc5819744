"""The people who may use the desk, with hashed passwords, in a file of their own."""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
import threading
import time
from pathlib import Path
from typing import Any

from aisle.errors import InputError
from aisle.files import write_private

NAME = re.compile(r"[\w.@-]{1,64}")
SHORTEST_PASSWORD = 10
# scrypt (RFC 7914): 16 MiB and some 50 ms for each password.
COST: dict[str, int] = {"n": 2**14, "r": 8, "p": 1}
HASHES = 2  # at a time, so that many logins do not keep others from working
TRIES, TRY_SECONDS = 5, 60.0  # wrong passwords of one name within this time
NOBODY = "local"  # who works where no login is needed


class Users:
    """The file of people. It is read again when it has changed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read_at: tuple[int, int] | None = None
        self._users: dict[str, str] = {}
        self._tries: dict[str, list[float]] = {}
        self._lock = threading.Lock()
        self._hashing = threading.Semaphore(HASHES)

    def names(self) -> list[str]:
        return sorted(self._load())

    def set_password(self, name: str, password: str) -> None:
        """Add a person, or change the password.

        Raises:
            InputError: the name or the password cannot be used.
        """
        if not NAME.fullmatch(name) or name == NOBODY:
            raise InputError(f"{name!r} is no name for a person; use letters, digits, and . _ @ -")
        if len(password) < SHORTEST_PASSWORD:
            raise InputError(f"the password is too short; use {SHORTEST_PASSWORD} characters or more")
        self._save({**self._load(), name: hashed(password)})

    def remove(self, name: str) -> None:
        """Remove a person, who is logged out at once.

        Raises:
            InputError: there is no such person.
        """
        users = self._load()
        if name not in users:
            raise InputError(f"{self._path}: nobody is called {name!r}")
        self._save({other: value for other, value in users.items() if other != name})

    def check(self, name: str, password: str) -> bool:
        """Return whether the password is right. An unknown name takes as long as a wrong password."""
        kept = self._load().get(name, _NOBODY)
        salt, expected = kept.split("$")
        with self._hashing:
            return hmac.compare_digest(_derive(password, bytes.fromhex(salt)), expected)

    def begin_try(self, name: str) -> float:
        """Count a try of a password; return how long this name must wait after too many, otherwise 0."""
        with self._lock:
            now = time.monotonic()
            # Names that nobody tries any more are dropped, so that strangers cannot fill the memory.
            self._tries = {each: at for each, at in self._tries.items() if now - at[-1] < TRY_SECONDS}
            tries = [at for at in self._tries.get(name, ()) if now - at < TRY_SECONDS]
            if len(tries) >= TRIES:
                return TRY_SECONDS - (now - tries[0])
            self._tries[name] = [*tries, now]
            return 0.0

    def forget_tries(self, name: str) -> None:
        """Start to count anew, after the right password."""
        with self._lock:
            self._tries.pop(name, None)

    def stamp(self, name: str) -> str | None:
        """Return a mark that changes with the password; None if there is no such person. Sessions hold it."""
        kept = self._load().get(name)
        return None if kept is None else hashlib.sha256(kept.encode()).hexdigest()[:16]

    def _load(self) -> dict[str, str]:
        try:
            status = self._path.stat()
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise InputError(f"cannot read {self._path}: {error.strerror}") from None
        changed = status.st_mtime_ns, status.st_ino
        if changed != self._read_at:
            self._users = _parse(self._path)
            self._read_at = changed
        return self._users

    def _save(self, users: dict[str, str]) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_private(self._path, json.dumps({"users": users}, ensure_ascii=False, indent=2))
        except OSError as error:
            raise InputError(f"cannot write {self._path}: {error.strerror}") from None


def hashed(password: str) -> str:
    """Return a salted hash of a password, as `salt$hash` in hexadecimal."""
    salt = secrets.token_bytes(16)
    return f"{salt.hex()}${_derive(password, salt)}"


def _derive(password: str, salt: bytes) -> str:
    return hashlib.scrypt(password.encode(), salt=salt, dklen=32, maxmem=64 * 2**20, **COST).hex()


_NOBODY = f"{bytes(16).hex()}${bytes(32).hex()}"


def _parse(path: Path) -> dict[str, str]:
    try:
        users: Any = json.loads(path.read_text("utf-8"))["users"]
        if not all(re.fullmatch(r"[0-9a-f]{32}\$[0-9a-f]{64}", value) for value in users.values()):
            raise ValueError("a password is not hashed")
        return dict(users)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is not a file of users ({error}); make it with: aisle desk-user NAME") from None
