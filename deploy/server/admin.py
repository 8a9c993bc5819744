"""Triton's model control over HTTP. Only this user can reach the Unix socket, so callers have no access."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aisle.errors import ServerError

# Time limits of a call, in seconds.
LOAD_SECONDS = 600.0  # enough for a TensorRT plan of several gigabytes
UNLOAD_SECONDS = 60.0
CLASSIFY_SECONDS = 30.0
QUERY_SECONDS = 10.0  # for states and counts, which Triton answers at once


class Admin:
    """Loads, unloads and queries the models of one server. Not thread-safe; see `new_connection`."""

    def __init__(self, address: Path | tuple[str, int], headers: dict[str, str], limit: float = LOAD_SECONDS) -> None:
        """Prepare a connection; it opens with the first call.

        Args:
            address: a Unix socket, or host and port if callers have HTTP too.
            headers: HTTP headers with the key for the restricted protocols.
            limit: time limit of all calls in seconds, in addition to the limit of each kind of call.
        """
        self._address = address
        self._connection = (
            _UnixConnection(address) if isinstance(address, Path) else http.client.HTTPConnection(*address)
        )
        self._headers = headers
        self._limit = limit

    def new_connection(self, limit: float = LOAD_SECONDS) -> Admin:
        """Return a connection for another thread, or one with a shorter time limit."""
        return Admin(self._address, self._headers, limit)

    def close(self) -> None:
        """Close the connection: when Triton stops, it waits for open connections."""
        self._connection.close()

    def load(self, model: str) -> None:
        """Load a model, or its new versions. Meanwhile, loaded versions keep answering.

        Raises:
            ServerError: a version cannot be loaded. Versions that were loaded before keep serving.
        """
        self._post(f"/v2/repository/models/{model}/load", LOAD_SECONDS)

    def unload(self, model: str) -> None:
        """Unload a model. Triton first completes its requests in flight.

        Raises:
            ServerError: Triton refuses, or does not answer.
        """
        self._post(f"/v2/repository/models/{model}/unload", UNLOAD_SECONDS)

    def states(self) -> dict[tuple[str, str], str]:
        """Return the state of every version that was ever loaded, such as {("encoder", "2"): "READY"}.

        Raises:
            ServerError: Triton does not answer.
        """
        index = self._post("/v2/repository/index", QUERY_SECONDS)
        with _reading(index):
            return {(model["name"], model.get("version", "")): model.get("state", "") for model in index}

    def classify(self, model: str, texts: list[str], seconds: float = CLASSIFY_SECONDS) -> list[str]:
        """Return the first category of each text; it may be empty if the model is multi-label.

        Raises:
            ServerError: the model did not answer within `seconds`, or refused.
        """
        inputs = [{"name": "text", "datatype": "BYTES", "shape": [len(texts), 1], "data": texts}]
        answer = self._post(f"/v2/models/{model}/infer", seconds, {"inputs": inputs})
        with _reading(answer):
            output = next(each for each in answer["outputs"] if each["name"] == "category")
            return list(output["data"])[:: output["shape"][1]]

    def counts(self, model: str) -> tuple[int, int]:
        """Return how many requests a model has answered and how many failed, over all loaded versions.

        Raises:
            ServerError: Triton does not answer.
        """
        answer = self._request("GET", f"/v2/models/{model}/stats", QUERY_SECONDS)
        with _reading(answer):
            stats = [version["inference_stats"] for version in answer["model_stats"]]
            return sum(stat["success"]["count"] for stat in stats), sum(stat["fail"]["count"] for stat in stats)

    def _post(self, path: str, seconds: float, body: dict[str, Any] | None = None) -> Any:
        return self._request("POST", path, seconds, json.dumps(body or {}).encode())

    def _request(self, method: str, path: str, seconds: float, body: bytes | None = None) -> Any:
        """Send a request and return its JSON answer; raise ServerError if that fails or takes too long."""
        seconds = min(seconds, self._limit)
        self._connection.timeout = seconds  # for the next connection
        if self._connection.sock:
            self._connection.sock.settimeout(seconds)
        try:
            self._connection.request(method, path, body, self._headers)
            response = self._connection.getresponse()
            content = response.read()
        except TimeoutError:
            self._connection.close()  # the next call opens it again
            raise ServerError(f"Triton has not answered {path} within {seconds:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            raise ServerError(f"Triton cannot be reached: {error}") from None
        with _reading(content[:200]):
            answer = json.loads(content) if content else {}
        if response.status != 200:
            raise ServerError(str(answer.get("error", response.reason) if isinstance(answer, dict) else answer))
        return answer


@contextmanager
def _reading(answer: Any) -> Iterator[None]:
    """Convert any error in reading an answer to a ServerError that shows the answer."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, StopIteration):
        raise ServerError(f"Triton's answer is malformed: {str(answer)[:200]}") from None


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost")
        self._path = str(path)

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)
