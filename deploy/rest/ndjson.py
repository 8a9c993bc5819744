"""Classify a stream of NDJSON: one line in, one line out, in order, in constant memory."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import orjson
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from aisle.client import AsyncClassifier, Failure, Prediction
from aisle.client.tracing import continued
from aisle.client.wire import Wanted
from aisle.deploy.rest.access import WHY
from aisle.deploy.rest.bodies import NDJSON, SECONDS
from aisle.deploy.rest.errors import VALIDATION, Fault, fault_of, fault_of_bug
from aisle.deploy.rest.front import Limit
from aisle.deploy.rest.models import answer_of
from aisle.preprocess.clean import MAX_BYTES
from aisle.preprocess.tables.jsonrows import one_value

LONGEST = 8 * MAX_BYTES  # bytes of a line: the longest text, if all of it is escaped, and room for other fields
FLUSH = 64  # answers that are sent together


class AnswerStream(Response):
    """The answers to the lines of the request's body. It reads the body only as fast as the caller reads answers.

    A line that is not a text gets a line with an error, and the others are not affected. If the server fails, the last
    line says so, and the connection is closed before the end of the body, so that the caller cannot take the answers
    for complete. If the caller leaves, the requests under way are cancelled.
    """

    media_type = NDJSON

    def __init__(
        self, request: Request, client: AsyncClassifier, bulk: AsyncClassifier, wanted: Wanted, streams: Limit
    ) -> None:
        super().__init__()
        del self.headers["content-length"]
        self._request, self._client, self._bulk = request, client, bulk
        self._wanted, self._streams = wanted, streams

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._streams.one(), continued(self._request.headers):
            # The status can tell only what is known before the first line: no server, no token, too few categories, no
            # decisions or attributes.
            wanted = self._wanted
            await self._client.classify(
                ["probe"], wanted.top_k, decisions=wanted.decisions, attributes=wanted.attributes
            )
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            lines = Lines(receive)
            work = asyncio.create_task(self._answer(lines, scope, send))
            leaving = asyncio.create_task(lines.wait_until_caller_left())
            try:
                await asyncio.wait((work, leaving), return_when=asyncio.FIRST_COMPLETED)
                if not work.done():
                    raise ClientDisconnect
                work.result()
            finally:
                work.cancel()
                leaving.cancel()
                await asyncio.wait((work, leaving))

    async def _answer(self, lines: Lines, scope: Scope, send: Send) -> None:
        try:
            wanted = self._wanted
            stream = self._bulk.stream(lines, wanted.top_k, decisions=wanted.decisions, attributes=wanted.attributes)
            async with aclosing(stream) as answers:
                number, waiting = 0, []
                async for answer in answers:
                    waiting.append(_line(lines.faults.pop(number, answer)))
                    number += 1
                    if len(waiting) == FLUSH:
                        await _send(send, b"".join(waiting), more=True)
                        waiting.clear()
            await _send(send, b"".join(waiting), more=False)
        except ClientDisconnect:
            raise
        except TimeoutError:
            scope[WHY] = f"the caller sent or read nothing for {SECONDS:.0f} s"
        except Exception as error:
            fault = fault_of(error) or fault_of_bug(error)
            scope[WHY] = fault.why or str(fault)
            await _send(send, _encoded({**fault.body(), "status": fault.status}), more=True)


class Lines:
    """The values of a body's lines. The faults of lines that have no value are in `faults`, by number from 0."""

    def __init__(self, receive: Receive) -> None:
        self.faults: dict[int, Failure] = {}
        self._receive = receive
        self._ended = asyncio.Event()

    async def wait_until_caller_left(self) -> None:
        """Wait for the end of the body, and then until the caller leaves or has the whole answer."""
        await self._ended.wait()
        await self._receive()  # the only message after the body

    async def __aiter__(self) -> AsyncIterator[Any]:
        number = 0
        async for line in self._lines():
            try:
                value = _value(line)
            except ValueError as error:
                self.faults[number], value = Failure(str(error)), None
            yield value
            number += 1

    async def _lines(self) -> AsyncIterator[bytes | None]:
        """Yield each line without its end, or None for a line that is too long, of which no more is kept."""
        buffer, searched, too_long = bytearray(), 0, False
        async for part in self._parts():
            buffer += part
            while (end := buffer.find(b"\n", searched)) >= 0:
                yield None if too_long or end > LONGEST else bytes(buffer[:end])
                del buffer[: end + 1]
                searched, too_long = 0, False
            if len(buffer) > LONGEST:
                buffer, too_long = bytearray(), True
            searched = len(buffer)
        if buffer or too_long:
            yield None if too_long else bytes(buffer)

    async def _parts(self) -> AsyncIterator[bytes]:
        more = True
        while more:
            async with asyncio.timeout(SECONDS):
                message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            more = message.get("more_body", False)
            yield message.get("body", b"")
        self._ended.set()


def _value(line: bytes | None) -> Any:
    """Return what a line holds in place of a text: its value, or the field `text` of an object.

    Raises:
        ValueError: it holds none.
    """
    if line is None:
        raise ValueError(f"the line is over {LONGEST} bytes; shorten the text")
    try:
        text = line.decode()
    except UnicodeDecodeError:
        raise ValueError("the line is not UTF-8") from None
    if not text.strip():
        raise ValueError("the line is empty; send a text")
    try:
        value = one_value(text)
    except ValueError as error:
        raise ValueError(f"the line is not JSON: {error}") from None
    return value.get("text") if isinstance(value, dict) else value


def _line(answer: Prediction | Failure) -> bytes:
    if isinstance(answer, Failure):
        return _encoded({"error": answer.message, "error_type": VALIDATION})
    return _encoded(answer_of(answer))


def _encoded(body: object) -> bytes:
    return orjson.dumps(body, option=orjson.OPT_APPEND_NEWLINE)


async def _send(send: Send, body: bytes, *, more: bool) -> None:
    async with asyncio.timeout(SECONDS):
        await send({"type": "http.response.body", "body": body, "more_body": more})


def wanted_of(request: Request) -> Wanted:
    """Return what the query asks for: `top_k`, whose range the server checks, `decisions` and `attributes`.

    Raises:
        Fault: 422, one of them has another form.
    """
    top_k = request.query_params.get("top_k")
    if top_k is not None and not re.fullmatch(r"-?[0-9]{1,10}", top_k):
        raise Fault(422, "top_k must be a whole number from 1 to the number of categories")
    further = {name: request.query_params.get(name, "false") for name in ("decisions", "attributes")}
    if wrong := next((name for name, value in further.items() if value not in ("true", "false")), None):
        raise Fault(422, f"{wrong} must be true or false")
    decisions, attributes = (value == "true" for value in further.values())
    return Wanted(None if top_k is None else int(top_k), decisions, attributes=attributes)
