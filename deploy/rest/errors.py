"""The one table of errors: which HTTP status and body answers each fault of a request and each error of the client."""

from __future__ import annotations

import math
import os
import traceback
from collections.abc import Mapping
from typing import Any

import orjson
from starlette.responses import Response

from aisle.client import ClassifierError, InvalidText, Overloaded, Unavailable

# The names of text-embeddings-inference, so that its clients find what they know.
VALIDATION, BACKEND, OVERLOADED, UNHEALTHY = "Validation", "Backend", "Overloaded", "Unhealthy"
UNAUTHORIZED = "Unauthorized"  # it has no name for this
RETRY_SECONDS = 1  # when to try again, if the server does not say
ASK_FOR_TOKEN = {"WWW-Authenticate": 'Basic realm="aisle", charset="UTF-8"'}


class Fault(Exception):
    """A request that gets an error for an answer."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = VALIDATION,
        *,
        row: int | None = None,
        headers: Mapping[str, str] | None = None,
        why: str = "",
    ) -> None:
        """Describe the answer.

        Args:
            row: the row of the text that is at fault, counted from 0.
            why: for the access log: the cause, which the caller is not told.
        """
        super().__init__(message)
        self.status, self.kind, self.row, self.why = status, kind, row, why
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        body: dict[str, Any] = {"error": str(self), "error_type": self.kind}
        return body if self.row is None else {**body, "row": self.row}

    def response(self) -> Response:
        return json_response(self.body(), self.status, self.headers)


def json_response(body: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return a value as JSON. orjson takes a tenth of the time of `json`, and predictions as they are."""
    return Response(orjson.dumps(body), status, headers, "application/json")


def fault_of(error: Exception) -> Fault | None:
    """Return the answer to an error, or None if the error is a bug."""
    if isinstance(error, Fault):
        return error
    if isinstance(error, InvalidText):
        return Fault(422, str(error), row=error.row)
    if isinstance(error, ClassifierError):
        return _of_server(error)
    return None


def _of_server(error: ClassifierError) -> Fault:
    """Return the answer to an error of the server. The caller is not told its address."""
    why = str(error)
    if isinstance(error, Overloaded):
        return overloaded("the server's queue is full; try again later", why)
    if error.status == "RESOURCE_EXHAUSTED":
        return overloaded("over the limit of this client; try again later", why, error.wait)
    if error.status == "UNAUTHENTICATED":
        message = "send a known token: HTTP basic authentication with NAME and SECRET"
        return Fault(401, message, UNAUTHORIZED, headers=ASK_FOR_TOKEN, why=why)
    if error.status == "PERMISSION_DENIED":
        return Fault(403, "the gateway does not allow this", UNAUTHORIZED, why=why)
    if isinstance(error, Unavailable):
        headers = {"Retry-After": str(RETRY_SECONDS)}
        return Fault(503, "no server answers; try again later", UNHEALTHY, headers=headers, why=why)
    if error.status == "DEADLINE_EXCEEDED":
        return Fault(504, "the server did not answer in time", BACKEND, why=why)
    return Fault(502, "the server failed", BACKEND, why=why)


def fault_of_bug(error: BaseException) -> Fault:
    """Return the answer to any other error. The log gets its kind and place; its message may hold a text."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f"{os.path.basename(frames[-1].filename)}:{frames[-1].lineno}" if frames else "unknown line"
    return Fault(500, "the front failed; this is a bug", BACKEND, why=f"{type(error).__name__} ({place})")


def overloaded(message: str, why: str = "", wait: float = 0.0) -> Fault:
    """Return the answer to a request that comes at a bad time; `wait` is in seconds."""
    seconds = max(RETRY_SECONDS, math.ceil(wait))
    return Fault(429, message, OVERLOADED, headers={"Retry-After": str(seconds)}, why=why)
