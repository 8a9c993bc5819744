"""The trial of a candidate: count the requests of both versions, and compare their answers."""

from __future__ import annotations

import json
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aisle.deploy.server.admin import Admin
from aisle.deploy.server.release import Release
from aisle.deploy.server.served_repository import ensemble_of, ensembles_of
from aisle.errors import ServerError

COMPARE_SECONDS = 10.0  # per text: the client's default timeout; a slower candidate has failed on the text


class TrialMonitor:
    """Collects the metrics that the router sends. In shadow mode, it also sends the live texts to the candidate."""

    def __init__(self, path: Path, admin: Admin) -> None:
        """Open the Unix datagram socket `path`, to which the router sends."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._admin = admin.new_connection()
        self._lock = threading.Lock()
        self._candidate: int | None = None
        self._counts: Counter[str] = Counter()
        self._changes: Counter[str] = Counter()
        self._thread = threading.Thread(target=self._collect, daemon=True)

    def __enter__(self) -> TrialMonitor:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        self._admin.close()

    def follow(self, release: Release) -> None:
        """Reset all counts and monitor another release."""
        with self._lock:
            self._candidate = release.candidate
            self._counts.clear()
            self._changes.clear()

    def metrics(self) -> dict[str, Any]:
        """Return counts of requests, failures and seconds by version, and of shadow texts compared and agreed."""
        with self._lock:
            return {
                **{key: round(value, 3) for key, value in self._counts.items()},
                "changes": dict(self._changes.most_common(50)),  # live category → candidate's category
            }

    def _collect(self) -> None:
        for event in self._events():
            candidate = self._candidate
            is_candidate = candidate is not None and event.get("model") in ensembles_of(candidate)
            version = "candidate" if is_candidate else "live"
            if "model" in event:
                with self._lock:
                    self._counts[f"{version}_requests"] += 1
                    self._counts[f"{version}_failures"] += event["failed"]
                    self._counts[f"{version}_seconds"] += event["seconds"]
            elif candidate is not None:
                self._compare(candidate, event["text"], event["category"])

    def _compare(self, candidate: int, text: str, category: str) -> None:
        """Classify a live text with the candidate. One text at a time keeps the load on the live version low."""
        try:
            other = self._admin.classify(ensemble_of(candidate), [text], COMPARE_SECONDS)[0]
        except ServerError:
            other = None
        with self._lock:
            if candidate != self._candidate:
                return
            self._counts["shadow_compared"] += 1
            self._counts["shadow_errors"] += other is None
            self._counts["shadow_agreed"] += other == category
            if other not in (category, None):
                self._changes[f"{category} → {other}"] += 1

    def _events(self) -> Iterator[dict[str, Any]]:
        while True:
            try:
                yield json.loads(self._socket.recv(1 << 18))
            except ValueError:
                continue  # a truncated datagram
            except OSError:
                return
