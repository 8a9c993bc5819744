"""Triton's model control, over HTTP on a Unix socket that only this user reaches, so that no caller ever can."""

from __future__ import annotations

import http.client
import json
import socket
from pathlib import Path
from typing import Any

from aisle.errors import ServerError

SECONDS = 600.0  # a TensorRT plan of gigabytes loads in well under this


class Admin:
    """Loads and unloads models of one server, and asks them."""

    def __init__(self, address: Path | tuple[str, int], headers: dict[str, str], seconds: float = SECONDS) -> None:
        """Name the server's HTTP endpoint: a Unix socket, or host and port where callers have HTTP too."""
        self._address = address
        self._connection = (
            _UnixConnection(address) if isinstance(address, Path) else http.client.HTTPConnection(*address)
        )
        self._connection.timeout = seconds
        self._headers = headers

    def another(self, seconds: float = SECONDS) -> Admin:
        """Return a connection of its own, for another thread or with another limit of time."""
        return Admin(self._address, self._headers, seconds)

    def close(self) -> None:
        """End the connection, which Triton would wait for when it is told to stop."""
        self._connection.close()

    def load(self, model: str) -> None:
        """Load a model, or those of its versions that are new; the old ones answer meanwhile.

        Raises:
            ServerError: a version cannot be loaded; those that were loaded before go on.
        """
        self._post(f"/v2/repository/models/{model}/load")

    def unload(self, model: str) -> None:
        """Take a model away from callers; its requests under way are answered."""
        self._post(f"/v2/repository/models/{model}/unload")

    def states(self) -> dict[tuple[str, str], str]:
        """Return the state of every version that was ever loaded, as ("encoder", "2"): "READY"."""
        index = self._post("/v2/repository/index")
        return {(each["name"], each.get("version", "")): each.get("state", "") for each in index}

    def classify(self, model: str, texts: list[str]) -> list[str]:
        """Return the best category of each text.

        Raises:
            ServerError: the model did not answer.
        """
        inputs = [{"name": "text", "datatype": "BYTES", "shape": [len(texts), 1], "data": texts}]
        answer = self._post(f"/v2/models/{model}/infer", {"inputs": inputs})
        return next(list(output["data"]) for output in answer["outputs"] if output["name"] == "category")

    def counts(self, model: str) -> tuple[int, int]:
        """Return how many requests a model has answered, and how many failed, in all versions that are loaded."""
        versions = self._ask("GET", f"/v2/models/{model}/stats")["model_stats"]
        stats = [each["inference_stats"] for each in versions]
        return sum(each["success"]["count"] for each in stats), sum(each["fail"]["count"] for each in stats)

    def _post(self, path: str, body: dict[str, Any] | None = None) -> Any:
        return self._ask("POST", path, json.dumps(body or {}).encode())

    def _ask(self, method: str, path: str, body: bytes | None = None) -> Any:
        try:
            self._connection.request(method, path, body, self._headers)
            response = self._connection.getresponse()
            content = response.read()
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()  # the next call opens it again
            raise ServerError(f"Triton cannot be reached: {error}") from None
        answer = json.loads(content) if content else {}
        if response.status != 200:
            raise ServerError(str(answer.get("error", response.reason)))
        return answer


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost")
        self._path = str(path)

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)
