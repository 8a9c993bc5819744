"""Reading a request: its content type, its body within limits, its JSON, its query and its token."""

from __future__ import annotations

import asyncio
import base64
import binascii
from typing import Any

from starlette.requests import Request

from aisle.deploy.rest.errors import ASK_FOR_TOKEN, UNAUTHORIZED, Fault
from aisle.preprocess.tables.jsonrows import one_value

JSON, NDJSON = "application/json", "application/x-ndjson"
LIMIT = 8 * 1024 * 1024  # bytes of a JSON body: 64 texts of 32 KiB take 4 MiB if each Chinese character is escaped
SECONDS = 30.0  # to receive a JSON body, and the next part of an NDJSON body


async def read_json(request: Request) -> Any:
    """Return the JSON value of a body.

    Raises:
        Fault: 400 not JSON, 408 too slow, 413 too large, 415 another content type.
    """
    check_type(request, JSON)
    body = await _read(request)
    try:
        return one_value(body.decode())
    except UnicodeDecodeError:
        raise Fault(400, "the body is not UTF-8") from None
    except ValueError as error:
        raise Fault(400, f"the body is not JSON: {error}") from None


def check_type(request: Request, expected: str) -> None:
    """Refuse other content types, encodings and character sets than those that are read.

    A page of another site cannot send JSON without the browser's asking first, so no form may pass for it.

    Raises:
        Fault: 415.
    """
    kind, _, parameters = request.headers.get("content-type", "").partition(";")
    if kind.strip().lower() != expected:
        raise Fault(415, f"send the header Content-Type: {expected}")
    name, _, value = parameters.partition("=")
    if name.strip().lower() == "charset" and value.strip(' "').lower() not in ("utf-8", "utf8"):
        raise Fault(415, "the body must be UTF-8")
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise Fault(415, "send the body uncompressed", headers={"Accept-Encoding": "identity"})


async def _read(request: Request) -> bytes:
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length[:20]) > LIMIT:
        raise _too_large()
    parts, size = [], 0
    try:
        async with asyncio.timeout(SECONDS):
            async for part in request.stream():
                parts.append(part)
                size += len(part)
                if size > LIMIT:
                    raise _too_large()
    except TimeoutError:
        raise Fault(408, f"the body did not arrive within {SECONDS:.0f} s", headers={"Connection": "close"}) from None
    return b"".join(parts)


def _too_large() -> Fault:
    message = f"the body is over {LIMIT} bytes; send fewer texts, or a file as NDJSON to /v1/classify/stream"
    return Fault(413, message, headers={"Connection": "close"})  # so that the rest need not be read


def check_query(request: Request, *known: str) -> None:
    """Refuse query parameters that would be ignored, and those that occur twice.

    Raises:
        Fault: 422.
    """
    if not request.scope["query_string"]:
        return
    names = [name for name, _ in request.query_params.multi_items()]
    for name in names:
        if name not in known or names.count(name) > 1:
            told = f"known are: {', '.join(known)}" if known else "there are none here"
            raise Fault(422, f"a query parameter is unknown or occurs twice; {told}")


def token_of(request: Request) -> str:
    """Return the token ``NAME:SECRET`` of a request, from basic or bearer authentication; empty if it has none.

    Raises:
        Fault: 401, the header has another form.
    """
    scheme, _, value = request.headers.get("authorization", "").partition(" ")
    if not scheme:
        return ""
    value = value.strip()
    try:
        token = value if scheme.lower() == "bearer" else base64.b64decode(value, validate=True).decode()
    except (binascii.Error, ValueError):
        token = ""
    if scheme.lower() not in ("basic", "bearer") or ":" not in token:
        raise Fault(401, "send the token as NAME:SECRET by basic authentication", UNAUTHORIZED, headers=ASK_FOR_TOKEN)
    return token
