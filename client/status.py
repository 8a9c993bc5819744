"""The meaning of gRPC's errors: which error the caller gets, and whether to retry."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, Literal

import grpc

from aisle.client.address import proxy_hint
from aisle.client.protocol import (
    ATTRIBUTES_MODEL,
    DECISIONS_MODEL,
    EMBEDDINGS_MODEL,
    MODEL,
    ClassifierError,
    InvalidText,
    Overloaded,
    Unavailable,
    UnknownVersion,
)

LONGEST_WAIT = 300.0  # seconds; the upper limit of a wait that a server asks for
# Errors of valid requests, which a retry can solve. In this order: another request in the batch had a damaged string
# tensor; a step of the ensemble hung and returned nothing; the process of a step has died and is starting again; the
# server is stopping.
TRANSIENT = (
    "incomplete string data",
    "but got 0 inputs for model",
    "is not healthy",
    "has no available versions",
)
EMPTY = "the answer is empty, because a step of the ensemble has ended"
FULL = "Exceeds maximum queue size"
# gRPC's messages if no server answered.
UNREACHABLE = (
    "failed to connect",
    "Failed to connect",
    "errors resolving",
    "DNS resolution failed",
    "ame resolution",
    "Socket closed",
    "Connection reset",
    "Broken pipe",
    "empty address list",
)
CONNECTION_CLOSED = ("Socket closed", "Connection reset by peer")
CLOSES_CONNECTION = (
    "the server at {url} closes the connection: is it the gRPC port of `aisle serve` (8001; 8002 is for metrics), and "
    "does it need TLS (AISLE_TLS_CA, tls=)?"
)
# gRPC's messages if the server is not as expected, and what they mean.
WRONG_SERVERS = (
    (
        ("Failed parsing HTTP/2", "http1.x", "Received http2 header with status: 404"),
        "the server at {url} does not speak gRPC; `aisle serve` has gRPC on port 8001 (8002 is for its HTTP metrics)",
    ),
    (
        ("WRONG_VERSION_NUMBER",),
        "the server at {url} does not speak TLS; turn TLS off (AISLE_TLS…, tls=), or give a port that has it",
    ),
    (
        ("CERTIFICATE_VERIFY_FAILED",),
        "the certificate of {url} is not trusted; name its authority (AISLE_TLS_CA, tls=)",
    ),
)
_MODELS = "|".join((MODEL, DECISIONS_MODEL, ATTRIBUTES_MODEL, EMBEDDINGS_MODEL))
_ENSEMBLE = re.compile(rf"^in ensemble '(?:{_MODELS})(?:_v\d+)?', ")
_NO_MODEL = re.compile(r"unknown model: 'product_(decisions|attributes|embeddings)' is not found")
_NOT_LOADED = re.compile(r"version (\S+) is not (?:found|at ready state)")


class EmptyAnswer(grpc.RpcError):  # type: ignore[misc]
    """Triton answered without outputs, as it does if the last step hung and was stopped. A retry can help."""

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.UNAVAILABLE

    def details(self) -> str:
        return EMPTY


@dataclass(frozen=True)
class Verdict:
    """How to handle a failed call."""

    error: Exception  # for the caller, after the last attempt
    retry: Literal["never", "bulk", "always"] = "never"  # "bulk": only bulk requests are retried
    wait: float = 0.0  # seconds; the least wait that the server asks for
    unreachable: bool = False  # no server answered


def interpret(call: Any, url: str, timeout: float, answered: bool) -> Verdict:
    """Return how to handle a failed call.

    Args:
        call: gRPC's exception.
        timeout: the call's time limit in seconds.
        answered: whether the server at `url` has ever answered.
    """
    status = call.code().name
    details = _ENSEMBLE.sub("", call.details() or "")
    transient = any(each in details for each in TRANSIENT)
    if status == "INVALID_ARGUMENT" and not transient:
        return Verdict(InvalidText(details))
    if FULL in details:
        return Verdict(Overloaded(status, details), "bulk")
    if status == "RESOURCE_EXHAUSTED":
        return _over_the_limit(call, details)
    if status == "DEADLINE_EXCEEDED":
        hint = "" if answered else f"; is `aisle serve` running there?{proxy_hint(url)}"
        error = ClassifierError(status, f"no answer from {url} within {timeout:g} s{hint}")
        return Verdict(error, "bulk", unreachable=not answered)
    if found := _NOT_LOADED.search(details):
        message = f"version {found[1]} is not loaded; give one that is, or none for the live version"
        return Verdict(UnknownVersion("NOT_FOUND", message))
    if found := _NO_MODEL.search(details):
        return Verdict(ClassifierError(status, f"the server at {url} is of an Aisle without {found[1]}"))
    for signs, meaning in WRONG_SERVERS:
        if any(sign in details for sign in signs):
            return Verdict(Unavailable(status, meaning.format(url=url) + proxy_hint(url)))
    if status == "UNAVAILABLE" and any(each in details for each in UNREACHABLE):
        return _unreachable(details, url, answered)
    if status == "UNAVAILABLE" or transient:
        return Verdict(Unavailable(status, details), "always")
    return Verdict(ClassifierError(status, details))


def _unreachable(details: str, url: str, answered: bool) -> Verdict:
    reason = details.rpartition(": ")[2].rstrip("]")
    message = f"no server answers at {url} ({reason}); is `aisle serve` running?"
    if not answered and any(each in reason for each in CONNECTION_CLOSED):
        message = CLOSES_CONNECTION.format(url=url)
    return Verdict(Unavailable("UNAVAILABLE", message + proxy_hint(url)), "always", unreachable=True)


def _over_the_limit(call: Any, details: str) -> Verdict:
    """Handle a limit of the gateway. A message that is too large is never accepted; other requests can be retried."""
    if "larger than max" in details:
        return Verdict(ClassifierError("RESOURCE_EXHAUSTED", details))
    wait = retry_after(call)
    hint = f"; try again in {wait:g} s" if wait else ""
    return Verdict(ClassifierError("RESOURCE_EXHAUSTED", details + hint, wait), "bulk", wait)


def retry_after(call: Any) -> float:
    """Return the seconds that the server asks the client to wait: `retry-after` (RFC 9110) or gRPC's pushback."""
    metadata = dict([*(call.initial_metadata() or ()), *(call.trailing_metadata() or ())])
    pushback, after = metadata.get("grpc-retry-pushback-ms", ""), metadata.get("retry-after", "")
    try:
        if pushback:
            seconds = int(pushback) / 1000
        elif after.strip().isdigit():
            seconds = float(after)
        else:
            seconds = parsedate_to_datetime(after).timestamp() - time.time() if after else 0.0
    except (ValueError, TypeError):
        return 0.0
    return min(max(0.0, seconds), LONGEST_WAIT)
