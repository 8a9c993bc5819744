"""The common part of the blocking and the asyncio client: how to reach the server, and when to retry."""

from __future__ import annotations

import base64
import copy
import logging
import math
import os
import random
import secrets
import time
from types import ModuleType
from typing import Any, Self

import grpc

import aisle.client.wire as wire
from aisle.client.address import check_address, is_loopback
from aisle.client.fork import register_channel
from aisle.client.protocol import BULK_RETRIES, CHANNEL, PATIENCE, TLS
from aisle.client.status import Verdict, interpret
from aisle.client.traffic import TrafficLog
from aisle.client.wire import Request
from aisle.errors import InputError

LONG_WAIT = 10.0  # seconds; a longer wait that a gateway asks for is logged


class Connection:
    """The server's address, the time limits, and which errors to retry."""

    def __init__(
        self,
        url: str = "localhost:8001",
        *,
        timeout: float = 10.0,
        retries: int = 4,
        tls: TLS | None = None,
        token: str = "",
        model_version: str | int = "",
        log: TrafficLog | None = None,
    ) -> None:
        """Set the server's address. The first call connects, in its own process and event loop.

        Args:
            url: host:port of the gRPC endpoint. If the name has several addresses, such as that of a headless service,
                requests take turns among them; `ipv4:10.0.0.1:8001,10.0.0.2:8001` lists them. For a server on this
                host, the proxy of `http_proxy` is not used.
            timeout: the time limit of one request, in seconds.
            retries: how often a request is sent again after an error that a retry can solve, such as UNAVAILABLE.
            tls: encrypt the connection.
            token: ``NAME:SECRET``, by which a gateway identifies this client.
            model_version: the version to use; by default the server's latest.
            log: gets a line for each answer. The caller opens and closes it.

        Raises:
            InputError: the address, `timeout`, `retries`, `model_version` or `token` is invalid, a file of `tls` is
                missing, or there is a `token` without `tls`.
        """
        check_address(url)
        self._timeout = _checked_timeout(timeout)
        self._retries = _checked_retries(retries)
        self._version = _checked_version(model_version)
        self._token = _checked_token(token, encrypted=tls is not None)
        self._url = url
        self._credentials = tls.credentials() if tls else None
        self._wait_us = max(1, int(self._timeout * 1e6))
        self._name = secrets.token_hex(8)
        self._log = log
        self._max_batch: int | None = None
        self._transports: dict[Any, Any] = {}
        self._closed = False
        self._answered = False  # whether the server has ever answered
        self._waiting = False  # whether waiting for the server has been logged

    @classmethod
    def from_environment(
        cls, url: str, *, timeout: float = 10.0, retries: int = 4, log: TrafficLog | None = None
    ) -> Self:
        """Connect as the commands do: TLS as `TLS.from_environment`, the token from AISLE_TOKEN.

        Raises:
            InputError: as the constructor.
        """
        token = os.environ.get("AISLE_TOKEN", "")
        return cls(url, timeout=timeout, retries=retries, tls=TLS.from_environment(), token=token, log=log)

    def with_token(self, token: str) -> Self:
        """Return a view for another client of the gateway. It shares the connection and must not be closed itself.

        Args:
            token: ``NAME:SECRET``; empty for a client without a token.

        Raises:
            InputError: the token has another form, or there is no TLS.
        """
        view = copy.copy(self)
        view._token = _checked_token(token, encrypted=self._credentials is not None)
        return view

    def _connect(self, api: ModuleType | Any) -> Any:
        """Return a new channel of `grpc` or `grpc.aio`. It connects at its first use."""
        options = [*CHANNEL, ("grpc.enable_http_proxy", 0)] if is_loopback(self._url) else CHANNEL
        if self._credentials is None:
            return register_channel(api.insecure_channel(self._url, options))
        return register_channel(api.secure_channel(self._url, self._credentials, options))

    def _checked_max_batch(self, configuration: bytes) -> int:
        """Return how many texts the server takes in one request.

        Raises:
            InputError: there is a log, but the model gives a text several categories.
        """
        if self._log and wire.models(configuration).multi_label:
            raise InputError(
                f"the model is multi-label, and {self._log.path} can hold one category per text; use no log"
            )
        return wire.max_batch(configuration)

    def _stamped(self, request: Request, bulk: bool) -> bytes:
        """Return a request with its deadline and the current time, serialized.

        The encoder drops a request whose caller has given up. For this it needs the time of sending, by a clock that
        may differ from the server's.
        """
        parameters = request.parameters
        parameters["caller"].string_param = self._name
        parameters["sent_us"].int64_param = time.time_ns() // 1000
        parameters["wait_us"].int64_param = self._wait_us
        if bulk:
            parameters["bulk"].bool_param = True  # it runs when no interactive request waits
        return request.SerializeToString()  # type: ignore[no-any-return]

    def _note_answer(self) -> None:
        self._answered, self._waiting = True, False

    def _seconds_to_wait(self, error: grpc.RpcError, attempt: int, bulk: bool, since: float) -> float:
        """Return the seconds to wait before the next attempt, or raise the error for the caller.

        This is exponential backoff with full jitter. `attempt` counts from 0; `since` is `time.monotonic()` at the
        first attempt. Interactive requests are not retried when the server is overloaded, because retries would
        prolong the overload. Bulk requests wait: for an overloaded server, for a gateway's limit, and for a server
        that is starting.
        """
        verdict = interpret(error, self._url, self._timeout, self._answered)
        tries = max(self._retries, BULK_RETRIES) if bulk and self._retries else self._retries
        given_up = verdict.unreachable and not self._answered and time.monotonic() - since > PATIENCE
        retry = verdict.retry == "always" or (bulk and verdict.retry == "bulk")
        if not retry or attempt >= tries or given_up:
            raise verdict.error from None
        if bulk:
            self._log_waiting(verdict)
        return verdict.wait + random.uniform(0, min(8.0 if bulk else 2.0, 0.1 * 2**attempt))

    def _log_waiting(self, verdict: Verdict) -> None:
        """Log what a bulk job waits for, at most once until the next answer."""
        if self._waiting:
            return
        log = logging.getLogger("aisle.client")
        if verdict.unreachable:
            self._waiting = True
            log.warning("%s Waiting for a server, at most %d seconds.", verdict.error, PATIENCE)
        elif verdict.wait >= LONG_WAIT:
            self._waiting = True
            log.warning("%s: waiting as long as %s asks", verdict.error, self._url)


def _checked_token(token: str, *, encrypted: bool) -> tuple[tuple[str, str], ...]:
    """Return the metadata that carries a token; empty without a token."""
    if not token:
        return ()
    if ":" not in token:
        raise InputError("the token must be NAME:SECRET")
    if not encrypted:
        raise InputError("a token is sent only over TLS; name the server's authority (AISLE_TLS_CA)")
    return (("authorization", "Basic " + base64.b64encode(token.encode()).decode()),)


def _checked_timeout(timeout: float) -> float:
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 < timeout < math.inf:
        raise InputError(f"the timeout must be a number of seconds above 0; got {timeout!r}")
    return min(float(timeout), 1e9)


def _checked_retries(retries: int) -> int:
    if isinstance(retries, bool) or not isinstance(retries, int) or retries < 0:
        raise InputError(f"retries must be a whole number from 0; got {retries!r}")
    return retries


def _checked_version(version: str | int) -> str:
    text = str(version)
    if text and not (text.isascii() and text.isdigit() and 0 < int(text) < 2**63):
        raise InputError(f"model_version must be a whole number from 1, or empty for the live version; got {version!r}")
    return text
