"""Teaches schemathesis to send NDJSON."""

from __future__ import annotations

import json

import schemathesis


@schemathesis.serializer("application/x-ndjson")
def ndjson(ctx: object, value: object) -> bytes:
    """Return a value as one line, or a text as the lines that it holds."""
    return value.encode("utf-8", "replace") if isinstance(value, str) else json.dumps(value).encode() + b"\n"
