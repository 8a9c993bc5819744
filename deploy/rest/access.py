"""The outermost layer: one line of log for each request, without its texts."""

from __future__ import annotations

import logging
import time
from datetime import UTC, datetime
from typing import Any

import orjson
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from aisle.deploy.rest.errors import fault_of_bug

LOG = logging.getLogger("aisle.rest")
WHY = "aisle.why"  # key in the scope: the cause of an error, for the log alone
CLIENT = "aisle.client"  # key in the scope: the caller's name, from its token
GONE = 499  # in the log: the caller left before the answer (nginx's status)


class AccessLog:
    """Logs each request as a JSON object: who, what, result, time and size. Unknown paths are not logged."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        call = _Call(scope, receive, send)
        try:
            await self._app(scope, call.receive, call.send)
        except ClientDisconnect:
            call.status = GONE
        except Exception as error:  # a bug, which the application has answered
            scope[WHY] = fault_of_bug(error).why
        finally:
            call.log()


class _Call:
    """One request: passes its messages on, and counts."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.status = 0
        self._scope, self._receive, self._send = scope, receive, send
        self._start = time.perf_counter()
        self._bytes_in = self._bytes_out = 0

    async def receive(self) -> Message:
        message = await self._receive()
        self._bytes_in += len(message.get("body", b""))
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        self._bytes_out += len(message.get("body", b""))
        await self._send(message)

    def log(self) -> None:
        if not LOG.isEnabledFor(logging.INFO):
            return
        scope = self._scope
        row: dict[str, Any] = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "client": scope.get(CLIENT) if self.status == 200 else None,  # else the gateway may not have checked it
            "peer": scope["client"][0] if scope.get("client") else None,
            "call": f"{scope['method']} {getattr(scope.get('route'), 'path', '-')}",
            "status": self.status or GONE,
            "milliseconds": round(1000 * (time.perf_counter() - self._start), 1),
            "bytes_in": self._bytes_in,
            "bytes_out": self._bytes_out,
        }
        if why := scope.get(WHY):
            row["why"] = why
        LOG.info(orjson.dumps(row).decode())
